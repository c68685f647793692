"""Sites with factors as a file has them."""

import math

from .._errors import CheckpointError, closest, shorten
from .._names import NameMap
from ..planning import Plan, Site, Slot
from ._file_site import FileSite, Part
from ._kernels import order_of
from ._packed import is_mirrored


def is_shared(plan: Plan, site: Site) -> bool:
    """Whether a site is an embedding that the head shares, adapted for both."""
    if not site.role.lookup or site.use is not None:
        return False
    rules = plan.config.rules or ()
    tie = next((rule.tie for rule in rules if rule.pattern == site.rule), None)
    return (tie or plan.config.tie) == "shared"


def factor_site(plan: Plan, slot: Slot, site: Site, names: NameMap | None) -> FileSite:
    """A site with factors, as a file has it.

    Args:
        plan: the plan.
        slot: the leaf.
        site: the site.
        names: the model's name table, for PEFT's keys; `None` for keys of our paths.

    Raises:
        CheckpointError: if PEFT has no key for the site.
    """
    table = site.role.lookup
    tied = order = None
    parameter = None if names is None else names.parameter(site.path)
    mirrored = False
    if names is None:
        key = site.name
        table = False
    elif parameter is not None:
        _check_packable(slot, site)
        key = parameter.rpartition(".")[0]
        mirrored = is_mirrored(parameter, site.path, part_of(slot), names)
    else:
        if slot.experts:
            raise CheckpointError(
                f"{site.path!r} has factors for each of {math.prod(slot.experts)} "
                f"experts, or indices of a declared batch axis, and `names` calls it "
                f"{names.tensor(site.path)!r}, for which PEFT has no more than two "
                "matrices. If that is a bare parameter, say so: `NameMap(names, "
                "parameters=[...])`. Else leave `names` out for a file with our paths, "
                "or merge the adapter for export."
            )
        if slot.role.groups > 1:
            raise CheckpointError(
                f"{site.path!r} is the kernel of a convolution in {slot.role.groups} "
                "groups, each with an A and a B. PEFT has one A that sees all channels "
                "there, and no place for these. Leave `names` out for a file with our "
                "paths, or merge the adapter."
            )
        if site.role.part is not None and (slot.bias or site.role.kind == "dora"):
            raise CheckpointError(
                f"{site.name!r} is a part of a leaf with "
                + ("a bias of B" if slot.bias else "magnitudes of its own")
                + ", and PEFT's module is the whole leaf. Leave `names` out for a file "
                "with our paths, or merge the adapter."
            )
        order = order_of(names.layout(site.path), part_of(slot), site.path)
        headless = names.module_path(names.head) is None
        shares = headless and site.path == names.tied
        if headless and names.tied is None and is_shared(plan, site):
            raise CheckpointError(
                f"{site.path!r} is adapted for the lookup and the head, and `names` "
                "does not say that the head shares it. Say so: "
                f"`NameMap(names, tied={site.path!r})`."
            )
        if site.use == "head":
            other = names.module_path(names.head)
            if other is not None:
                raise CheckpointError(
                    f"The adapter acts where {site.path!r} is the head, and `names` "
                    f"has the head, {names.head!r}, at {other!r}. In a table of a tied "
                    "model no entry is the head's: leave that one out."
                )
            key = names.head
        else:
            key = module_of(site.path, names)
            tied = names.head if shares and is_shared(plan, site) else None
        if tied is not None and site.role.kind == "dora":
            raise CheckpointError(
                f"{site.path!r} has one magnitude for the lookup and the head, and "
                "PEFT has one for each. Say which is adapted (`tie`), or leave `names` "
                "out for a file with our paths."
            )
    return FileSite(
        path=site.path,
        use=site.use,
        key=key,
        tied=tied,
        table=table,
        rank=site.rank,
        alpha=site.alpha,
        scale=site.scale,
        dropout=site.dropout,
        part=part_of(slot),
        kind=site.role.kind,
        bias=slot.bias,
        order=order,
        parameter=parameter,
        mirrored=mirrored,
        init=None if isinstance(site.init, bool) else site.init,
    )


def _check_packable(slot: Slot, site: Site) -> None:
    """PEFT adds to a bare parameter; of its other kinds it has none there."""
    odd = [
        what
        for what, holds in (
            ("is looked up", site.role.lookup),
            ("is DoRA", site.role.kind == "dora"),
            ("has a bias of B", slot.bias),
            ("drops inputs of A", bool(site.dropout)),
            ("is grouped", slot.role.groups > 1),
            ("is tied", site.use is not None),
            ("is a part of it", site.role.part is not None),
        )
        if holds
    ]
    if odd:
        raise CheckpointError(
            f"{site.path!r} is a bare parameter by `names`, and its adapter "
            f"{shorten(odd)}: PEFT's `target_parameters` cannot. Leave `names` out for "
            "a file with our paths."
        )


def module_of(path: str, names: NameMap) -> str:
    """The module whose weight is at `path`.

    Raises:
        CheckpointError: if the table has none.
    """
    module = names.module(path)
    if module is None:
        near = closest(path, [entry[0] for entry in names.entries], 3)
        raise CheckpointError(
            f"`names` has no module for {path!r}, so PEFT could not find its adapter. "
            f"Closest: {shorten(near)}. Add an entry (path, tensor name ending in "
            "'.weight', layout), or leave `names` out for a file with our paths."
        )
    return module


def part_of(slot: Slot) -> Part:
    """The axes of one layer of a leaf."""
    role = slot.role
    layers = role.leaf.stacked
    axes = range(len(role.shape(slot.shape)))
    kept = [axis for axis in axes if axis not in role.stacked]
    name = view = None
    if role.part is not None:
        name = role.part.name
        view = tuple(
            None
            if runs is None
            else tuple((r.size, r.start, r.stop, r.step) for r in runs)
            for runs in role.part.without(layers).axes
        )

    def within(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(kept.index(axis) for axis in axes)

    in_front = layers == tuple(range(role.stack))
    return Part(
        shape=role.layer_shape(slot.shape),
        inputs=within(role.inputs),
        outputs=within(role.outputs),
        batch=within(role.batch[role.stack :]),
        lookup=role.lookup,
        stack=None if in_front else layers,
        groups=role.groups if role.groups > 1 else None,
        name=name,
        view=view,
    )
