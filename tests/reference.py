"""The slow and obvious form of everything, importing nothing from the package.

An adapted weight is the dense matrix, built in float64 on the host, and a model on
adapted weights is the model on dense matrices.
"""

import numpy as np


def dense(weight, a, b, scale, inputs, outputs, batch=(), groups=1):
    """`W + s A B` for a weight whose axes have the given roles.

    `a` has axes `(*batch, *inputs, rank)`, `b` has `(*batch, rank, *outputs)`, and
    `scale` one value, or one for each index of the first batch axes. With `groups`,
    `a` has an axis of groups before the rank, and the outputs, counted in row-major
    order, take turns of one length in them.
    """
    weight = np.asarray(weight, np.float64)
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    scale = np.asarray(scale, np.float64)
    out = weight.copy()
    for index in np.ndindex(*(weight.shape[axis] for axis in batch)):
        s = scale[index[: scale.ndim]] if scale.ndim else scale
        down, up = a[index], b[index]
        if groups == 1:
            delta = s * np.tensordot(down, up, axes=1)  # (*inputs, *outputs)
        else:
            sizes = up.shape[1:]
            flat = up.reshape(len(up), -1)
            columns = [
                down[..., o // (flat.shape[1] // groups), :] @ flat[:, o]
                for o in range(flat.shape[1])
            ]
            delta = s * np.stack(columns, -1).reshape(*down.shape[:-2], *sizes)
        # From (*inputs, *outputs) to the order that the weight has them in.
        axes = (*inputs, *outputs)
        delta = delta.transpose(np.argsort(axes))
        where = [slice(None)] * weight.ndim
        for axis, i in zip(batch, index, strict=True):
            where[axis] = i
        out[tuple(where)] += delta
    return out


def scale_of(rank, alpha, rslora=False):
    """`alpha / r`, or `alpha / sqrt(r)`."""
    return alpha / (np.sqrt(rank) if rslora else rank)
