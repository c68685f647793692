"""The ways in which models hold and use a weight. Every kind of adapter takes them all.

Each layout is a function of one weight and one input, with the roles that the axes of
the weight play in it. The roles are written by hand: role inference must find the same.
"""

import jax
import jax.numpy as jnp
from convolutions import CONVOLUTIONS
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from layout import BATCH, HEADS, LAYERS, OUT, ROWS, SEQ, SIZE, D, Layout, role_of
from parts import PARTS
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


def _cond(w, x):
    w = w * 2.0
    return lax.cond(
        x.sum() > 0.0, lambda w, x: x @ w, lambda w, x: jnp.tanh(x @ w) * 0.5, w, x
    )


def _switch(w, x):
    # The index counts experts; one branch does without the weight.
    branches = [lambda w, x, i=i: x @ w[i] for i in range(LAYERS)]
    branches.append(lambda w, x: jnp.zeros((BATCH, OUT), x.dtype))
    return lax.switch(jnp.argmax(x[0, :4]), branches, w, x)


def _cond_weight(w, x):
    # Which weight, rather than which product: every branch hands back one.
    w, y = lax.cond(
        x.sum() > 0.0, lambda w, x: (w * 2.0, x), lambda w, x: (-w, x * 3.0), w, x
    )
    return y @ w


def _while(w, x):
    def small(state):
        i, x, w = state
        return (i < 3) & ((x @ w).sum() < 1e6)

    def step(state):
        i, x, w = state
        return i + 1, jnp.tanh(x @ w), w

    return lax.while_loop(small, step, (0, x, w))[1]


def _while_const(w, x):
    # What loops close over is a constant of their bodies, and of their conditions.
    def step(state):
        return state[0] + 1, jnp.tanh(state[1] @ w)

    def small(state):
        return (state[0] < 2) & ((state[1] @ w).sum() < 1e6)

    return lax.while_loop(small, step, (0, x))[1]


def _associative_scan(w, x):
    return lax.associative_scan(lambda a, b: jnp.tanh(a + b @ w), x, axis=1)


def _shard_map(w, x):
    # The contracted axis lies on eight devices, and the model completes the sum.
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    return jax.shard_map(
        lambda w, x: lax.psum(x @ w, "d"),
        mesh=mesh,
        in_specs=(P("d"), P(None, "d")),
        out_specs=P(),
    )(w, x)


def _stack_scan(w, x):
    # Layers that a model keeps apart, stacked for a scan.
    return _scan(jnp.stack([w, 2.0 * w, jnp.eye(D, dtype=w.dtype), -w]), x)


def _stack_batched(w, x):
    both = jnp.stack([w, w * 0.5], axis=1)
    return jnp.einsum("ebd,def->ebf", x, both)


def _stack_expanded(w, x):
    # The same in smaller steps.
    both = jnp.concatenate([w[None], jnp.ones((1, *w.shape), w.dtype), -2.0 * w[None]])
    return jnp.einsum("bd,edf->ebf", x, both)


def _concatenated_experts(w, x):
    shared = jnp.ones((1, D, OUT), w.dtype)
    return jnp.einsum("ebd,edf->ebf", x, jnp.concatenate([w[1:], 0.5 * w[:1], shared]))


def _split_experts(w, x):
    one, two = jnp.split(w, [1])
    first, *_ = jnp.unstack(w * 2.0)
    return x @ one[0], jnp.einsum("ebd,edf->ebf", jnp.stack([x, -x]), two), x @ first


def _buffer(w, x):
    # Weights written into a stack, one at a time.
    stack = jnp.zeros((LAYERS, D, D), w.dtype).at[1].set(w)
    stack = lax.dynamic_update_slice(stack, 0.5 * w[None], (2, 0, 0))
    return _scan(stack, x)


def _overwritten(w, x):
    w = w.at[0].set(1.0).at[:, 1:3].set(0.5)
    w = w.at[:, jnp.array([4, 3])].set(2.0 * w[:, :2], unique_indices=True)
    return x @ w


def _swapped_experts(w, x):
    w = w.at[jnp.array([2, 0])].set(w[:2], unique_indices=True)
    return jnp.einsum("ebd,edf->ebf", x, w)


def _top_1(w, x):
    # As a router chooses: the index depends on the token.
    expert = jnp.argmax(x[..., :LAYERS], axis=-1)
    return jnp.einsum("bsd,bsdf->bsf", x, w[expert])


def _top_k(w, x):
    gates, experts = lax.top_k(x[..., :LAYERS], 2)
    each = jnp.einsum("td,tkdf->tkf", x, w[experts])
    return jnp.einsum("tkf,tk->tf", each, gates)


def _top_k_middle(w, x):
    # Experts on a middle axis, the indices in another place, and a product per token.
    _, experts = lax.top_k(x[..., :LAYERS], 2)
    chosen = jnp.take(w, experts, axis=1)  # (d, t, k, f)
    return jax.vmap(lambda x, w: jnp.einsum("d,dkf->kf", x, w), in_axes=(0, 1))(
        x, chosen
    )


def _layer_and_expert(w, x):
    expert = jnp.argmax(x[..., :HEADS], axis=-1)
    for layer in range(LAYERS):
        x = jnp.tanh(jnp.einsum("td,tdf->tf", x, w[layer, expert]))
    return x


def _vmapped_choice(w, x):
    # A choice for each of the layers, all at once.
    expert = jnp.argmax(x[..., :HEADS], axis=-1)  # (layers,)
    chosen = jax.vmap(lambda w, i: w[i])(w, expert)
    return jnp.einsum("ld,ldf->lf", x, chosen)


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
    Layout("cond", _cond, (D, OUT), (BATCH, D), role_of((0,), (1,))),
    Layout(
        "switch",
        _switch,
        (LAYERS, D, OUT),
        (BATCH, D),
        role_of((1,), (2,), (0,), stack=1),
    ),
    Layout("cond_weight", _cond_weight, (D, OUT), (BATCH, D), role_of((0,), (1,))),
    Layout(
        "while", _while, (D, D), (BATCH, D), role_of((0,), (1,)), depth=3, reverse=False
    ),
    Layout(
        "while_const",
        _while_const,
        (D, D),
        (BATCH, D),
        role_of((0,), (1,)),
        depth=2,
        reverse=False,
    ),
    Layout(
        "associative_scan",
        _associative_scan,
        (D, D),
        (BATCH, SEQ, D),
        role_of((0,), (1,)),
        depth=2,
    ),
    Layout("stack_scan", _stack_scan, (D, D), (BATCH, D), role_of((0,), (1,)), depth=4),
    Layout(
        "stack_batched", _stack_batched, (D, OUT), (2, BATCH, D), role_of((0,), (1,))
    ),
    Layout(
        "stack_expanded", _stack_expanded, (D, OUT), (BATCH, D), role_of((0,), (1,))
    ),
    Layout(
        "concatenated_experts",
        _concatenated_experts,
        (LAYERS, D, OUT),
        (LAYERS + 1, BATCH, D),
        role_of((1,), (2,), (0,)),
    ),
    Layout(
        "split_experts",
        _split_experts,
        (LAYERS, D, OUT),
        (BATCH, D),
        role_of((1,), (2,), (0,), stack=1),
    ),
    Layout("buffer", _buffer, (D, D), (BATCH, D), role_of((0,), (1,)), depth=3),
    Layout("overwritten", _overwritten, (D, OUT), (BATCH, D), role_of((0,), (1,))),
    Layout(
        "swapped_experts",
        _swapped_experts,
        (LAYERS, D, OUT),
        (LAYERS, BATCH, D),
        role_of((1,), (2,), (0,)),
    ),
    Layout(
        "top_1",
        _top_1,
        (LAYERS, D, OUT),
        (BATCH, SEQ, D),
        role_of((1,), (2,), (0,)),
    ),
    Layout("top_k", _top_k, (LAYERS, D, OUT), (BATCH, D), role_of((1,), (2,), (0,))),
    Layout(
        "top_k_middle",
        _top_k_middle,
        (D, LAYERS, OUT),
        (BATCH, D),
        role_of((0,), (2,), (1,)),
    ),
    Layout(
        "layer_and_expert",
        _layer_and_expert,
        (LAYERS, HEADS, D, D),
        (BATCH, D),
        role_of((2,), (3,), (0, 1)),
        depth=3,
    ),
    Layout(
        "vmapped_choice",
        _vmapped_choice,
        (LAYERS, HEADS, D, OUT),
        (LAYERS, D),
        role_of((2,), (3,), (0, 1)),
    ),
    Layout("shard_map", _shard_map, (D, OUT), (BATCH, D), role_of((0,), (1,))),
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
    *PARTS,
]
