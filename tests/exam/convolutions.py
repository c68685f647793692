"""Layouts of convolutions."""

import jax
import jax.numpy as jnp
from jax import lax
from layout import BATCH, LAYERS, Layout, role_of


def _conv(strides=1, padding="SAME", dilation=1, lhs_dilation=1, groups=1, spec=None):
    """A convolution in one layout, `spec` as (image, kernel, result)."""

    def fn(w, x):
        n = w.ndim - 2
        last = f"N{'DHW'[-n:]}C", f"{'DHW'[-n:]}IO", f"N{'DHW'[-n:]}C"
        return lax.conv_general_dilated(
            x,
            w,
            (strides,) * n,
            padding,
            (lhs_dilation,) * n,
            (dilation,) * n,
            spec or last,
            feature_group_count=groups,
        )

    return fn


def _conv_vmapped(w, x):
    return jax.vmap(_conv())(w, x)


def _conv_scan(w, x):
    return lax.scan(lambda x, w: (jnp.tanh(_conv(groups=2)(w, x)), None), x, w)[0]


def _conv_prepared(w, x):
    """Rescaled outputs, a flip and a window that grows."""
    columns = jnp.arange(1.0, 7.0, dtype=w.dtype)
    w = jnp.pad(
        w[::-1] * columns[None, None, None, :], ((0, 0), (1, 0), (0, 0), (0, 0))
    )
    return _conv(strides=2)(w, x)


CONVOLUTIONS = [
    Layout("conv_1d", _conv(), (3, 4, 6), (BATCH, 8, 4), role_of((0, 1), (2,))),
    Layout(
        "conv_2d",
        _conv(strides=2, padding=((1, 0), (0, 2))),
        (3, 2, 4, 6),
        (BATCH, 8, 9, 4),
        role_of((0, 1, 2), (3,)),
    ),
    Layout(
        "conv_3d",
        _conv(padding="VALID"),
        (2, 1, 3, 4, 6),
        (BATCH, 3, 4, 4, 4),
        role_of((0, 1, 2, 3), (4,)),
    ),
    Layout(
        "conv_dilated",
        _conv(dilation=2),
        (3, 3, 4, 6),
        (BATCH, 8, 8, 4),
        role_of((0, 1, 2), (3,)),
    ),
    Layout(
        "conv_transposed",
        lambda w, x: lax.conv_transpose(x, w, (2, 2), "SAME", transpose_kernel=True),
        (3, 3, 6, 4),
        (BATCH, 4, 4, 4),
        role_of((0, 1, 3), (2,)),
    ),
    Layout(
        "conv_channels_first",
        _conv(strides=2, spec=("NCHW", "OIHW", "NCHW")),
        (6, 4, 3, 3),
        (BATCH, 4, 8, 8),
        role_of((1, 2, 3), (0,)),
    ),
    Layout(
        "conv_grouped",
        _conv(strides=2, groups=2),
        (3, 3, 2, 6),
        (BATCH, 8, 8, 4),
        role_of((0, 1, 2), (3,), groups=2),
    ),
    Layout(
        "conv_grouped_channels_first",
        _conv(groups=3, dilation=2, spec=("NCHW", "OIHW", "NHWC")),
        (6, 2, 3, 3),
        (BATCH, 6, 8, 8),
        role_of((1, 2, 3), (0,), groups=3),
    ),
    Layout(
        "conv_depthwise",
        _conv(groups=4),
        (3, 3, 1, 8),
        (BATCH, 8, 8, 4),
        role_of((0, 1, 2), (3,), groups=4),
    ),
    Layout(
        "conv_vmapped",
        _conv_vmapped,
        (LAYERS, 3, 4, 6),
        (LAYERS, BATCH, 8, 4),
        role_of((1, 2), (0, 3), groups=LAYERS),
    ),
    Layout(
        "conv_prepared",
        _conv_prepared,
        (3, 2, 4, 6),
        (BATCH, 8, 8, 4),
        role_of((0, 1, 2), (3,)),
    ),
    Layout(
        "conv_scan",
        _conv_scan,
        (LAYERS, 3, 2, 4),
        (BATCH, 8, 4),
        role_of((1, 2), (3,), (0,), stack=1, groups=2),
        depth=3,
    ),
]
