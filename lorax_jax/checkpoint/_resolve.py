"""Finding a file's sites among the parameters."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .. import _paths
from .._errors import CheckpointError
from ..adapters import Role, is_weight
from ..planning import Plan, Slot
from ._file_site import FileSite, Part
from ._kernels import part_in
from ._placed import Placed

# Stacks within stacks, and numbers in a path. Which of the numbers are layers is tried
# out, so a file may not have endless ones.
_MOST_STACKS = 3
_MOST_NUMBERS = 12


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a single layer's path leads in a parameter tree.

    Attributes:
        leaf: the path of the leaf.
        stack: its axes that count layers; none in an unrolled tree.
        index: the layer, one number for each of them.
    """

    leaf: str
    stack: tuple[int, ...]
    index: tuple[int, ...]


class Tree:
    """The parameters by path, answering to the paths of single layers.

    Args:
        params: the parameter tree, or its types.
    """

    def __init__(self, params: Any):
        self.leaves = {
            path: leaf
            for path, leaf in _paths.flatten(params, is_leaf=is_weight)[0]
            if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
        }

    def find(
        self, path: str, axes: int = 2, stack: Sequence[int] | None = None
    ) -> Place | None:
        """Where `path` leads.

        A path that no leaf has may be that of one layer of a stack: a leaf whose path
        lacks the layer's number and that has an axis more, the first one.

        Args:
            path: the path of a leaf, or of a layer.
            axes: how many axes a single layer's weight has.
            stack: which axes of a stacked leaf count layers, if not the first.

        Raises:
            CheckpointError: if several leaves might be meant.
        """
        leaf = self.leaves.get(path)
        if leaf is not None:
            return Place(path, (), ()) if len(leaf.shape) == axes else None
        parts = path.split("/")
        numbers = [i for i, part in enumerate(parts) if is_index(part)]
        if len(numbers) > _MOST_NUMBERS:
            return None
        for count in range(1, min(len(numbers), _MOST_STACKS) + 1):
            if stack is not None and len(stack) != count:
                continue
            found = []
            for cut in itertools.combinations(numbers, count):
                name = "/".join(p for i, p in enumerate(parts) if i not in cut)
                index = tuple(int(parts[i]) for i in cut)
                where = tuple(range(count)) if stack is None else tuple(stack)
                if self._holds(name, axes, where, index):
                    found.append(Place(name, where, index))
            if len(found) > 1:
                raise CheckpointError(
                    f"{path!r} may be a layer of {found[0].leaf!r} or of "
                    f"{found[1].leaf!r}. Give the `plan`, which says."
                )
            if found:
                return found[0]
        return None

    def _holds(
        self, name: str, axes: int, stack: Sequence[int], index: Sequence[int]
    ) -> bool:
        leaf = self.leaves.get(name)
        if leaf is None or len(leaf.shape) != axes + len(stack):
            return False
        inside = [i < leaf.shape[axis] for i, axis in zip(index, stack, strict=True)]
        return all(inside)

    def knows(self, path: str) -> bool:
        """Whether `path` leads to a weight: to more than a vector."""
        return any(self.find(path, axes) is not None for axes in range(2, 6))

    def layers(self) -> int:
        """At least as many as the tree can have layers."""
        counts = [1]
        for path, leaf in self.leaves.items():
            counts += [int(p) + 1 for p in path.split("/") if is_index(p)]
            counts += leaf.shape[:1] if len(leaf.shape) > 2 else ()
        return min(max(counts), 4096)


def is_index(part: str) -> bool:
    """Whether a component of a path is a layer's index, as a path writes it.

    >>> is_index("10"), is_index("010"), is_index("q")
    (True, False, False)
    """
    return re.fullmatch("0|[1-9][0-9]{0,8}", part) is not None


def place_by_plan(plan: Plan, sites: Iterable[FileSite]) -> dict[FileSite, Placed]:
    """Each site's place in a plan; sites that the plan does not have are left out."""
    where = {
        (site.path, site.role.suffix): (slot, i)
        for slot in plan.slots
        for i, site in enumerate(slot.sites)
        if site is not None
    }
    return {
        site: Placed(site, *where[site.name]) for site in sites if site.name in where
    }


def place_by_path(tree: Tree, sites: Iterable[FileSite]) -> dict[FileSite, Placed]:
    """Each site's place among the parameters; those without one are left out.

    Raises:
        CheckpointError: if a place is found and the roles of its axes are not known.
    """
    found: dict[FileSite, tuple[Place, Role]] = {}
    for site in sites:
        part = site.part or Part((), (0,), (1,), (), site.table)
        if site.part is None and (site.use == "head" or site.turned):
            part = Part((), (1,), (0,))
        if site.part is None and site.order is not None:
            part = part_in(site.order)
        axes = len(part.inputs) + len(part.outputs) + len(part.batch)
        axes = axes if part.view is None else len(part.view)
        place = tree.find(site.path, axes, part.stack)
        if place is None:
            _check_known(tree, site)
            continue
        found[site] = place, _role(place, part, site)
    slots: dict[str, Slot] = {}
    placed: dict[FileSite, Placed] = {}
    for site, (place, role) in found.items():
        leaf = tree.leaves[place.leaf]
        shape = tuple(leaf.shape)
        new = Slot(
            role, shape, leaf.dtype, (), bias=site.bias, ids=tuple(sorted(site.ids))
        )
        slot = slots.setdefault(role.name, new)
        if slot != new:
            raise CheckpointError(
                f"The layers of {place.leaf!r} are said to have different axes: "
                f"{slot.role} and {role}. The file was changed or damaged."
            )
        index = 0
        for n, i in zip(slot.layers, place.index, strict=True):
            index = index * n + i
        placed[site] = Placed(site, slot, index)
    return placed


def _role(place: Place, part: Part, site: FileSite) -> Role:
    total = len(place.stack) + len(part.inputs) + len(part.outputs) + len(part.batch)
    box = None if part.box is None else part.box.among(place.stack)
    stack = place.stack if box is None else box.viewed(place.stack)
    kept = [axis for axis in range(total) if axis not in stack]

    def whole(axes: Iterable[int]) -> tuple[int, ...]:
        return tuple(kept[axis] for axis in axes)

    return Role(
        path=place.leaf,
        inputs=whole(part.inputs),
        outputs=whole(part.outputs),
        batch=(*stack, *whole(part.batch)),
        stack=len(place.stack),
        lookup=part.lookup,
        use=site.use,
        kind=site.kind,
        groups=part.groups or 1,
        part=box,
    )


def _check_known(tree: Tree, site: FileSite) -> None:
    """A name table says which tensor a leaf is, not what more than two axes mean."""
    if site.part is not None:
        return
    for axes in range(3, 9):
        place = tree.find(site.path, axes)
        if place is not None:
            shape = tuple(tree.leaves[place.leaf].shape)
            raise CheckpointError(
                f"{place.leaf!r} has the shape {shape}, and neither the file nor "
                "`names` says which of its axes the factors run along. Give the "
                "`plan`, e.g. that of `LoraConfig.from_peft(folder, names)`."
            )


def by_slot(placed: Mapping[FileSite, Placed]) -> dict[str, list[Placed]]:
    """Places grouped by the leaf that they are in."""
    groups: dict[str, list[Placed]] = {}
    for place in placed.values():
        groups.setdefault(place.slot.name, []).append(place)
    return groups
