"""Which axis of a table, or of an output head, counts tokens."""

from ..transform import Leaf


def token_axis(leaf: Leaf, *, stacked: bool = False) -> int | None:
    """The axis along which the function looks tokens up, or produces them.

    Args:
        leaf: what the trace found out about a parameter.
        stacked: take a table of several layers too.

    Returns:
        The axis, or `None` where no use of the leaf has one.
    """
    for kind, role in (("lookup", "in"), ("product", "out")):
        for consumer in leaf.of_kind(kind):
            axes = [i for i, r in enumerate(consumer.axes) if r == role]
            if len(axes) == 1 and (stacked or "batch" not in consumer.axes):
                return axes[0]
    return None
