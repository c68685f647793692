"""`capture_grad`: the leading directions of weight gradients, none of them built."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from .._errors import CaptureError, shorten
from ..adapters import as_key, stable_hash
from ..planning import Plan, Slot
from ..statistics import GradientFactors
from ..structure import wide
from ..transform import adapt
from ._batches import Batches
from ._chosen import chosen
from ._gathered import Gathered, no_witnesses
from ._gradient_state import Factors, GradientState
from ._gradient_step import step
from ._range import basis, triplets_of_columns, triplets_of_rows
from ._values import check_values


def capture_grad(
    loss: Callable[..., Any],
    plan: Plan,
    *,
    size: int | None = None,
    passes: int = 4,
    only: Iterable[str] | None = None,
    weight: Callable[..., Any] | None = None,
    loss_scale: float = 1.0,
    materialize: str | Iterable[str] = "error",
    custom: str = "error",
) -> "GradientCapture":
    r"""Finds the leading singular directions of each site's mean gradient.

    With $G = \partial\,\text{loss} / \partial W$, averaged over batches, a randomized
    decomposition needs products of $G$ with thin matrices alone, and those are
    gradients of an adapter of rank `size` that changes nothing:

    $$W + A B:\qquad A = Q, B = 0 \Rightarrow \tfrac{\partial}{\partial B} = Q^\top G,
      \qquad A = 0, B = P \Rightarrow \tfrac{\partial}{\partial A} = G P^\top .$$

    So $G$ is never built, and memory is that of training such an adapter without an
    optimizer. The first pass over the batches takes $Q$ at random; each further pass
    takes an orthonormal basis of what the pass before it found, on the other side, and
    the last one is decomposed. Two passes are the plain randomized method, and every
    two more a power iteration.

    With $\sigma_i$ the singular values of $G$, $k$ = `size` and $r$ directions wanted,
    what is lost beyond the best rank $r$ shrinks as
    $(\sigma_{k+1} / \sigma_r)^{\text{passes} - 1}$; with `size` at least
    `min(d_in, d_out)` the decomposition is exact whatever the passes. Rounding is that
    of the model: in a bfloat16 model gradients themselves are good to 1 %.

    Stacked layers, experts, convolutions, embeddings, `scan`, `remat` and parameters
    that are divided over devices need nothing: what is differentiated is an adapter.

    Args:
        loss: `loss(params, *batch)`, a number: a mean over the batch's tokens, as for
            training. A plain function; it need not know of adapters.
        plan: whose sites are looked at: all that have a rank.
        size: directions kept of each gradient, at most `min(d_in, d_out)` of the site;
            `None` is four times the site's rank, twice what LoRA-GA takes.
        passes: times that the batches are gone through, from 2 up.
        only: names of the adapted weights (`Slot.name`) to look at; `None` is all.
        weight: `weight(*batch)`, what a batch counts for, such as its number of tokens;
            `None` counts each as 1, as PEFT does.
        loss_scale: a multiplier of the loss, divided out of the gradients again, for
            models in float16 whose gradients underflow.
        materialize, custom: as for `adapt`.

    Returns:
        A `GradientCapture`: `run` does it all; `init`, `update`, `next_pass` and
        `finish` are its steps, for loops of one's own.

    Raises:
        CaptureError: if a number makes no sense, or no site has a rank.

    Example:
        >>> import lorax_jax as lj
        >>> params = {"w": jnp.ones((6, 4))}
        >>> loss = lambda params, x: (jnp.tanh(x @ params["w"]) ** 2).sum()
        >>> xs = [jax.random.normal(jax.random.key(i), (8, 6)) for i in range(3)]
        >>> plan = lj.plan(lj.LoraConfig("w", rank=1), params, loss, (xs[0],))
        >>> factors = lj.capture_grad(loss, plan).run(params, xs)
        >>> jax.tree.map(jnp.shape, factors["w"])
        GradientFactors(u=(6, 4), s=(4,), v=(4, 4))

    References:
        Wang, Yu and Li, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation",
        2024. https://arxiv.org/abs/2407.05000
        Halko, Martinsson and Tropp, "Finding Structure with Randomness", 2009.
        https://arxiv.org/abs/0909.4061
    """
    for name, number, least in (("passes", passes, 2), ("size", size, 1)):
        whole = isinstance(number, int) and not isinstance(number, bool)
        if number is not None and not (whole and number >= least):
            raise CaptureError(
                f"`{name}` = {number!r:.60}; an integer from {least} up is meant."
            )
    if not (isinstance(loss_scale, int | float) and 0 < loss_scale < float("inf")):
        raise CaptureError(
            f"`loss_scale` = {loss_scale!r:.60}; a positive number is meant."
        )
    slots = chosen(plan, only)
    if not slots:
        raise CaptureError(
            "No site of the plan has a rank, so there is no gradient to decompose. "
            "Give `LoraConfig` some `targets`."
        )
    forward = adapt(loss, materialize=materialize, custom=custom)
    return GradientCapture(
        slots, size, passes, step(slots, forward, weight, loss_scale)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class GradientCapture:
    """The steps of `capture_grad`, pure functions of a state.

    Attributes:
        slots: the weights that are looked at.
        size: directions asked for; `None` is four times the rank.
        passes: how many passes `run` makes.

    Example:
        >>> import lorax_jax as lj
        >>> params = {"w": jnp.ones((6, 4))}
        >>> loss = lambda params, x: (jnp.tanh(x @ params["w"]) ** 2).sum()
        >>> xs = [jax.random.normal(jax.random.key(i), (8, 6)) for i in range(3)]
        >>> plan = lj.plan(lj.LoraConfig("w", rank=1), params, loss, (xs[0],))
        >>> capture = lj.capture_grad(loss, plan, size=2)
        >>> state = capture.init(jax.random.key(0))
        >>> for i in range(capture.passes):
        ...     if i:
        ...         state = capture.next_pass(state)
        ...     for x in xs:
        ...         state = capture.update(state, params, x)
        >>> capture.finish(state)["w"].s.shape
        (2,)
    """

    slots: tuple[Slot, ...]
    size: int | None
    passes: int
    _update: Callable[..., GradientState] = dataclasses.field(repr=False)

    def init(self, key: PRNGKeyArray | None = None) -> GradientState:
        """The state before the first batch.

        Args:
            key: decides the random directions of the first pass, for each site by its
                path; with a pass or two behind them they hardly matter, and `None` is
                `jax.random.key(0)`.
        """
        key = jax.random.key(0) if key is None else as_key(key, "`key`")
        held = {}
        for slot in self.slots:
            (d_in, d_out), size = slot.sides, self._size(slot)
            lead, dtype = (len(slot.sites), *slot.apart), wide(slot.dtype)
            draws = [
                jnp.zeros((*slot.apart, d_in, size), dtype)
                if site is None
                else jax.random.normal(
                    jax.random.fold_in(key, stable_hash(site.name)),
                    (*slot.apart, d_in, size),
                    dtype,
                )
                for site in slot.sites
            ]
            a, b = slot.arrays(jnp.stack(draws), jnp.zeros((*lead, size, d_out), dtype))
            held[slot.name] = {"a": a, "b": b}
        return GradientState(
            held=held,
            **_pass(held),
            done=jnp.zeros((), jnp.int32),
            first=(jnp.zeros(()), jnp.zeros((), jnp.int32)),
            witness=no_witnesses(self.slots),
            mixed=jnp.zeros((), bool),
        )

    def update(self, state: GradientState, params: Any, *batch: Any) -> GradientState:
        """The state with one more batch taken in.

        Compiled once for each shape of batches; may be called inside `jit`.

        Raises:
            CaptureError: if the loss is no number, or parameters are types and not
                values.
        """
        check_values(params)
        return self._update(state, params, batch)

    def next_pass(self, state: GradientState) -> GradientState:
        """The state before the first batch of the next pass.

        Raises:
            CaptureError: if this pass saw no batch, other batches than the first one,
                or a gradient that is not finite; or if the parameters changed.
        """
        self._check(state)
        held = {}
        for slot in self.slots:
            found = state.sums[slot.name]
            a, b = slot.matrices(found["a"], found["b"])
            if _holds_a(state):
                b = basis(b.mT).mT
                a = jnp.zeros_like(a)
            else:
                a, b = basis(a), jnp.zeros_like(b)
            a, b = slot.arrays(a, b)
            held[slot.name] = {"a": a, "b": b}
        first = state.first if state.done else (state.weight, state.count)
        return dataclasses.replace(
            state, held=held, **_pass(held), done=state.done + 1, first=first
        )

    def finish(self, state: GradientState) -> Gathered:
        """The factors, of a state that has all batches of its pass.

        Returns:
            `Gathered`: name of the adapted weight -> `GradientFactors` with leading
            axes for stacked layers, experts and groups. A layer of a stack that is not
            adapted has singular values of 0.

        Raises:
            CaptureError: as `next_pass`; and after a single pass, which has found only
                one side.
        """
        self._check(state)
        if not state.done:
            raise CaptureError(
                "One pass over the batches finds one side of the gradients alone. Call "
                "`next_pass` and go through the same batches again."
            )
        factors = {}
        for slot in self.slots:
            found, held = state.sums[slot.name], state.held[slot.name]
            a, b = slot.matrices(found["a"], found["b"])
            q, p = slot.matrices(held["a"], held["b"])
            made = (
                triplets_of_rows(b / state.weight, q)
                if _holds_a(state)
                else triplets_of_columns(a / state.weight, p)
            )
            lead = (*slot.layers, *slot.apart)
            kept = 1 + len(slot.apart)
            factors[slot.name] = jax.tree.map(
                lambda x, lead=lead, kept=kept: x.reshape(*lead, *x.shape[kept:]), made
            )
        return Gathered(factors, state.witness)

    def types(self) -> dict[str, GradientFactors]:
        """Shapes and dtypes of what `finish` gives."""
        found = {}
        for slot in self.slots:
            (d_in, d_out), size = slot.sides, self._size(slot)
            shapes = (d_in, size), (size,), (size, d_out)
            lead = (*slot.layers, *slot.apart)
            arrays = [
                jax.ShapeDtypeStruct((*lead, *shape), wide(slot.dtype))
                for shape in shapes
            ]
            found[slot.name] = GradientFactors(*arrays)
        return found

    def run(
        self,
        params: Any,
        batches: Iterable[Any] | Callable[[], Iterable[Any]],
        *,
        key: PRNGKeyArray | None = None,
        limit: int | None = None,
        progress: bool = False,
        state: GradientState | None = None,
        after_pass: Callable[[GradientState], Any] | None = None,
    ) -> Gathered:
        """Goes through the batches `passes` times.

        Args:
            params: the parameter tree; never changed.
            batches: a list of batches, or a function that gives an iterator of them,
                the same each time. A batch that is a tuple is `loss`'s arguments behind
                `params`; any other is its only one.
            key: as for `init`.
            limit: how many batches are taken in each pass; `None` takes all.
            progress: whether a bar is shown.
            state: where to go on, from `init`, `update` or `next_pass`; batches that
                its pass has seen are skipped.
            after_pass: called with the state after each pass, to save it.

        Returns:
            As `finish`.

        Raises:
            CaptureError: if the batches can be gone through only once, if there are
                none, or as `update` and `next_pass`.
        """
        passing = Batches(batches, passes=self.passes, limit=limit)
        state = self.init(key) if state is None else state
        with _bar(progress, self.passes * len(passing)) as bar:
            for number in range(int(state.done), self.passes):
                if number > state.done:
                    state = self.next_pass(state)
                seen = int(state.count)
                for i, batch in enumerate(passing):
                    if i >= seen:
                        state = self.update(state, params, *batch)
                    bar.update()
                if after_pass is not None:
                    after_pass(state)
        return self.finish(state)

    def _size(self, slot: Slot) -> int:
        wanted = 4 * slot.rank if self.size is None else self.size
        return min(wanted, *slot.sides)

    def _check(self, state: GradientState) -> None:
        """Raises for what a pass cannot go on from; waits for the device."""
        if not state.count:
            raise CaptureError(
                "There is no batch in this pass: `batches` is empty, or was used up by "
                "the pass before. Give a list, or a function that starts anew."
            )
        if state.bad >= 0:
            where = self._not_finite(state)
            raise CaptureError(
                f"Batch {int(state.bad)} (counted from 0) has a loss or gradients that "
                f"are not finite. Weights with such gradients: {where}. Look for empty "
                "rows or labels that are all masked; in float16 change `loss_scale`."
            )
        if state.mixed:
            raise CaptureError(
                "The parameters changed while gradients were gathered: batches before "
                "saw another model. Begin anew, with the parameters that are to be "
                "adapted."
            )
        if not state.weight > 0:
            raise CaptureError(
                f"The weights of the batches sum to {float(state.weight):g}. `weight` "
                "must give numbers from 0 up that are not all 0."
            )
        if state.done and (
            state.first[0] != state.weight or state.first[1] != state.count
        ):
            raise CaptureError(
                f"This pass had {int(state.count)} batches of a total weight of "
                f"{float(state.weight):g}, the first one {int(state.first[1])} of "
                f"{float(state.first[0]):g}. All passes must see the same batches."
            )

    def _not_finite(self, state: GradientState) -> str:
        names = []
        for slot in self.slots:
            pair = slot.matrices(*(state.sums[slot.name][n] for n in ("a", "b")))
            fine = [jnp.isfinite(x).all(axis=range(1, x.ndim)) for x in pair]
            for site, *sides in zip(slot.sites, *fine, strict=True):
                if site is not None and not all(sides):
                    names.append(site.name)
        return shorten(names) if names else "none, the loss alone"


def _holds_a(state: GradientState) -> bool:
    """Whether A is what is held in this pass, and B's gradient what is found."""
    return int(state.done) % 2 == 0


def _pass(held: Factors) -> dict[str, Any]:
    """What a state holds of a pass that has seen no batch."""
    return {
        "sums": jax.tree.map(jnp.zeros_like, held),
        "weight": jnp.zeros(()),
        "count": jnp.zeros((), jnp.int32),
        "bad": jnp.full((), -1, jnp.int32),
    }


def _bar(progress: bool, total: int) -> Any:
    from tqdm import tqdm

    return tqdm(
        desc="gradients", total=total or None, unit="batch", disable=not progress
    )
