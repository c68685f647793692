"""Layouts of fused weights: adapters of a part of a leaf, and declared batch axes."""

import jax
import jax.numpy as jnp
from jax import lax
from layout import BATCH, HEADS, LAYERS, OUT, ROWS, SEQ, SIZE, D, Layout, role_of

from lorax_jax.structure import Part, Run

QUERIES = 3  # of each head of keys
GROUP = QUERIES + 2


def _mix(q, k, v):
    """Something of three arrays of one shape that treats each in its own way."""
    return jnp.tanh(q) * jnp.cos(k) + v


def _split_after(w, x):
    return _mix(*jnp.split(x @ w, 3, axis=-1))


def _split_before(w, x):
    q, k, v = jnp.split(w, 3, axis=1)
    return _mix(x @ q, x @ k, x @ v)


def _three(w, x):
    q, k, v = jnp.unstack(jnp.einsum("bsd,dtnh->btsnh", x, w), axis=1)
    return _mix(q, k, v)


def _grouped_heads(y):
    """Queries, keys and values of heads that are interleaved along the last axis."""
    y = y.reshape(*y.shape[:-1], HEADS, GROUP, SIZE)
    q, k, v = jnp.split(y, [QUERIES, QUERIES + 1], axis=-2)
    return _mix(q, k, v)


def _interleaved_before(w, x):
    w = w.reshape(D, HEADS, GROUP, SIZE)
    q, k, v = jnp.split(w, [QUERIES, QUERIES + 1], axis=2)
    return _mix(*(jnp.einsum("bsd,dngh->bsngh", x, part) for part in (q, k, v)))


def _gated_scan(w, x):
    def layer(x, w):
        gate, up = jnp.split(x @ w, 2, axis=-1)
        return jnp.tanh(gate) * up, None

    return lax.scan(layer, x, w)[0]


def _gated_experts(w, x):
    gate, up = jnp.split(jnp.einsum("ebd,edf->ebf", x, w), 2, axis=-1)
    return jax.nn.silu(gate) * up


def _alternating(w, x):
    y = x @ w
    return jnp.tanh(y[..., ::2]) * y[..., 1::2]


def _cell(w, x):
    # A recurrent cell: the input and the state side by side.
    state = jnp.tanh(x[..., :SIZE])
    return jnp.concatenate([x, state], axis=-1) @ w


def _cell_before(w, x):
    return x @ w[:D] + jnp.tanh(x[..., :SIZE]) @ w[D:]


def _conv(w, x):
    numbers = ("NWC", "WIO", "NWC")
    y = lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=numbers)
    return jnp.tanh(y[..., :OUT]) * y[..., OUT:]


def _kv(w, x):
    k, v = jnp.einsum("bsd,ckdh->cbskh", x, w)
    return jnp.tanh(k) * v


def _projected(w, x):
    return jnp.einsum("bsnh,nhd->bsd", x, w)


def _layout(name, fn, weight, role, rule, x=(BATCH, SEQ, D), **kwargs):
    return Layout(name, fn, weight, x, role, rule=rule, **kwargs)


def _along(axes, axis, *runs, name="one"):
    """A part of a leaf of so many axes that takes these runs of one of them."""
    return Part(name, tuple(runs if i == axis else None for i in range(axes)))


def _parts(take, axis=1):
    return {"parts": {"one": {axis: take}}}


_INTERLEAVED = {
    "split": (HEADS, GROUP, SIZE),
    "take": (None, (0, QUERIES), None),
}
_QUERIES = (
    Run(HEADS, 0, HEADS),
    Run(GROUP, 0, QUERIES),
    Run(SIZE, 0, SIZE),
)

PARTS = [
    _layout(
        "part_split_after",
        _split_after,
        (D, 3 * OUT),
        role_of((0,), (1,), part=_along(2, 1, Run(3 * OUT, 2 * OUT, 3 * OUT))),
        _parts((2 * OUT, 3 * OUT)),
    ),
    _layout(
        "part_split_before",
        _split_before,
        (D, 3 * OUT),
        role_of((0,), (1,), part=_along(2, 1, Run(3 * OUT, OUT, 2 * OUT))),
        _parts((OUT, 2 * OUT), axis=-1),
    ),
    _layout(
        "part_of_three",
        _three,
        (D, 3, HEADS, SIZE),
        role_of((0,), (1, 2, 3), part=_along(4, 1, Run(3, 2, 3))),
        _parts(2),
    ),
    _layout(
        "part_interleaved",
        lambda w, x: _grouped_heads(x @ w),
        (D, HEADS * GROUP * SIZE),
        role_of((0,), (1, 2, 3), part=_along(2, 1, *_QUERIES)),
        _parts(_INTERLEAVED),
    ),
    _layout(
        "part_interleaved_before",
        _interleaved_before,
        (D, HEADS * GROUP * SIZE),
        role_of((0,), (1, 2, 3), part=_along(2, 1, *_QUERIES)),
        _parts(_INTERLEAVED),
    ),
    _layout(
        "part_alternating",
        _alternating,
        (D, 2 * OUT),
        role_of((0,), (1,), part=_along(2, 1, Run(2 * OUT, 1, 2 * OUT, 2))),
        _parts((1, 2 * OUT, 2)),
    ),
    _layout(
        "part_scan",
        _gated_scan,
        (LAYERS, D, 2 * D),
        role_of((1,), (2,), (0,), stack=1, part=_along(3, 2, Run(2 * D, 0, D))),
        _parts((0, D), axis=2),
        x=(BATCH, D),
        depth=3,
    ),
    _layout(
        # The inputs of a stack on axis 1, split, so that the stack is axis 2 of a view.
        "part_scan_axis_1",
        lambda w, x: _gated_scan(jnp.moveaxis(w, 1, 0), x),
        (D, LAYERS, 2 * D),
        role_of(
            (0, 1),
            (3,),
            (2,),
            stack=1,
            part=Part(
                "one", ((Run(HEADS, 0, 1), Run(SIZE, 0, SIZE)), None, (Run(16, 8, 16),))
            ),
        ),
        {
            "parts": {
                "one": {
                    0: {"split": (HEADS, SIZE), "take": ((0, 1), None)},
                    2: (8, 16),
                }
            }
        },
        x=(BATCH, D),
        depth=3,
    ),
    _layout(
        "part_experts",
        _gated_experts,
        (LAYERS, D, 2 * OUT),
        role_of((1,), (2,), (0,), part=_along(3, 2, Run(2 * OUT, 0, OUT))),
        _parts((0, OUT), axis=2),
        x=(LAYERS, BATCH, D),
    ),
    _layout(
        "part_of_experts",  # two of them alone
        _gated_experts,
        (LAYERS, D, 2 * OUT),
        role_of((1,), (2,), (0,), part=_along(3, 0, Run(LAYERS, 1, 3))),
        _parts((1, 3), axis=0),
        x=(LAYERS, BATCH, D),
    ),
    _layout(
        "part_inputs",
        _cell,
        (D + SIZE, OUT),
        role_of((0,), (1,), part=_along(2, 0, Run(D + SIZE, D, D + SIZE))),
        _parts((D, D + SIZE), axis=0),
    ),
    _layout(
        "part_inputs_before",
        _cell_before,
        (D + SIZE, OUT),
        role_of((0,), (1,), part=_along(2, 0, Run(D + SIZE, 0, D))),
        _parts((0, D), axis=0),
    ),
    _layout(
        "part_conv",
        _conv,
        (3, D, 2 * OUT),
        role_of((0, 1), (2,), part=_along(3, 2, Run(2 * OUT, OUT, 2 * OUT))),
        _parts((OUT, 2 * OUT), axis=2),
    ),
    _layout(
        "part_lookup",
        lambda w, x: jnp.take(w, x, axis=0),
        (ROWS, D),
        role_of((0,), (1,), lookup=True, part=_along(2, 1, Run(D, 2, 6))),
        _parts((2, 6)),
        x=(BATCH, SEQ),
        ids=True,
    ),
    _layout(
        "batch_free",
        _kv,
        (2, HEADS, D, SIZE),
        role_of((2,), (1, 3), (0,)),
        {"batch": 0},
    ),
    _layout(
        "batch_free_twice",
        _kv,
        (2, HEADS, D, SIZE),
        role_of((2,), (3,), (0, 1)),
        {"batch": (0, -3)},
    ),
    _layout(
        "batch_contracted",
        _projected,
        (HEADS, SIZE, D),
        role_of((1,), (2,), (0,)),
        {"batch": (0,)},
        x=(BATCH, SEQ, HEADS, SIZE),
    ),
    _layout(
        "batch_part",  # the values alone
        _kv,
        (2, HEADS, D, SIZE),
        role_of((2,), (1, 3), (0,), part=_along(4, 0, Run(2, 1, 2))),
        {"batch": (0,), **_parts(1, axis=0)},
    ),
]
