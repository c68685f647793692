"""`Tap`: a term that changes nothing and notes what reaches its weight."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._automatic import automatic
from .._errors import CaptureError, FollowError, TransformError, shorten
from ..adapters import Inner, Term, joins, together
from ..statistics import Statistic
from ..structure import (
    GROUP,
    Along,
    AxisOp,
    Bilinear,
    Factor,
    Label,
    Pick,
    Reshape,
    Rows,
    Scale,
    Unstructured,
    Use,
    is_factor,
)
from ..transform import Followed, Note, lay_out, meeting, take

# The axis of a context that counts the matrices of one layer.
APART = "apart"

# The number of what is none of the matrices.
NONE = jnp.iinfo(jnp.int32).max


@dataclasses.dataclass(frozen=True)
class About:
    """What a note of a tap is about.

    Attributes:
        slots: name and number of matrices of each slot that the note's index counts
            through, in order.
        statistic: what was taken.
    """

    slots: tuple[tuple[str, int], ...]
    statistic: Statistic

    @property
    def names(self) -> str:
        """The slots, for messages."""
        return shorten([repr(name) for name, _ in self.slots])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tap(Term):
    """Takes a statistic of the rows that its weight is multiplied by.

    The weight may be sliced, scanned over or transposed before it is used, so the tap
    carries what tells where in the leaf a piece of it comes from: numbers of layers and
    of experts, cut as the weight is.

    Attributes:
        layer: number of the layer, along the stacked axes.
        expert: number of the expert, along the other batch axes; `NONE` for those that
            are not adapted.
        entry: number of the entry of a row, along the `in` axes.
        entries: which entries of a row are taken, of a part of a leaf; `None` is all.
        output: marks the weight's `out` axes.
        base: what is added to the number of a matrix, along the stacked axes.
        context: what the statistic needs to know of its state, a pytree of factors
            along the stacked axes, `APART` and axes of their own.
        mask: the weight of each token, or `None` where all count.
        about: what the notes are about.
        size: how many entries a row has before some are taken.
        apart: matrices in one layer: experts times groups.
        groups: groups of outputs, each with a matrix of its own.
        chosen: whether tokens choose their experts, so that `expert` runs along tokens.
        tokens: which axes of each operand run along the tokens, where there is a mask.
        moved: whether the entries changed their order on the way.
        use: as in `LowRank`.
    """

    layer: Factor
    expert: Factor
    entry: Factor
    entries: Factor | None
    output: Factor
    base: Factor
    context: Any
    mask: Factor | None
    about: About = dataclasses.field(metadata={"static": True})
    size: int = dataclasses.field(metadata={"static": True})
    apart: int = dataclasses.field(default=1, metadata={"static": True})
    groups: int = dataclasses.field(default=1, metadata={"static": True})
    chosen: bool = dataclasses.field(default=False, metadata={"static": True})
    moved: bool = dataclasses.field(default=False, metadata={"static": True})
    tokens: Followed | None = dataclasses.field(default=None, metadata={"static": True})
    use: Use | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def inputs(self) -> tuple[Label, ...]:
        """The weight's `in` axes, in the order of the rows' entries."""
        return self.entry.axes

    def act(self, x: jax.Array, op: Bilinear, inner: Inner) -> jax.Array:
        note = automatic(lambda x, tap: tap._note(op.as_rows(x)), x, self)
        # Devices that see the same rows count them once.
        index = note.index
        for axis in sorted(meeting().repeats()):
            index = jnp.where(lax.axis_index(axis) == 0, index, NONE)
        take(dataclasses.replace(note, index=index))
        return inner(x)

    def dense(self, weight: jax.Array) -> jax.Array:
        raise TransformError(
            f"A dense weight would be built of {self.about.names}, and what it is "
            "multiplied by could not be seen. Leave it out of the plan, or gather "
            "without `materialize`."
        )

    def looks_up(self, axis: int) -> bool:
        # The head of a tied table: what is looked up are its outputs.
        return self.use == "head" and self.output.holds(axis)

    def rescale(self, op: Scale) -> "Tap":
        if any(axis in self.inputs for axis in op.axes):
            raise Unstructured("the weight's inputs are rescaled before they are used")
        return self

    def apply(self, op: AxisOp) -> "Tap":
        if isinstance(op, Scale):
            return self.rescale(op)
        if isinstance(op, Along) and op.fills and not self.output.holds(op.axis):
            raise Unstructured("layers or inputs are padded, with what is none of them")
        chosen = self.chosen
        if isinstance(op, Pick) and op.ids:
            if any(self.layer.holds(axis) for axis in op.axes):
                raise Unstructured("every token has a layer of its own")
            chosen |= any(self.expert.holds(axis) for axis in op.axes)

        def follow(factor: Factor) -> Factor:
            return factor.apply(op)

        along = isinstance(op, Along) and self.entry.holds(op.axis)
        entry = _followed(self.entry, op)
        return dataclasses.replace(
            self,
            layer=follow(self.layer),
            base=follow(self.base),
            output=follow(self.output),
            expert=follow(self.expert),
            entry=entry,
            context=jax.tree.map(follow, self.context, is_leaf=is_factor),
            chosen=chosen,
            moved=self.moved or along,
        )

    def _note(self, rows: Rows) -> Note:
        if not set(self.inputs) <= set(rows.labels):
            raise Unstructured("the product sums over what are outputs elsewhere")
        weights = self._weights(rows)
        if rows.member is not None or self.chosen:
            return self._by_member(rows, weights)
        axes: tuple[Label, ...] = (*self.layer.axes, *self.expert.axes, GROUP)
        present = tuple(axis for axis in axes if axis in rows.labels)
        axes = (*present, *(axis for axis in axes if axis not in present))
        array = self._arranged(rows, present)
        group = Factor(jnp.arange(self.groups, dtype=jnp.int32), (GROUP,))
        expert = self.expert.aligned(axes)
        within = jnp.where(expert == NONE, 0, expert * self.groups) + group.aligned(
            axes
        )
        number = self.layer.aligned(axes) * self.apart + within
        number = number + self.base.aligned(axes)
        number = jnp.where(expert == NONE, NONE, number)
        # Matrices that see the same rows are counted by the second axis.
        number = number.reshape(array.shape[0], -1)
        here = jnp.arange(self.layer.array.size).reshape(self.layer.array.shape)
        here = Factor(here, self.layer.axes).aligned(axes) + 0 * within
        at = here.reshape(number.shape), (within + 0 * here).reshape(number.shape)
        context = jax.tree.map(lambda leaf: leaf[at], self._contexts())
        observe, several = self.about.statistic.observe, number.shape[1]
        same = jax.vmap(observe, in_axes=(None, None, 0), axis_size=several)
        values = jax.vmap(same, in_axes=(0, None if weights is None else 0, 0))(
            array, weights, context
        )
        return Note(self.about, number, values)

    def _by_member(self, rows: Rows, weights: jax.Array | None) -> Note:
        """Rows that each belong to one expert. The experts are gone through in turn."""
        if self.layer.axes:
            raise Unstructured("rows of several layers' experts come at once")
        if self.groups > 1 or (not self.chosen and self.expert.axes != (rows.group,)):
            raise Unstructured("experts are counted by several axes at once")
        if rows.member is None:
            experts = jnp.arange(self.apart, dtype=jnp.int32)
            member = rows.numbers(self.expert.array, self.expert.axes, self.inputs)
        else:
            experts = self.expert.array
            assert rows.counted is not None
            member = rows.numbers(rows.member, (rows.counted,), self.inputs)
        array = self._arranged(rows, ())[0]
        base = jnp.ones(array.shape[0]) if weights is None else weights[0]
        contexts = jax.tree.map(
            lambda leaf: leaf[0].at[experts].get(mode="clip"), self._contexts()
        )

        def one(expert):
            i, context = expert
            times = (member == i).sum(-1).astype(jnp.float32)
            return self.about.statistic.observe(array, base * times, context)

        values = jax.lax.map(one, (jnp.arange(experts.size), contexts))
        number = self.base.array + self.layer.array * self.apart + experts
        return Note(self.about, jnp.where(experts == NONE, NONE, number), values)

    def _arranged(self, rows: Rows, parallel: tuple[Label, ...]) -> jax.Array:
        """The rows of each matrix: shape `(parallel, rows, entries)`."""
        array = rows.arranged(parallel, self.inputs)
        if array.shape[-1] != self.size:
            raise Unstructured("the weight's inputs are split over devices")
        if self.moved:
            at = self.entry.array.reshape(-1)
            array = jnp.zeros_like(array).at[..., at].add(array)
        return array if self.entries is None else array[..., self.entries.array]

    def _contexts(self) -> Any:
        """What each matrix needs to know: leaves `(layers, apart, ...)`."""

        def laid(factor: Factor) -> jax.Array:
            own = [x for x in factor.axes if isinstance(x, str) and x != APART]
            array = factor.aligned((*self.layer.axes, APART, *own))
            return array.reshape(-1, self.apart, *array.shape[array.ndim - len(own) :])

        return jax.tree.map(laid, self.context, is_leaf=is_factor)

    def _weights(self, rows: Rows) -> jax.Array | None:
        """The mask, laid out as the rows are: shape `(parallel, rows)`."""
        if self.mask is None or self.tokens is None:
            return None
        if not rows.plain:
            raise Unstructured(
                "rows are not the tokens of a mask here: they are patches of an image, "
                "or sorted by expert"
            )
        where, labels = meeting(), rows.labels
        free = [i for i, label in enumerate(labels) if label not in self.inputs]
        try:
            followed = self.tokens.axes(where.eqn, where.operand, among=free)
            sizes = [rows.array.shape[i] for i in free]
            laid = lay_out(self.mask.array, followed, sizes)
        except FollowError as error:
            raise CaptureError(
                f"`mask` cannot be followed to what reaches {self.about.names}: {error}"
                "\nGather without a mask, or leave these weights out of the plan."
            ) from None
        inputs = [i for i in range(len(labels)) if i not in free]
        axes = (*self.layer.axes, *(() if self.chosen else self.expert.axes))
        present = tuple(axis for axis in axes if axis in labels)
        laid = rows.laid(jnp.expand_dims(laid, inputs), present, self.inputs)
        return laid[..., 0].astype(jnp.float32)


def _followed(entry: Factor, op: AxisOp) -> Factor:
    """The numbers of entries after an operation: all of them, in whatever order."""
    if isinstance(op, Pick) and any(map(entry.holds, op.axes)):
        raise Unstructured("some of the weight's inputs are picked")
    if isinstance(op, Reshape):
        for group in op.groups:
            held = tuple(axis for axis in entry.axes if axis in group.old)
            if held and held != group.old:
                raise Unstructured("a reshape changes the order of the weight's inputs")
    found = entry.apply(op)
    fills = isinstance(op, Along) and op.fills and entry.holds(op.axis)
    if fills or found.array.size != entry.array.size:
        raise Unstructured("a part of the weight's inputs is taken, or others beside")
    return found


@joins.register
def _join(first: Tap, row: Any, axis: int, sizes: Any, combine: Any) -> Tap:
    """The taps of layers that a model stacks before it uses them."""
    taps = [tap for tap in row if isinstance(tap, Tap)]
    if len(taps) < len(row):
        raise Unstructured("weights of which some have no statistic are put together")
    if any(tap.layer.holds(axis) or tap.expert.holds(axis) for tap in taps):
        raise Unstructured("layers or experts of several leaves make one axis")
    static = {dataclasses.replace(tap.about, slots=()) for tap in taps}
    alike = {(t.entry.axes, t.size, t.apart, t.groups, t.chosen, t.use) for t in taps}
    if len(static) > 1 or len(alike) > 1 or any(t.entries is not None for t in taps):
        raise Unstructured("weights whose statistics differ in form are put together")
    slots: list[tuple[str, int]] = []
    based = []
    for tap in taps:
        count = sum(n for _, n in slots)
        based.append(Factor(tap.base.array + count, tap.base.axes))
        slots += tap.about.slots

    def joined(factors: list[Factor]) -> Factor:
        return together(factors, axis, sizes, combine)

    contexts = [jax.tree.leaves(tap.context, is_leaf=is_factor) for tap in taps]
    leaves = [joined(list(each)) for each in zip(*contexts, strict=True)]
    structure = jax.tree.structure(first.context, is_leaf=is_factor)
    return dataclasses.replace(
        first,
        layer=joined([tap.layer for tap in taps]),
        base=joined(based),
        context=jax.tree.unflatten(structure, leaves),
        about=dataclasses.replace(first.about, slots=tuple(slots)),
    )
