"""The ways in which models hold and use a weight. Every kind of adapter takes them all.

Each layout is a function of one weight and one input, with the roles that the axes of
the weight play in it. The roles are written by hand: role inference must find the same.
"""

import jax
import jax.numpy as jnp
from convolutions import CONVOLUTIONS
from jax import lax
from layout import BATCH, HEADS, LAYERS, OUT, ROWS, SEQ, SIZE, D, Layout, role_of
from ragged import RAGGED


def _unrolled(w, x):
    for i in range(LAYERS):
        x = jnp.tanh(x @ w[i])
    return x


def _loop(w, x):
    def body(i, x):
        return jnp.tanh(x @ lax.dynamic_index_in_dim(w, i, keepdims=False))

    return lax.fori_loop(0, LAYERS, body, x)


def _scan(w, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), x.sum()), x, w)


def _scan_axis_1(w, x):
    return _scan(jnp.moveaxis(w, 1, 0), x)


def _scan_const(w, x):
    return lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=2)[0]


def _scan_carry(w, x):
    def body(carry, _):
        x, w = carry
        return (jnp.tanh(x @ w), w), None

    return lax.scan(body, (x, w), None, length=2)[0][0]


def _scan_jit_remat(w, x):
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

    @jax.jit
    def layer(x, w):
        return jnp.tanh(x @ w)

    return lax.scan(
        lambda x, w: (jax.checkpoint(layer, policy=policy)(x, w), None), x, w
    )[0]


def _nested_jit(w, x):
    @jax.jit
    def outer(w, x):
        return jax.jit(lambda x: jax.nn.relu(x @ w))(x) + 1.0

    return outer(w, x)


def _conj(w, x):
    # A weight handed back by an inner function, still a weight.
    w, y = jax.jit(lambda w, x: (w.T, x * 2.0))(w, x)
    return y @ w.T


def _fused(w, x):
    q, k = jnp.split(w, 2, axis=1)
    return x @ q, jnp.tanh(x @ k)


def _concatenated(w, x):
    fused = jnp.concatenate([w, 2.0 * w, jnp.ones((D, 1), w.dtype)], axis=1)
    return x @ fused


def _scaled(w, x):
    columns = jnp.arange(1.0, OUT + 1, dtype=w.dtype)
    rows = jnp.arange(1.0, D + 1, dtype=w.dtype)
    return x @ (-w * columns[None, :] / rows[:, None] * 0.5)


def _padded(w, x):
    x = jnp.pad(x, ((0, 0), (0, 0), (1, 0)))
    return x @ jnp.pad(w, ((1, 0), (0, 2)))


def _gathered(w, x):
    return x @ w[:, jnp.array([4, 0, 2])]


def _reversed(w, x):
    return x @ w[::-1, 1::2]


def _broadcast(w, x):
    many = jnp.broadcast_to(w, (BATCH, *w.shape))
    return jnp.einsum("bsd,bdf->bsf", x, many)


def _transposing_reshape(w, x):
    return x @ lax.reshape(w, (HEADS * SIZE, D), dimensions=(0, 2, 1)).T


def _cast(w, x):
    return (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(x.dtype)


def _tied(w, x):
    return jnp.tanh(jnp.take(w, x, axis=0)) @ w.T


LAYOUTS = [
    Layout("dense", lambda w, x: x @ w, (D, OUT), (BATCH, SEQ, D), role_of((0,), (1,))),
    Layout(
        "transposed",
        lambda w, x: x @ w.T,
        (OUT, D),
        (BATCH, SEQ, D),
        role_of((1,), (0,)),
    ),
    Layout("vector", lambda w, x: x @ w, (D, OUT), (D,), role_of((0,), (1,))),
    Layout("weight_first", lambda w, x: w @ x, (OUT, D), (D, SEQ), role_of((1,), (0,))),
    Layout(
        "heads_out",
        lambda w, x: jnp.einsum("bsd,dnh->bnsh", x, w),
        (D, HEADS, SIZE),
        (BATCH, SEQ, D),
        role_of((0,), (1, 2)),
    ),
    Layout(
        "heads_in",
        lambda w, x: jnp.einsum("bsnh,nhd->bsd", x, w),
        (HEADS, SIZE, D),
        (BATCH, SEQ, HEADS, SIZE),
        role_of((0, 1), (2,)),
    ),
    Layout(
        "heads_first",
        lambda w, x: jnp.einsum("bsd,ndh->bsnh", x, w),
        (HEADS, D, SIZE),
        (BATCH, SEQ, D),
        role_of((1,), (0, 2)),
    ),
    Layout(
        "fused_kv",
        lambda w, x: jnp.einsum("bsd,ckdh->cbskh", x, w),
        (2, HEADS, D, SIZE),
        (BATCH, SEQ, D),
        role_of((2,), (0, 1, 3)),
    ),
    Layout(
        "split_heads",
        lambda w, x: x @ w.reshape(D, HEADS * SIZE),
        (D, HEADS, SIZE),
        (BATCH, SEQ, D),
        role_of((0,), (1, 2)),
    ),
    Layout(
        "transposing_reshape",
        _transposing_reshape,
        (HEADS, D, SIZE),
        (BATCH, SEQ, D),
        role_of((1,), (0, 2)),
    ),
    Layout(
        "experts",
        lambda w, x: jnp.einsum("ebd,edf->ebf", x, w),
        (LAYERS, D, OUT),
        (LAYERS, BATCH, D),
        role_of((1,), (2,), (0,)),
    ),
    Layout(
        "block_diagonal",
        lambda w, x: jnp.einsum("...hi,hij->...hj", x, w),
        (HEADS, SIZE, SIZE),
        (BATCH, SEQ, HEADS, SIZE),
        role_of((1,), (2,), (0,)),
    ),
    Layout(
        "vmapped",
        lambda w, x: jax.vmap(lambda w, x: x @ w)(w, x),
        (LAYERS, D, OUT),
        (LAYERS, BATCH, D),
        role_of((1,), (2,), (0,)),
    ),
    Layout("fused", _fused, (D, OUT), (BATCH, SEQ, D), role_of((0,), (1,))),
    Layout("concatenated", _concatenated, (D, OUT), (BATCH, D), role_of((0,), (1,))),
    Layout("scaled", _scaled, (D, OUT), (BATCH, D), role_of((0,), (1,))),
    Layout("padded", _padded, (D, OUT), (BATCH, SEQ, D), role_of((0,), (1,))),
    Layout("gathered", _gathered, (D, OUT), (BATCH, D), role_of((0,), (1,))),
    Layout("reversed", _reversed, (D, OUT), (BATCH, D), role_of((0,), (1,))),
    Layout("broadcast", _broadcast, (D, OUT), (BATCH, SEQ, D), role_of((0,), (1,))),
    Layout("cast", _cast, (D, OUT), (BATCH, D), role_of((0,), (1,))),
    Layout("nested_jit", _nested_jit, (D, OUT), (BATCH, D), role_of((0,), (1,))),
    Layout("handed_back", _conj, (D, OUT), (BATCH, D), role_of((0,), (1,))),
    Layout(
        "lookup",
        lambda w, x: jnp.take(w, x, axis=0),
        (ROWS, D),
        (BATCH, SEQ),
        role_of((0,), (1,), lookup=True),
        ids=True,
    ),
    Layout(
        "lookup_columns",
        lambda w, x: jnp.take(w, x, axis=1),
        (D, ROWS),
        (BATCH, SEQ),
        role_of((1,), (0,), lookup=True),
        ids=True,
    ),
    Layout(
        "lookup_indexed",
        lambda w, x: w[x] * 2.0,
        (ROWS, D),
        (BATCH, SEQ),
        role_of((0,), (1,), lookup=True),
        ids=True,
    ),
    Layout(
        "tied",
        _tied,
        (ROWS, D),
        (BATCH, SEQ),
        role_of((0,), (1,), lookup=True),
        ids=True,
        depth=2,
    ),
    Layout(
        "scan",
        _scan,
        (LAYERS, D, D),
        (BATCH, D),
        role_of((1,), (2,), (0,), stack=1),
        depth=3,
    ),
    Layout(
        "scan_axis_1",
        _scan_axis_1,
        (D, LAYERS, D),
        (BATCH, D),
        role_of((0,), (2,), (1,), stack=1),
        depth=3,
    ),
    Layout("scan_const", _scan_const, (D, D), (BATCH, D), role_of((0,), (1,)), depth=2),
    Layout("scan_carry", _scan_carry, (D, D), (BATCH, D), role_of((0,), (1,)), depth=2),
    Layout(
        "scan_jit_remat",
        _scan_jit_remat,
        (LAYERS, D, D),
        (BATCH, D),
        role_of((1,), (2,), (0,), stack=1),
        depth=3,
    ),
    Layout(
        "unrolled_stack",
        _unrolled,
        (LAYERS, D, D),
        (BATCH, D),
        role_of((1,), (2,), (0,), stack=1),
        depth=3,
    ),
    Layout(
        "indexed_stack",
        _loop,
        (LAYERS, D, D),
        (BATCH, D),
        role_of((1,), (2,), (0,), stack=1),
        depth=3,
    ),
    *CONVOLUTIONS,
    *RAGGED,
]
