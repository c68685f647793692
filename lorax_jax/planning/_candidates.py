"""The paths that rules are matched against."""

import dataclasses
import itertools
from collections.abc import Iterable

from .. import _paths
from .._rule import Rule
from ..adapters import Role
from ..transform import Leaf
from ._find_role import stacks_of
from ._sites import part_indices


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A path that rules are matched against: a leaf, or a layer of a stacked one."""

    path: str
    leaf: Leaf
    index: tuple[int, ...]  # into the stacked axes
    layer: int | None


def candidates(leaf: Leaf) -> Iterable[Candidate]:
    """The leaf, or the layers of a stacked one under paths of their own."""
    stacks = stacks_of(leaf)
    role = Role(leaf.path, (), (), tuple(stacks), len(stacks))
    for index in part_indices(role, leaf.shape):
        path = leaf.path
        # From the innermost stack out, so that depths stay right as indices go in.
        for axis, i in sorted(
            zip(stacks, index, strict=True), key=lambda x: (-leaf.stacks[x[0]], -x[0])
        ):
            path = _paths.insert_index(path, leaf.stacks[axis], i)
        yield Candidate(path, leaf, index, _layer(path, index))


def _layer(path: str, index: tuple[int, ...]) -> int | None:
    """The layer's number: its index in a stack, or the first number behind a name."""
    if index:
        return index[0]
    parts = path.split("/")
    for name, part in itertools.pairwise(parts):
        if part.isdigit() and not name.isdigit():
            return int(part)
    return None


def matches(rule: Rule, candidate: Candidate) -> bool:
    """Whether a rule takes a candidate, by its own path or that of its stack."""
    return rule.matches(candidate.path) or (
        bool(candidate.index) and rule.matches(candidate.leaf.path)
    )
