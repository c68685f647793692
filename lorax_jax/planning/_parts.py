"""Axes that a rule declares, and parts of a leaf that it names, as roles."""

import dataclasses
import itertools
from collections.abc import Sequence

from .._errors import PlanError
from .._parts import PartRule, Where
from .._rule import Rule
from ..adapters import Role, takes_inputs
from ..structure import Part, Run
from ..transform import Leaf


def with_batch(role: Role, leaf: Leaf, axes: Sequence[int]) -> Role:
    """The roles of a leaf some axes of which are declared to be batch axes.

    A and B then have an entry for each index of such an axis, whether the model sums
    over it or keeps it: $A_i B_i$ for each $i$, where otherwise one product spans all.

    Args:
        role: as the model uses the leaf.
        leaf: the leaf.
        axes: the declared axes, counted on the leaf.

    Raises:
        PlanError: if an axis is a stack already or out of range, or if no input or no
            output is left.
    """
    count = len(leaf.shape)
    what = f"`batch` = {tuple(axes)} of {leaf.path!r}, whose shape is {leaf.shape}:"
    declared = []
    for axis in axes:
        if not -count <= axis < count:
            raise PlanError(f"{what} there is no axis {axis}.")
        declared.append(axis % count)
        if axis % count in role.stacked:
            raise PlanError(
                f"{what} axis {axis} counts layers, which have factors of their own "
                "already. Leave it out."
            )
    inputs = tuple(axis for axis in role.inputs if axis not in declared)
    outputs = tuple(axis for axis in role.outputs if axis not in declared)
    if not inputs or not outputs:
        raise PlanError(
            f"{what} no {'output' if inputs else 'input'} is left, along which a "
            f"factor could run (in {role.inputs}, out {role.outputs}). Leave an axis "
            "out."
        )
    if declared and role.groups > 1:
        raise PlanError(
            f"{what} it is the kernel of a grouped convolution, which has an A and a B "
            "for each group already. Leave `batch` out."
        )
    more = (axis for axis in declared if axis not in role.batch)
    batch = (*role.batch, *sorted(set(more)))
    return dataclasses.replace(role, inputs=inputs, outputs=outputs, batch=batch)


def check_summed(used: Role, role: Role, *, bias: bool) -> None:
    """Raises if a declared batch axis is summed over, and outputs are to be trained.

    The result then has one output where the adapter has one for each index.

    Args:
        used: roles of the axes as the model uses the leaf.
        role: the same with declared batch axes.
        bias: whether B has a bias.

    Raises:
        PlanError: see above.
    """
    summed = [axis for axis in role.batch if axis in used.inputs]
    for wrong, what in (
        (role.kind == "dora", "`dora` gives every output a magnitude"),
        (bias, "`lora_bias` gives every output a bias"),
    ):
        if summed and wrong:
            raise PlanError(
                f"The model sums over axis {summed[0]} of {role.path!r}, which `batch` "
                f"declares, and {what}: one for each index of the axis would be none "
                "of the result's. Leave one of the two out."
            )


def roles_of_parts(
    role: Role, leaf: Leaf, rule: Rule, path: str
) -> list[tuple[Role, Rule]]:
    """The parts that a rule names, each with its role and what the rule says of it.

    Args:
        role: the roles of the leaf's axes.
        leaf: the leaf.
        rule: a resolved rule; one without parts takes the whole leaf.
        path: the leaf's, or that of one of its layers.

    Raises:
        PlanError: if a part does not fit the leaf, or two of them overlap.
    """
    if not rule.parts:
        return [(role, rule)]
    _check_parted(role, leaf)
    parts = [_part(role, leaf, part, path) for part in rule.parts]
    for one, other in itertools.combinations(parts, 2):
        if one.overlaps(other, leaf.shape):
            raise PlanError(
                f"The parts {one.name!r} and {other.name!r} of {leaf.path!r} of shape "
                f"{leaf.shape} have entries in common, which both would change. Take "
                "them apart, or bind two adapters."
            )
    found = []
    for part, own in zip(parts, rule.parts, strict=True):
        whole = role.of_part(part)
        if whole.kind == "dora" and takes_inputs(whole):
            raise PlanError(
                f"The part {part.name!r} of {leaf.path!r} takes some of its inputs "
                f"(axes {role.inputs}), and DoRA's magnitudes are of whole columns. "
                "Give its rule {'dora': False}."
            )
        numbers = {n: getattr(own, n) for n in ("rank", "alpha", "init", "dropout")}
        found.append((whole, dataclasses.replace(rule, **numbers)))
    return found


def check_names(roles: Sequence[Role]) -> None:
    """Raises if two parts of a leaf's layers have one name and are not the same.

    Raises:
        PlanError: see above.
    """
    for one, other in itertools.combinations(roles, 2):
        if one.name == other.name:
            raise PlanError(
                f"Rules for different layers of {one.path!r} mean different parts by "
                f"{one.suffix!r}. Layers of a stack share arrays: give the two parts "
                "different names."
            )


def _check_parted(role: Role, leaf: Leaf) -> None:
    """Parts are of a weight that is used in one way."""
    if role.groups > 1:
        raise PlanError(
            f"`parts` of {leaf.path!r}, the kernel of a grouped convolution: its "
            "groups have factors of their own already. Adapt it whole."
        )
    if leaf.of_kind("lookup") and leaf.of_kind("product"):
        raise PlanError(
            f"`parts` of {leaf.path!r}, which is looked up and also multiplied by. "
            "Adapt all of it, in the use that `tie` names."
        )


def _part(role: Role, leaf: Leaf, rule: PartRule, first: str) -> Part:
    """A rule's part of one leaf, of which `first` is the path of a layer."""
    axes: list[tuple[Run, ...] | None] = [None] * len(leaf.shape)
    what = f"The part {rule.name!r} of {leaf.path!r}, whose shape is {leaf.shape},"
    for where in rule.where:
        axis = where.axis + len(leaf.shape) * (where.axis < 0)
        if not 0 <= axis < len(axes):
            raise PlanError(
                f"{what} names axis {where.axis}, which is not there. Axes count on "
                "the leaf, from 0 or, negative, from the end."
            )
        if axis in role.stacked:
            raise PlanError(
                f"{what} names axis {where.axis}, whose entries the model reads one by "
                "one, as layers of a stack. Each has a path of its own, such as "
                f"{first!r}: match that. A part takes the same of each."
            )
        if axes[axis] is not None:
            raise PlanError(f"{what} names axis {axis} twice. Name it once.")
        axes[axis] = _runs(where, leaf.shape[axis], what)
    return Part(rule.name, tuple(axes))


def _runs(where: Where, size: int, what: str) -> tuple[Run, ...]:
    sizes = where.split or (size,)
    runs = tuple(
        Run(n, *((0, n, 1) if take is None else take))
        for n, take in zip(sizes, where.take, strict=True)
    )
    part = Part("", (runs,))
    if not part.fits((size,)):
        raise PlanError(
            f"{what} splits axis {where.axis} of {size} entries into {where.split}, "
            "whose product is another. Sizes are in row-major order, the last one "
            "varying fastest."
        )
    for run in runs:
        if run.stop > run.size:
            raise PlanError(
                f"{what} takes {run.start}:{run.stop} of axis {where.axis}"
                + (f" viewed as {where.split}" if where.split else "")
                + f", where there are {run.size} entries. Bounds are (start, stop)."
            )
    return runs
