r"""`Part`: a box in a leaf that holds several weights.

Models fuse weights that are used together: the query, key and value projections of a
layer, or the gate beside the values of its MLP. Each of them is a box in the leaf once
the leaf is *viewed* with the right axes:

- `(in, q + k + v)`, one behind the other: the value projection is the entries from
  `q + k` on of axis 1.
- `(in, 3, heads, size)`: entry 2 of axis 1.
- `(in, kv * (g + 2) * size)`, as grouped-query attention interleaves it, where each of
  `kv` heads has `g` queries, a key and a value side by side: of axis 1 viewed as
  `(kv, g + 2, size)`, entry `g + 1` of the middle.

An adapter of a part has factors of the part's shape. In the leaf they are surrounded by
zeros: $A B$ of the part, laid into the leaf, is the product of the laid factors, since
the box is a product of ranges and each factor runs along some of them.
"""

import dataclasses
import itertools
import math
from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from ._axes import Along, Group, Reshape
from ._factor import Factor


@dataclasses.dataclass(frozen=True)
class Run:
    """The entries `start`, `start + step`, ... below `stop` of an axis.

    >>> Run(size=8, start=1, stop=6, step=2).count
    3
    """

    size: int
    start: int
    stop: int
    step: int = 1

    @property
    def count(self) -> int:
        """How many entries."""
        return len(range(self.start, self.stop, self.step))

    def lay(self, array: jax.Array, axis: int) -> jax.Array:
        """`array`, which has these entries, with zeros for all others.

        Pads, whose transposes are slices: gradients need no scatter.
        """
        if self.step > 1:
            # Each entry with the zeros behind it, as an axis of its own: a pad with
            # holes gives wrong values where XLA divides it over devices (JAX 0.10
            # to 0.12).
            array = _padded(
                jnp.expand_dims(array, axis + 1), axis + 1, 0, self.step - 1
            )
            array = jax.lax.collapse(array, axis, axis + 2)
            array = lax.slice_in_dim(
                array, 0, min(self._span, self.size - self.start), axis=axis
            )
        after = self.size - self.start - array.shape[axis]
        return _padded(array, axis, self.start, after)

    def take(self, array: jax.Array, axis: int) -> jax.Array:
        """Undoes `lay`."""
        if self.step == 1:
            return lax.slice_in_dim(array, self.start, self.stop, axis=axis)
        end = self.start + self._span
        array = _padded(array, axis, 0, max(end - self.size, 0))
        array = lax.slice_in_dim(array, self.start, end, axis=axis)
        sizes = *array.shape[:axis], self.count, self.step, *array.shape[axis + 1 :]
        return lax.index_in_dim(array.reshape(sizes), 0, axis + 1, keepdims=False)

    @property
    def _span(self) -> int:
        return self.count * self.step


def _padded(array: jax.Array, axis: int, before: int, after: int) -> jax.Array:
    config = [(0, 0, 0)] * array.ndim
    config[axis] = (before, after, 0)
    return lax.pad(array, jnp.zeros((), array.dtype), config)


@dataclasses.dataclass(frozen=True)
class Part:
    """A box in a leaf, some axes of which are viewed as several.

    Attributes:
        name: what it is called.
        axes: for each axis of the leaf, `None` where all of it belongs to the part, or
            a `Run` for each of the axes that it is viewed as, in row-major order.

    Example:
        >>> # Keys of (in, kv * (g + 2) * size) with 2 heads of 4 queries each.
        >>> runs = Run(2, 0, 2), Run(6, 4, 5), Run(16, 0, 16)
        >>> part = Part("k", (None, runs))
        >>> part.view((8, 192)), part.shape((8, 192))
        ((8, 2, 6, 16), (8, 2, 1, 16))
        >>> part.owners  # which axis of the leaf each axis of the view is of
        (0, 1, 1, 1)
    """

    name: str
    axes: tuple[tuple[Run, ...] | None, ...]

    @property
    def owners(self) -> tuple[int, ...]:
        """For each axis of the view, the leaf's axis that it is of."""
        return tuple(i for i, runs in enumerate(self.axes) for _ in runs or (None,))

    @property
    def runs(self) -> tuple[Run | None, ...]:
        """For each axis of the view, its entries; `None` for all."""
        return tuple(run for runs in self.axes for run in runs or (None,))

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a leaf of this shape can be viewed so."""
        return len(shape) == len(self.axes) and all(
            runs is None or math.prod(run.size for run in runs) == n
            for n, runs in zip(shape, self.axes, strict=True)
        )

    def view(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the view of a leaf of this shape."""
        pairs = zip(self.owners, self.runs, strict=True)
        return tuple(shape[axis] if run is None else run.size for axis, run in pairs)

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the part of a leaf of this shape, with the view's axes."""
        pairs = zip(self.owners, self.runs, strict=True)
        return tuple(shape[axis] if run is None else run.count for axis, run in pairs)

    def leaf_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of a leaf whose part has this `shape`: undoes `shape`."""
        sizes: dict[int, int] = {}
        for axis, run, n in zip(self.owners, self.runs, shape, strict=True):
            sizes[axis] = sizes.get(axis, 1) * (n if run is None else run.size)
        return tuple(sizes.values())

    def viewed(self, axes: Sequence[int]) -> tuple[int, ...]:
        """The view's axes that are of these axes of the leaf, in their order."""
        return tuple(
            i for axis in axes for i, owner in enumerate(self.owners) if owner == axis
        )

    def merged(self, axes: Sequence[int]) -> tuple[int, ...]:
        """Undoes `viewed`."""
        return tuple(dict.fromkeys(self.owners[axis] for axis in axes))

    def lay(self, factor: Factor, shape: Sequence[int]) -> Factor:
        """A factor of the part as one of the leaf: zeros around it, axes merged.

        Args:
            factor: its axes are the view's. It runs along all of the axes that an axis
                of the leaf is viewed as, or along none.
            shape: the leaf's.
        """
        for axis, run in enumerate(self.runs):
            if run is not None:
                factor = factor.apply(Along(axis, run.lay, fills=True))
        return factor.apply(self._reshape(shape))

    def take(self, factor: Factor, shape: Sequence[int]) -> Factor:
        """The part of a factor of the leaf, with the view's axes: undoes `lay`."""
        turned = self._reshape(shape).groups
        view = self.view(shape)
        groups = [Group(g.new, g.old, tuple(view[i] for i in g.old)) for g in turned]
        factor = factor.apply(Reshape(tuple(groups)))
        for axis, run in enumerate(self.runs):
            if run is not None:
                factor = factor.apply(Along(axis, run.take))
        return factor

    def overlaps(self, other: "Part", shape: Sequence[int]) -> bool:
        """Whether the two have an entry of a leaf of this shape in common."""
        return all(
            not self._entries(axis, n).isdisjoint(other._entries(axis, n))
            for axis, n in enumerate(shape)
        )

    def without(self, axes: Collection[int]) -> "Part":
        """The same part of a leaf that lacks these axes, of which it takes all."""
        kept = (runs for i, runs in enumerate(self.axes) if i not in axes)
        return Part(self.name, tuple(kept))

    def among(self, axes: Collection[int]) -> "Part":
        """Undoes `without`: the leaf has these axes beside its own."""
        own = iter(self.axes)
        count = len(self.axes) + len(axes)
        return Part(
            self.name, tuple(None if i in axes else next(own) for i in range(count))
        )

    def _reshape(self, shape: Sequence[int]) -> Reshape:
        """From the view to the leaf."""
        return Reshape(
            tuple(Group(self.viewed((i,)), (i,), (n,)) for i, n in enumerate(shape))
        )

    def _entries(self, axis: int, size: int) -> set[int]:
        """Which entries of an axis of the leaf belong to it."""
        runs = self.axes[axis]
        if runs is None:
            return set(range(size))
        ranges = (range(run.start, run.stop, run.step) for run in runs)
        sizes = [run.size for run in runs]
        steps = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
        return {
            sum(i * step for i, step in zip(index, steps, strict=True))
            for index in itertools.product(*ranges)
        }
