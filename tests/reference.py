"""The slow and obvious form of everything, importing nothing from the package.

An adapted weight is the dense matrix, built in float64 on the host, and a model on
adapted weights is the model on dense matrices.
"""

import numpy as np


def dense(weight, a, b, scale, inputs, outputs, batch=()):
    """`W + s A B` for a weight whose axes have the given roles.

    `a` has axes `(*batch, *inputs, rank)`, `b` has `(*batch, rank, *outputs)`, and
    `scale` one value, or one for each index of the first batch axes.
    """
    weight = np.asarray(weight, np.float64)
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    scale = np.asarray(scale, np.float64)
    out = weight.copy()
    for index in np.ndindex(*(weight.shape[axis] for axis in batch)):
        s = scale[index[: scale.ndim]] if scale.ndim else scale
        delta = s * np.tensordot(a[index], b[index], axes=1)  # (*inputs, *outputs)
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
