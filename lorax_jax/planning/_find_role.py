"""What the axes of a leaf are, from the uses that a function makes of it."""

import warnings
from collections.abc import Mapping, Sequence

from .._errors import PlanError, listing, shorten
from ..adapters import Role
from ..structure import Use
from ..transform import Consumer, Leaf


def max_rank(role: Role, shape: Sequence[int]) -> int:
    """The largest rank that a product over these axes can have, in a group."""
    d_in = d_out = 1
    for n in role.sizes(shape, role.inputs):
        d_in *= n
    for n in role.sizes(shape, role.outputs):
        d_out *= n
    return min(d_in, d_out // role.groups)


def is_linear(leaf: Leaf, rows: frozenset[int]) -> bool:
    """What `"all-linear"` takes: a weight that a product consumes, but no output head.

    The head is a product whose outputs are as many as a looked-up table has rows and
    make a result of the function by themselves. `rows` is from `table_rows`.
    """
    products = leaf.of_kind("product")
    if not any("in" in c.axes and "out" in c.axes for c in products):
        return False
    return not is_head(leaf, rows)


def is_head(leaf: Leaf, rows: frozenset[int]) -> bool:
    """Whether a product with the leaf makes one output for each row of a table."""
    return any(
        consumer in leaf.heads and leaf.size(consumer, "out") in rows
        for consumer in leaf.of_kind("product")
    )


def table_rows(leaves: Mapping[str, Leaf]) -> frozenset[int]:
    """Numbers of rows of the tables that the function looks up."""
    return frozenset(
        leaf.size(consumer, "in")
        for leaf in leaves.values()
        for consumer in leaf.of_kind("lookup")
    )


def find_role(leaf: Leaf, tie: str | None) -> Role:
    """The roles of a leaf's axes.

    Raises:
        PlanError: if nothing multiplies by the leaf, if its uses disagree, or if it is
            tied and `tie` does not say which use is meant.
    """
    products = [c for c in leaf.of_kind("product") if "in" in c.axes or c.problem]
    lookups = leaf.of_kind("lookup")
    if not products and not lookups:
        raise PlanError(_dead(leaf))
    for consumer in (*products, *lookups):
        if consumer.problem:
            raise PlanError(
                f"The axes of {leaf.path!r} of shape {leaf.shape} have no single role: "
                f"{consumer.problem}, at {consumer.source}."
            )
    if leaf.stopped:
        warnings.warn(
            f"{leaf.path!r} goes through `stop_gradient`: its adapter will get no "
            "gradient there.",
            stacklevel=6,
        )
    kinds = {(c.axes, c.groups): c for c in products}
    if lookups and products:
        if tie is None:
            raise PlanError(_tied(leaf, lookups[0], products[0]))
        if tie == "head":
            return _role(leaf, products[0], use="head")
        lookup = "lookup" if tie == "lookup" else None
        return _role(leaf, lookups[0], use=lookup, table=True)
    if lookups:
        return _role(leaf, lookups[0], table=True)
    if len(kinds) > 1 and tie != "shared":
        lines = [f"in {_where(c, 'in')} at {c.source}" for c in kinds.values()]
        raise PlanError(
            f"{leaf.path!r} of shape {leaf.shape} is multiplied in several ways:\n"
            + listing("uses", lines)
            + "\nTo adapt the weight itself, as seen by all of them, say "
            f"targets={{{leaf.path!r}: {{'tie': 'shared'}}, ...}}"
        )
    role = _role(leaf, products[0])
    if not role.outputs:
        raise PlanError(
            f"{leaf.path!r} of shape {leaf.shape} is multiplied as a vector, which has "
            "no low-rank form. Leave it out of `targets`."
        )
    return role


def _role(
    leaf: Leaf, consumer: Consumer, use: Use | None = None, table: bool = False
) -> Role:
    batch, known = _where(consumer, "batch"), stacks_of(leaf)
    stacks = tuple(axis for axis in batch if axis in known)
    rest = tuple(axis for axis in batch if axis not in known)
    return Role(
        path=leaf.path,
        inputs=_where(consumer, "in"),
        outputs=_where(consumer, "out"),
        batch=stacks + rest,
        stack=len(stacks),
        lookup=table,
        use=use,
        groups=consumer.groups,
    )


def stacks_of(leaf: Leaf) -> list[int]:
    """The axes that every use of a leaf reads a layer at a time."""
    uses = [consumer.axes for consumer in leaf.consumers if consumer.axes]
    return sorted(
        axis for axis in leaf.stacks if all(axes[axis] == "batch" for axes in uses)
    )


def _where(consumer: Consumer, role: str) -> tuple[int, ...]:
    return tuple(i for i, r in enumerate(consumer.axes) if r == role)


_BUILT = (
    " To build the adapted weight there, declare its axes, roles={{'{path}': "
    "{{'inputs': ..., 'outputs': ...}}}}, and tell `adapt` to `materialize`."
)


def _dead(leaf: Leaf) -> str:
    others = sorted({c.primitive for c in leaf.of_kind("other")})
    used = f"only {shorten(others)} reads it" if others else "nothing reads it"
    reasons = sorted({c.problem for c in leaf.of_kind("other") if c.problem})
    used += "".join(f" ({reason})" for reason in reasons)
    return (
        f"{leaf.path!r} of shape {leaf.shape} is a target, but no product or lookup of "
        f"the function uses it: {used}. Leave it out of `targets`, or plan on a "
        "function that uses it." + (_BUILT.format(path=leaf.path) if others else "")
    )


def _tied(leaf: Leaf, lookup: Consumer, product: Consumer) -> str:
    return (
        f"{leaf.path!r} of shape {leaf.shape} is tied: it is looked up and also "
        f"multiplied by, at {product.source}.\n"
        "Choose what the adapter changes:\n"
        f"  targets={{{leaf.path!r}: {{'tie': 'shared'}}}}   the table, seen by both\n"
        f"  targets={{{leaf.path!r}: {{'tie': 'lookup'}}}}   the lookup alone\n"
        f"  targets={{{leaf.path!r}: {{'tie': 'head'}}}}     the product alone"
    )
