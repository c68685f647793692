"""The shapes that would give a dense matrix away."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from .. import _paths
from ..adapters import Adapter, Role, is_weight
from ..transform import Visit


def key(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape whichever way it lies: its sizes in order, without those that are 1."""
    return tuple(sorted(n for n in shape if n != 1))


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of a model, by `key` of their shapes.

    A stacked weight is there whole and as one layer, an expert weight as one expert,
    and a kernel of several axes also as a matrix.

    Attributes:
        sites: for each adapted weight, its keys.
        every: for each key of any weight, adapted or not, the weight's path.
        factors: the keys of the adapter's factors, of one layer and of all.
    """

    sites: dict[str, frozenset[tuple[int, ...]]]
    every: dict[tuple[int, ...], str]
    factors: frozenset[tuple[int, ...]]

    def is_thin(self, visit: Visit, shape: Sequence[int]) -> bool:
        """Whether a value is a factor, or the gradient of one, inside an adapter."""
        inside = "lora_down" in visit.scopes or "lora_up" in visit.scopes
        return inside and key(shape) in self.factors


def weights(params: Any, adapter: Adapter) -> Weights:
    """Collects the shapes of all weights with at least two axes."""
    leaves = {p: x for p, x in _paths.flatten(params, is_leaf=is_weight)[0]}
    shapes = {p: tuple(x.shape) for p, x in leaves.items() if hasattr(x, "shape")}
    sites, factors = {}, set()
    for name, fixed in adapter.fixed.items():
        role, shape = fixed.role, shapes[fixed.role.path]
        if role.kind == "whole":  # its gradient is wanted, and it has no factors
            continue
        forms = [shape]
        held = [array.shape for array in adapter.train[name].values()]
        if "rank" in fixed:
            a = {**fixed, **adapter.train[name]}["a"]
            rank = a.shape[-1] * (2 if "a0" in fixed else 1)
            held += [*role.shapes(shape, a.shape[-1]), *role.shapes(shape, rank)]
            if role.part is not None:
                held += role.leaf.shapes(shape, rank)
        if role.part is not None:  # the leaf is given away by more than the part
            forms += _forms(role.leaf, shape)
        forms += _forms(role, shape)
        sites[name] = frozenset(k for k in map(key, forms) if len(k) > 1)
        for sizes in held:
            for batch in (0, len(role.stacked), len(role.batch)):
                factors.add(key(sizes[batch:]))
    every: dict[tuple[int, ...], str] = {}
    roles = [fixed.role for fixed in adapter.fixed.values()]
    whole = {role.path for role in roles if role.kind == "whole"}
    for path, shape in shapes.items():
        if path in whole:
            continue
        # Of a weight that nobody adapts, no one says which axis is a stack: the first.
        for form in (shape, shape[1:] if len(shape) > 2 else shape):
            if len(key(form)) > 1:
                every.setdefault(key(form), path)
    for name, keys in sites.items():
        every |= {k: name for k in keys}
    return Weights(sites, every, frozenset(factors))


def _forms(role: Role, shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Shapes that give a leaf of this `shape` away: without batch axes, as matrices."""
    for dropped in (role.stacked, role.batch):
        rest = (n for axis, n in enumerate(role.shape(shape)) if axis not in dropped)
        batch = [axis for axis in role.batch if axis not in dropped]
        sides = (
            math.prod(role.sizes(shape, side)) for side in (role.inputs, role.outputs)
        )
        yield tuple(rest)
        yield (*role.sizes(shape, batch), *sides)
