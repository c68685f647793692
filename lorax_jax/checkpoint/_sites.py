"""Sites with factors as a file has them."""

import math

from .._errors import CheckpointError, closest, shorten
from .._names import Layout, NameMap
from ..planning import Plan, Site, Slot
from ._kernels import order_of
from ._record import FileSite, Part


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
    if names is None:
        key = site.name
        table = False
    else:
        if slot.experts:
            raise CheckpointError(
                f"{site.path!r} has factors for each of {math.prod(slot.experts)} "
                "experts, or indices of a declared batch axis, which PEFT's keys "
                "cannot name one by one. Leave `names` out for a file with our paths, "
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
    )


def tensor_layout(layout: Layout, part: Part) -> Layout | None:
    """How a checkpoint's tensor lies: `"same"` for `(d_in, d_out)`, else `"linear"`.

    The table's layout relates it to our array, and the roles say how that lies.

    Returns:
        The layout, or `None` where input and output axes alternate.
    """
    axes = tuple(range(len(part.inputs) + len(part.outputs)))
    if (*part.inputs, *part.outputs) == axes:
        return layout
    if (*part.outputs, *part.inputs) == axes:
        return "linear" if layout == "same" else "same"
    return None


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
