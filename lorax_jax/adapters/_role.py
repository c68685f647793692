"""`Adapter`: what moves, what must not, and the roles of the weights' axes."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from ..structure import Factor, Part, Use


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
        part: the part of the leaf that is adapted, or `None` for all of it. Then all
            axes above are those of its view, and sizes are those of the part.
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
    part: Part | None = None

    @property
    def name(self) -> str:
        """The key of the adapted weight in `Adapter.train` and `Adapter.fixed`."""
        return named(self.path, self.suffix)

    @property
    def suffix(self) -> str | None:
        """What tells it from other sites on the same leaf, if anything does."""
        if self.part is not None:
            return self.part.name
        return "rows" if self.kind == "rows" else self.use

    @property
    def leaf(self) -> "Role":
        """The roles of the leaf's own axes."""
        part = self.part
        if part is None:
            return self
        return dataclasses.replace(
            self,
            inputs=part.merged(self.inputs),
            outputs=part.merged(self.outputs),
            batch=part.merged(self.batch),
            part=None,
        )

    def of_part(self, part: Part) -> "Role":
        """The roles in a part of a leaf, of which these are the roles: undoes `leaf`.

        The part takes all layers of the stacked axes.
        """
        return dataclasses.replace(
            self,
            inputs=part.viewed(self.inputs),
            outputs=part.viewed(self.outputs),
            batch=part.viewed(self.batch),
            part=part,
        )

    @property
    def stacked(self) -> tuple[int, ...]:
        """The batch axes that are stacks of layers."""
        return self.batch[: self.stack]

    @property
    def grouped(self) -> tuple[int, ...]:
        """The size of A's axis of groups, or nothing."""
        return (self.groups,) if self.groups > 1 else ()

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of what is adapted of a leaf of this `shape`."""
        return tuple(shape) if self.part is None else self.part.shape(shape)

    def layer_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The same of a single layer of a stack."""
        sizes = enumerate(self.shape(shape))
        return tuple(n for axis, n in sizes if axis not in self.stacked)

    def sizes(self, shape: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
        """Sizes of some axes of what is adapted of a leaf of this `shape`."""
        own = self.shape(shape)
        return tuple(own[axis] for axis in axes)

    def lay(self, factor: Factor, shape: Sequence[int]) -> Factor:
        """A factor of what is adapted as one of the leaf of this `shape`."""
        return factor if self.part is None else self.part.lay(factor, shape)

    def shapes(
        self, shape: Sequence[int], rank: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of `a` and `b` of a leaf of this `shape`.

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


def named(path: str, suffix: str | None) -> str:
    """A path, and what tells a site from others there.

    >>> named("h/0/qkv", "q"), named("h/0/qkv", None)
    ('h/0/qkv@q', 'h/0/qkv')
    """
    return f"{path}@{suffix}" if suffix else path


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
