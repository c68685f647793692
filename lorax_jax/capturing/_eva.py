"""`eva`: EVA's own procedure on a model."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .. import initializers
from .._errors import CaptureError
from ..planning import Plan, Slot
from ..statistics import Pca
from ._calls import Calls
from ._capture import capture
from ._gathered import Gathered, witnesses
from ._run import Call
from ._settle import EvaResult, States, settle
from ._values import check_plan, check_values


def eva(
    plan: Plan,
    params: Any,
    fn: Callable[..., Any],
    batches: Iterable[Any] | Callable[[], Iterable[Any]],
    *,
    rho: float = 2.0,
    tau: float = 0.99,
    mask: Callable[..., Any] | None = None,
    budget: int | None = None,
    adjust_scale: bool = True,
    max_batches: int = 1000,
    order: Sequence[str] = (),
    tokens: int | str = 0,
    materialize: str | Iterable[str] = "error",
    progress: bool = False,
) -> EvaResult:
    r"""Gathers principal components until they settle, and distributes ranks by them.

    The procedure is PEFT's. Every site keeps `round(rho * rank)` components. After
    each batch the ranks are distributed anew by explained variance (`redistribute`),
    and a site has settled when the cosine between each of the components that its new
    rank takes and the same one before the batch is at least `tau`. A settled site takes
    no more batches in, until a later distribution gives it components that have not
    settled. Batches are gone through again and again until all sites have settled; here
    `max_batches` is the end.

    Sites that are fed the same rows, as queries, keys and values are, settle together,
    and all may get as much as the one that may get most. They are found by the means
    and variances that the first batch gives them.

    `prepare` is the shorter way: one pass, exact covariances, no `tau`.

    Args:
        plan: whose sites that start with `init="eva"` get new ranks, with the other
            layers of their stacks. Their own ranks add up to the budget.
        params: the parameters; never changed.
        fn: the model, `fn(params, *args)`.
        batches: each a tuple of the model's arguments, a mapping of its keyword
            arguments (and `mask`), or its only argument. A list, or a function that
            gives an iterator; an iterator ends the procedure when it ends.
        rho: how many times its rank a site may get; 1 leaves ranks as they are.
        tau: cosine from which a component has settled.
        mask: gives the mask of a batch from its arguments, as for `prepare`.
        budget: sum of the new ranks; `None` takes the sum of the old ones.
        adjust_scale: whether alphas follow ranks, as in `redistribute`.
        max_batches: most batches to take in.
        order: names of sites that are served before others that share their input,
            first come first. PEFT's order is that of its modules; those that are not
            named follow in the order of `plan`.
        tokens, materialize: as for `capture`.
        progress: whether to show a bar.

    Returns:
        An `EvaResult`. The starting adapter is
        `init(result.plan, params, key=key, stats=result.states)`.

    Raises:
        CaptureError: if no site starts with `init="eva"`, there are no batches, no
            batch has as many rows for a site as it keeps components, or NaN or infinity
            is among the rows.
        PlanError: if `rho`, `budget` or a name of `order` makes no sense.

    Warns:
        CaptureWarning: if sites have not settled when `max_batches` or the batches end.

    Example:
        >>> import lorax_jax as lj
        >>> params = {"v": jnp.ones((6, 4)), "w": jnp.ones((6, 4))}
        >>> fn = lambda params, x: (x @ params["v"], x**2 @ params["w"])
        >>> xs = [jax.random.normal(jax.random.key(i), (64, 6)) for i in range(4)]
        >>> xs = [x * jnp.array([9.0, 5.0, 3.0, 1.0, 0.1, 0.1])[None] for x in xs]
        >>> config = lj.LoraConfig("[vw]", rank=2, init="eva")
        >>> plan = lj.plan(config, params, fn, (xs[0],))
        >>> found = lj.capturing.eva(plan, params, fn, xs, rho=1.5)
        >>> [(site.name, site.rank) for site in found.plan]
        [('v', 3), ('w', 1)]

    References:
        Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance
        Adaptation", 2024. https://arxiv.org/abs/2410.07170
    """
    check_values(params)
    check_plan(plan, "eva(plan, params, fn, batches)")
    calls = Calls(batches, mask)
    slots = [slot for slot in plan.slots if starts_with_eva(slot)]
    if not slots:
        raise CaptureError(
            "No site of the plan starts with EVA. Say so: "
            "`LoraConfig(targets, init='eva')`."
        )
    most = max(round(rho * slot.rank) for slot in slots)
    gather = capture(
        fn,
        plan,
        stat=Pca(max(most, 1)),
        only=[slot.name for slot in slots],
        tokens=tokens,
        materialize=materialize,
    )
    start = jax.tree.map(jnp.copy, gather.init())  # no two are one array: donated

    @functools.partial(jax.jit, donate_argnums=0)
    def take(states: States, params: Any, call: Call) -> States:
        before = dataclasses.replace(start, states=states)
        return gather(before, params, *call.args, **call.kwargs).states

    given: Any = iter(calls) if isinstance(batches, Iterator) else calls
    found = settle(
        plan,
        lambda states, call: take(states, params, call),
        start.states,
        given,
        tau=tau,
        rho=rho,
        budget=budget,
        adjust_scale=adjust_scale,
        max_batches=max_batches,
        order=order,
        progress=progress,
    )
    seen = witnesses([s for s in found.plan.slots if s.name in found.states], params)
    return dataclasses.replace(found, states=Gathered(dict(found.states), seen))


def starts_with_eva(slot: Slot) -> bool:
    """Whether a site of the slot starts with EVA."""
    return any(
        site.rank and (site.init == "eva" or isinstance(site.init, initializers.Eva))
        for site in slot.sites
        if site is not None
    )
