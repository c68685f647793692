"""`Factor`: an array whose axes are tied to axes of the weight it belongs to."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._axes import (
    RANK,
    Along,
    AxisOp,
    Broadcast,
    Cast,
    Group,
    Label,
    Pick,
    Place,
    Reshape,
    Scale,
    Transpose,
    Unstructured,
)


@jax.tree_util.register_pytree_with_keys_class
class Factor:
    """An array and, for each of its axes, the weight's axis that it runs along.

    A low-rank term of a weight with axes `(layer, in, out)` holds
    `a = Factor((L, in, r), axes=(0, 1, RANK))` and
    `b = Factor((L, r, out), axes=(0, RANK, 2))`. When the model transposes the weight,
    only the labels change; when it slices axis 1, only `a` is sliced.

    The labels are static; the array may be anything that JAX puts at a leaf.

    Args:
        array: the values.
        axes: for each axis of `array`, the weight's axis (an integer), or a name such
            as `RANK` for an axis that the weight does not have.

    Example:
        >>> a = Factor(jnp.ones((3, 2)), (0, "rank"))
        >>> a.apply(Transpose((1, 0))).axes
        (1, 'rank')
    """

    __slots__ = ("array", "axes")

    def __init__(self, array: Any, axes: tuple[Label, ...]):
        self.array = array
        self.axes = axes

    def tree_flatten_with_keys(self):
        return ((jax.tree_util.GetAttrKey("array"), self.array),), self.axes

    @classmethod
    def tree_unflatten(cls, axes, children):
        # Nothing is checked here: JAX unflattens with placeholders of every kind.
        return cls(children[0], axes)

    def __repr__(self):
        kind = getattr(self.array, "aval", None) or type(self.array).__name__
        return f"Factor({kind}, axes={self.axes})"

    def holds(self, axis: Label) -> bool:
        """Whether the factor varies along the weight's `axis`."""
        return axis in self.axes

    def astype(self, dtype: Any) -> "Factor":
        """The factor with its values in another dtype."""
        return Factor(self.array.astype(dtype), self.axes)

    def apply(self, op: AxisOp) -> "Factor":
        """The factor of the weight that `op` makes of this factor's weight."""
        match op:
            case Cast() | Scale():
                return self
            case Transpose(permutation):
                return self._relabel({old: new for new, old in enumerate(permutation)})
            case Along(axis, map):
                if not self.holds(axis):
                    return self  # where zeros must be filled in, its owner refuses
                return Factor(map(self.array, self.axes.index(axis)), self.axes)
            case Pick():
                return self._pick(op)
            case Place(map):
                return Factor(map(self.array, self.axes), self.axes)
            case Broadcast(positions, shape):
                return self._broadcast(positions, shape)
            case Reshape(groups):
                return self._reshape(groups)
        raise TypeError(op)

    def shift(self, offset: int) -> "Factor":
        """Renumbers the weight's axes, as when its leading axis comes or goes."""
        return Factor(
            self.array,
            tuple(x + offset if isinstance(x, int) else x for x in self.axes),
        )

    def aligned(self, axes: Sequence[Hashable]) -> jax.Array:
        """The values with one axis for each of `axes`, of size 1 where not held.

        >>> Factor(jnp.ones(3), (0,)).aligned((0, "rank", 1)).shape
        (3, 1, 1)
        """
        return align(self.array, self.axes, axes)

    def filled(self, axes: tuple[Label, ...], sizes: Mapping[Any, int]) -> jax.Array:
        """The values with one axis for each of `axes`, repeated where not held.

        >>> Factor(jnp.ones(3), (0,)).filled((0, 1), {1: 4}).shape
        (3, 4)
        """
        array = self.aligned(axes)
        shape = tuple(
            array.shape[i] if self.holds(axis) else sizes[axis]
            for i, axis in enumerate(axes)
        )
        return jnp.broadcast_to(array, shape)

    def _relabel(self, names: dict[Any, int]) -> "Factor":
        return Factor(self.array, tuple(names.get(x, x) for x in self.axes))

    def _broadcast(self, positions, shape) -> "Factor":
        factor = self
        for old, new in enumerate(positions):
            if factor.holds(old):
                at = factor.axes.index(old)
                if factor.array.shape[at] == 1 != shape[new]:
                    # A stretched axis of size 1: the factor is constant along it.
                    factor = Factor(
                        jax.lax.squeeze(factor.array, (at,)),
                        factor.axes[:at] + factor.axes[at + 1 :],
                    )
        return factor._relabel(dict(enumerate(positions)))

    def _pick(self, op: Pick) -> "Factor":
        held = [axis for axis in op.axes if self.holds(axis)]
        names: dict[Any, int] = dict(op.kept)
        if not held:
            return self._relabel(names)
        if len(held) < len(op.axes) and self.holds(RANK):
            # W[i_t, j_t] = sum_r A[i_t, r] B[r, j_t] needs r numbers for each t.
            raise Unstructured(
                f"the indices run over axes {op.axes} together, of which a factor "
                f"holds only {tuple(held)}"
            )
        at = [self.axes.index(axis) for axis in held]
        array = op.map(self.array, at, [op.axes.index(axis) for axis in held])
        rest = (names.get(x, x) for x in self.axes if x not in held)
        ones = [new for old, new in op.ones if old in held]
        array = jnp.expand_dims(array, tuple(range(len(ones)))) if ones else array
        return Factor(array, (*ones, *op.ids, *rest))

    def _reshape(self, groups: tuple[Group, ...]) -> "Factor":
        shape: list[int] = []
        axes: list[Label] = []
        order: list[int] = []
        grouped = {axis: group for group in groups for axis in group.old}
        done: set[int] = set()
        for at, label in enumerate(self.axes):
            if label in done:
                continue
            if not isinstance(label, int):
                order.append(at)
                axes.append(label)
                shape.append(self.array.shape[at])
            elif label in grouped:
                group = grouped[label]
                held = [axis for axis in group.old if self.holds(axis)]
                if tuple(held) != group.old:
                    raise Unstructured(
                        f"a reshape merges axes {group.old}, of which a factor holds "
                        f"only {tuple(held)}"
                    )
                order += [self.axes.index(axis) for axis in group.old]
                axes += group.new
                shape += group.sizes
                done.update(group.old)
            # else: an axis of size 1 that the reshape drops.
        array = self.array
        order += [i for i in range(array.ndim) if i not in order]  # of size 1
        if order != sorted(order):
            array = jnp.transpose(array, order)
        return Factor(jnp.reshape(array, shape), tuple(axes))


def align(
    array: jax.Array, labels: Sequence[Hashable], wanted: Sequence[Hashable]
) -> jax.Array:
    """A labelled array with one axis for each of `wanted`, of size 1 where it has none.

    >>> align(jnp.ones((3, 2)), ("a", "b"), ("b", "c", "a")).shape
    (2, 1, 3)
    """
    if not labels:
        return array  # a scalar broadcasts as it is
    order = [labels.index(x) for x in wanted if x in labels]
    assert len(order) == len(labels), (labels, wanted)
    if order != sorted(order):
        array = jnp.transpose(array, order)
    missing = tuple(i for i, x in enumerate(wanted) if x not in labels)
    return jnp.expand_dims(array, missing) if missing else array


def is_factor(node: Any) -> bool:
    """Whether `node` is a `Factor`; the `is_leaf` of maps over factors."""
    return isinstance(node, Factor)
