"""How a checkpoint's tensor lies, by the roles of our axes."""

from .._names import Layout
from ._file_site import Part


def tensor_layout(layout: Layout, part: Part) -> Layout | None:
    """`"same"` for a tensor `(d_in, d_out)`, `"linear"` for `(d_out, d_in)`.

    The table's layout relates the tensor to our array, and the roles say how that lies.
    Experts are in front of both.

    Returns:
        The layout, or `None` where input and output axes alternate, or experts are not
        in front.

    >>> tensor_layout("linear", Part((4, 6), inputs=(0,), outputs=(1,)))
    'linear'
    >>> tensor_layout("same", Part((3, 6, 4), inputs=(2,), outputs=(1,), batch=(0,)))
    'linear'
    """
    axes = tuple(range(len(part.batch) + len(part.inputs) + len(part.outputs)))
    if (*part.batch, *part.inputs, *part.outputs) == axes:
        return layout
    if (*part.batch, *part.outputs, *part.inputs) == axes:
        return "linear" if layout == "same" else "same"
    return None
