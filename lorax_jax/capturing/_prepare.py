"""`prepare`: whatever the initializers of a plan read."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from .. import initializers
from .._errors import CaptureError
from ..planning import Plan, Site, Slot
from ..statistics import GradientFactors, Statistic
from ._batches import Batches
from ._calls import Calls
from ._capture import capture
from ._chosen import chosen
from ._components import by_site
from ._eva import starts_with_eva
from ._gathered import Gathered
from ._gradient import capture_grad
from ._redistribute import caps, redistribute
from ._values import check_plan


class Prepared(NamedTuple):
    """What `prepare` found.

    Attributes:
        plan: the plan, with other ranks if they were to be distributed anew.
        stats: name of an adapted weight -> what its initializer reads.
    """

    plan: Plan
    stats: Gathered


def prepare(
    plan: Plan,
    params: Any,
    fn: Callable[..., Any],
    batches: Iterable[Any] | Callable[[], Iterable[Any]],
    *,
    loss: Callable[..., Any] | None = None,
    mask: Callable[..., Any] | None = None,
    stat: Statistic | None = None,
    rho: float = 1.0,
    passes: int = 4,
    key: PRNGKeyArray | None = None,
    tokens: int | str = 0,
    materialize: str | Iterable[str] = "error",
    custom: str = "error",
    progress: bool = False,
) -> Prepared:
    """Gathers what the initializers of a plan read, each what it needs.

    EVA reads variances of what its weights are fed, CorDA second moments, LoRA-GA
    gradients; the others read nothing that is gathered here, and a plan of theirs alone
    comes back as it is, without a look at the batches.

        plan, stats = lj.prepare(plan, params, model.apply, batches)
        adapter = lj.init(plan, params, key=key, stats=stats)

    The batches are gone through once for each statistic, and `passes` times for
    gradients.

    Args:
        plan: where the adapter acts.
        params: the parameters; never changed.
        fn: the model, `fn(params, *args)`.
        batches: each a tuple of the model's arguments, a mapping of its keyword
            arguments (and `mask`), or its only argument. A list, or a function that
            gives an iterator; an iterator itself where they are gone through once.
        loss: for LoRA-GA: `loss(params, *args)` of the same arguments as `fn`, the mean
            over a batch.
        mask: gives the mask of a batch from its arguments: which tokens count, and how
            much, with the leading axes of the argument `tokens`; see `label_mask`. With
            it, gradients of batches count by its sum. `None` counts all.
        stat: a statistic to gather instead of those that the initializers name, such as
            `statistics.Sketch(64)` for weights too wide for a square.
        rho: how many times its rank a site that starts with EVA may get; from 1, which
            leaves ranks as they are. PEFT's is 2. See `redistribute`, and `eva` for
            PEFT's own procedure.
        passes, key, custom: of gradients, as for `capture_grad`.
        tokens: as for `capture`.
        materialize: as for `adapt`.
        progress: whether to show bars.

    Returns:
        `Prepared(plan, stats)`.

    Raises:
        CaptureError: if there are no batches, or they can be gone through only once and
            must be several times; if gradients are read and there is no `loss`; if
            fewer rows reach a site that starts with EVA than its rank; if the layers of
            a stack read different statistics; for values that are no numbers; and as
            `capture` and `capture_grad`.
        PlanError: if `rho` makes no sense.

    Example:
        >>> import lorax_jax as lj
        >>> params = {"v": jnp.ones((6, 4)), "w": jnp.ones((4, 3))}
        >>> fn = lambda params, x: jnp.tanh(x @ params["v"]) @ params["w"]
        >>> loss = lambda params, x: (fn(params, x) ** 2).mean()
        >>> xs = [jax.random.normal(jax.random.key(i), (8, 6)) for i in range(3)]
        >>> targets = {"v": {"init": "eva"}, "w": {"init": "lora_ga"}}
        >>> plan = lj.plan(lj.LoraConfig(targets, rank=1), params, fn, (xs[0],))
        >>> plan, stats = prepare(plan, params, fn, xs, loss=loss)
        >>> {name: type(state).__name__ for name, state in stats.items()}
        {'v': 'MomentsState', 'w': 'GradientFactors'}
        >>> adapter = lj.init(plan, params, key=jax.random.key(0), stats=stats)
    """
    check_plan(plan, "prepare(plan, params, fn, batches)")
    wanted = _wanted(plan, stat)
    if not wanted:
        return Prepared(plan, Gathered({}, {}))
    if GradientFactors in wanted and loss is None:
        raise CaptureError(
            f"The initializer of {wanted[GradientFactors][0]!r} reads gradients, and "
            "there is no `loss`. Give `prepare(..., loss=loss)`: `loss(params, *args)` "
            "of the model's arguments, the mean over a batch."
        )
    times = sum(passes if one is GradientFactors else 1 for one in wanted)
    calls, found, seen = Calls(batches, mask), {}, {}
    if times > 1:
        Batches(batches, passes=times)  # raises for those that are used up
    for one, names in wanted.items():
        if one is GradientFactors:
            gradients = capture_grad(
                _of_call(loss),
                plan,
                only=names,
                passes=passes,
                weight=None if mask is None else _weight,
                materialize=materialize,
                custom=custom,
            )
            gathered = gradients.run(params, calls, key=key, progress=progress)
        else:
            gather = capture(
                fn,
                plan,
                stat=one,
                only=names,
                tokens=tokens,
                materialize=materialize,
            )
            gathered = gather.run(params, calls, progress=progress)
        found |= gathered.states
        seen |= gathered.witness
    evas = [slot for slot in plan.slots if starts_with_eva(slot)]
    _check_rows(evas, found)
    if evas and rho != 1:
        plan = redistribute(plan, _spectra(plan, evas, found, rho), rho=rho)
    left = [slot.name for slot in plan.slots if slot.name in found]
    states, witness = ({name: x[name] for name in left} for x in (found, seen))
    return Prepared(plan, Gathered(states, witness))


def prepared_types(plan: Plan, *, stat: Statistic | None = None) -> dict[str, Any]:
    """Shapes and dtypes of the `stats` that `prepare` would find at the plan's ranks.

    With them `jax.eval_shape` says what `init` will make, and whether it can, before
    anything is gathered.

    Args:
        plan: where the adapter acts.
        stat: as for `prepare`.

    Example:
        >>> import lorax_jax as lj
        >>> params = {"w": jnp.ones((6, 4))}
        >>> fn = lambda params, x: x @ params["w"]
        >>> config = lj.LoraConfig("w", rank=1, init="eva")
        >>> plan = lj.plan(config, params, fn, (jnp.ones(6),))
        >>> prepared_types(plan)["w"].mean
        ShapeDtypeStruct(shape=(6,), dtype=float32)
    """
    found: dict[str, Any] = {}
    for one, names in _wanted(plan, stat).items():
        if one is GradientFactors:
            gradients = capture_grad(_nothing, plan, only=names)
            found |= gradients.types()
        else:
            gather = capture(_nothing, plan, stat=one, only=names)
            found |= jax.eval_shape(gather.init).states
    return found


def _nothing(params: Any) -> None:
    del params


def _wanted(plan: Plan, instead: Statistic | None) -> dict[Any, list[str]]:
    """What is to be gathered -> names of the slots that it is for."""
    wanted: dict[Any, list[str]] = {}
    for slot in chosen(plan):
        read = {}
        for site in slot.sites:
            if site is not None:
                stat = _read(site, instead)
                if stat is not None:
                    read[stat] = site
        if len(read) > 1:
            one, other = list(read.values())[:2]
            raise CaptureError(
                f"The layers of {slot.name!r} share one statistic, and `init` = "
                f"{one.init!r} at {one.name!r} reads another than `init` = "
                f"{other.init!r} at {other.name!r}. Give all layers one that reads the "
                "same, or gather what serves both: `stat=statistics.Moments()`."
            )
        for stat in read:
            if slot.role.lookup and stat is not GradientFactors:
                raise CaptureError(
                    f"`init` = {read[stat].init!r} at {slot.name!r} reads what the "
                    "weight is multiplied by, and this table is looked up by number. "
                    f"Give it another one: targets={{{slot.name!r}: {{'init': "
                    "'kaiming'}, ...}"
                )
            wanted.setdefault(stat, []).append(slot.name)
    return wanted


def _read(site: Site, instead: Statistic | None) -> Any:
    """The statistic that a site's initializer reads, if any."""
    method = initializers.method(site.init)
    if method.reads != "stats" or method.stat is GradientFactors:
        return method.stat
    if instead is None and method.stat is None:
        raise CaptureError(
            f"`init` = {site.init!r} at {site.name!r} reads statistics and does not "
            "say which. Say it: `prepare(..., stat=statistics.Moments())`."
        )
    return method.stat if instead is None else instead


def _of_call(loss: Any) -> Callable[..., Any]:
    """The loss of a batch's arguments, which a mask is none of."""

    def of_call(params: Any, args: Any, kwargs: Any) -> Any:
        return loss(params, *args, **{k: v for k, v in kwargs.items() if k != "mask"})

    return of_call


def _weight(args: Any, kwargs: Any) -> jax.Array:
    del args
    return jnp.asarray(kwargs["mask"]).sum()


def _check_rows(slots: list[Slot], stats: dict[str, Any]) -> None:
    """Raises if rows do not span as many directions as a site wants."""
    for slot in slots:
        count = getattr(stats[slot.name], "count", None)
        if count is None:
            continue
        for name, one in by_site(slot, {"count": np.asarray(count)}).items():
            rank = next(s.rank for s in slot.sites if s is not None and s.name == name)
            fewest = int(one["count"].min())
            if fewest <= rank:  # their mean takes one
                raise CaptureError(
                    f"{fewest} rows reached {name!r}, which starts on the {rank} "
                    "directions along which they vary most: more rows than that are "
                    "needed. Give more batches, mask fewer tokens, or lower `rank` for "
                    "this site."
                )


def _spectra(
    plan: Plan, slots: list[Slot], stats: dict[str, Any], rho: float
) -> dict[str, np.ndarray]:
    """Name of a site -> explained variance of its leading directions."""
    sites = [site for slot in slots for site in slot.sites if site is not None]
    most = caps(plan, rho, (), [site.name for site in sites if site.rank])
    found = {}
    for slot in slots:
        k = max(most[site.name] for site in slot.sites if site is not None)

        def principal(state: Any, k: int = k) -> dict[str, jax.Array]:
            one = state.principal(k)
            return {"each": one.count * one.variances, "all": one.count * one.total}

        for _ in (*slot.layers, *slot.apart):
            principal = jax.vmap(principal)
        values = jax.device_get(jax.jit(principal)(stats[slot.name]))
        for name, one in by_site(slot, values).items():
            each = one["each"].astype(np.float64).sum(axis=0)
            # Rounding may leave what is zero below it, and equals out of order.
            each = np.minimum.accumulate(np.maximum(each, 0))
            found[name] = each / max(one["all"].sum(dtype=np.float64), 1e-30)
    return found
