"""`Adapter`: what moves, what must not, and the roles of the weights' axes."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from ..structure import Use


@dataclasses.dataclass(frozen=True)
class Role:
    """What the axes of one weight are to the model, and which use is adapted.

    The only static data of an adapter. It holds no shapes, ranks or scales: those are
    arrays, so that adapters which differ in them share a compiled program.

    Attributes:
        path: the leaf's path in the parameter tree.
        inputs: axes that a product sums over; A runs along them.
        outputs: axes that a product makes; B runs along them.
        batch: axes with factors of their own for each index, stacks first.
        stack: how many of the batch axes are stacks of layers.
        lookup: whether the weight is an embedding table, looked up along `inputs`.
        use: the only use of a tied weight that is adapted, or `None`.
        groups: in how many runs the outputs see inputs of their own, as in grouped
            convolutions; each run has an A and a B.
        kind: what the adapter keeps for the weight: a name in `KINDS`.
    """

    path: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    batch: tuple[int, ...] = ()
    stack: int = 0
    lookup: bool = False
    use: Use | None = None
    groups: int = 1
    kind: str = "lora"

    @property
    def name(self) -> str:
        """The key of the adapted weight in `Adapter.train` and `Adapter.fixed`."""
        suffix = "rows" if self.kind == "rows" else self.use
        return f"{self.path}@{suffix}" if suffix else self.path

    @property
    def stacked(self) -> tuple[int, ...]:
        """The batch axes that are stacks of layers."""
        return self.batch[: self.stack]

    @property
    def grouped(self) -> tuple[int, ...]:
        """The size of A's axis of groups, or nothing."""
        return (self.groups,) if self.groups > 1 else ()

    def sizes(self, shape: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
        """Sizes of some axes of a weight of this `shape`."""
        return tuple(shape[axis] for axis in axes)

    def shapes(
        self, shape: Sequence[int], rank: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of `a` and `b` of a weight of this `shape`.

        >>> Role("w", inputs=(1,), outputs=(2,), batch=(0,)).shapes((3, 8, 6), 2)
        ((3, 8, 2), (3, 2, 6))
        >>> Role("w", inputs=(0, 1), outputs=(2,), groups=3).shapes((5, 4, 6), 2)
        ((5, 4, 3, 2), (2, 6))
        """
        batch = self.sizes(shape, self.batch)
        inputs, outputs = (
            self.sizes(shape, self.inputs),
            self.sizes(shape, self.outputs),
        )
        return (*batch, *inputs, *self.grouped, rank), (*batch, rank, *outputs)


@jax.tree_util.register_pytree_with_keys_class
class Fixed(Mapping[str, Any]):
    """The arrays of one adapted weight that must not move, and its `Role`.

    Args:
        role: the roles of the weight's axes.
        values: `scale` and `rank` (over the stacked axes), and what the kind of
            adapter keeps beside them.
    """

    def __init__(self, role: Role, values: Mapping[str, Any]):
        self.role = role
        self.values_ = dict(values)

    def tree_flatten_with_keys(self):
        names = tuple(sorted(self.values_))
        keyed = ((jax.tree_util.DictKey(n), self.values_[n]) for n in names)
        return tuple(keyed), (self.role, names)

    @classmethod
    def tree_unflatten(cls, static, children):
        role, names = static
        fixed = object.__new__(cls)
        fixed.role = role
        fixed.values_ = dict(zip(names, children, strict=True))
        return fixed

    def __getitem__(self, name: str) -> Any:
        return self.values_[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)

    def __repr__(self):
        return f"Fixed({self.role.name!r}, {self.values_})"


class Adapter(NamedTuple):
    """An adapter: what moves, and what must not.

    Both are flat dictionaries by name of the adapted weight, so any Optax
    transformation is right on `train` as it is: no mask, no labels, no frozen leaves.

    Attributes:
        train: name -> `{"a": ..., "b": ...}`, floating arrays that an optimizer moves.
        fixed: name -> `Fixed`: scale, true ranks, starting factors, and the static
            `Role`.
    """

    train: dict[str, dict[str, jax.Array]]
    fixed: dict[str, Fixed]
