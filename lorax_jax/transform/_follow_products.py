"""Tokens through products, convolutions, look-ups and writes."""

from ._follow_step import Step, without
from ._stretches import Axes, Axis, Lost


def dot_general(step: Step) -> list[Axes]:
    """Free and parallel axes keep their tokens; those that are summed over end."""
    (left, right), (left_batch, right_batch) = step.params["dimension_numbers"]
    return _product(step, left, right, left_batch, right_batch, ())


def ragged_dot(step: Step) -> list[Axes]:
    """The same for rows in groups, each group with a matrix of its own."""
    numbers = step.params["ragged_dot_dimension_numbers"]
    (left, right), (left_batch, right_batch) = numbers.dot_dimension_numbers
    groups = numbers.rhs_group_dimensions
    if not groups:  # the groups are summed over, and the result has one for each
        return step.lost("rows are summed in groups")
    return _product(step, left, right, left_batch, right_batch, groups)


def _product(step, left, right, left_batch, right_batch, groups) -> list[Axes]:
    x, y = step.operands[:2]
    pairs = zip(left_batch, right_batch, strict=True)
    return step.kept(
        [
            *(step.join(x[i], y[j]) for i, j in pairs),
            *without(x, (*left, *left_batch)),
            *without(y, (*right, *right_batch, *groups)),
        ]
    )


def convolution(step: Step) -> list[Axes]:
    """The batch keeps its tokens, and so do points that stand for one each."""
    p = step.params
    numbers = p["dimension_numbers"]
    batch, features, *spatial = numbers.lhs_spec
    to, _, *places = numbers.out_spec
    taps = numbers.rhs_spec[2:]
    if any(axis != () for axis in step.operands[1]) or step.axes[features] != ():
        return step.lost("they run along a kernel or its features")
    out: list[Axis] = [()] * len(step.results[0])
    out[to] = step.axes[batch]
    if p["batch_group_count"] != 1:
        out[to] = step.drop(out[to], "the batch is divided into groups")
    for i, (old, tap, new) in enumerate(zip(spatial, taps, places, strict=True)):
        reach = (step.shapes[1][tap] - 1) * p["rhs_dilation"][i]
        low, high = p["padding"][i]
        out[new] = step.axes[old]
        # One result for each entry, which stands at the window's end or at its center.
        each = p["window_strides"][i] == p["lhs_dilation"][i] == 1
        if not (each and low + high == reach and low in (reach, reach / 2)):
            out[new] = step.drop(out[new], "no output stands for one token alone")
    return step.kept(out)


def window(step: Step) -> list[Axes]:
    """A window that does not move keeps the tokens along its axis."""
    p, out = step.params, []
    for i, axis in enumerate(step.axes):
        still = p["window_dimensions"][i] == p["window_strides"][i] == 1
        still = still and tuple(p["padding"][i]) == (0, 0)
        out.append(axis if still else step.drop(axis, "a window slides over them"))
    return step.kept(out)


def gather(step: Step) -> list[Axes]:
    """The tokens of the indices, and those along what they leave of the table."""
    numbers, sizes = step.params["dimension_numbers"], step.params["slice_sizes"]
    table, indices = step.axes, step.operands[1][:-1]
    shared = dict(
        zip(
            numbers.start_indices_batching_dims,
            numbers.operand_batching_dims,
            strict=True,
        )
    )
    from_indices = [
        step.join(axis, table[shared[i]]) if i in shared else axis
        for i, axis in enumerate(indices)
    ]
    window, picked = [], None
    for i, (axis, n, size) in enumerate(zip(table, step.shape, sizes, strict=True)):
        if i in numbers.operand_batching_dims:
            continue
        if size != n:
            axis = step.drop(axis, "tokens are picked by computed indices")
            if isinstance(axis, Lost):
                picked = axis
        if i not in numbers.collapsed_slice_dims:
            window.append(axis if size == n or size > 1 else ())
    if picked:  # in which order, the indices say
        from_indices = [
            axis if i in shared else picked for i, axis in enumerate(from_indices)
        ]
    ndim = len(step.results[0])
    windows, rows = iter(window), iter(from_indices)
    return step.kept(
        next(windows) if i in numbers.offset_dims else next(rows) for i in range(ndim)
    )


def scatter(step: Step) -> list[Axes]:
    """The tokens of the target and of what is written; lost at computed places."""
    target, indices, updates = step.operands
    numbers = step.params["dimension_numbers"]
    shared = dict(
        zip(
            numbers.operand_batching_dims,
            numbers.scatter_indices_batching_dims,
            strict=True,
        )
    )
    offsets = set(numbers.update_window_dims)
    rows = [i for i in range(len(updates)) if i not in offsets]  # as in the indices
    windows = iter(numbers.update_window_dims)
    moving = [
        axis
        for i, row in enumerate(rows)
        if i not in shared.values()
        for axis in (updates[row], indices[i])
        if axis != ()
    ]
    lost = step.lose("they are written to computed places") if moving else ()
    out = []
    for i, axis in enumerate(target):
        if i in shared:
            row = shared[i]
            out.append(step.join(axis, updates[rows[row]], indices[row]))
        elif i in numbers.inserted_window_dims:
            out.append(step.join(axis, lost))
        else:
            at = next(windows)
            written = updates[at]
            if step.shapes[2][at] != step.shape[i]:
                written = step.join(step.drop(written, "they become a part"), lost)
            out.append(step.join(axis, written))
    return step.kept(out)


def flash(step: Step) -> list[Axes]:
    """cuDNN's attention: a row of the result for each query, in the queries' layout."""
    return [(*step.axes[:-1], ()), *step.lost("a residual of attention")[1:]]
