"""Where tokens are in every array: by data flow, never by shape."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from berts import BERT
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

from lorax_jax import models
from lorax_jax._errors import FollowError
from lorax_jax.transform import Lost, Stretch, _jaxpr, follow, lay_out
from lorax_jax.transform._jaxpr import equations
from lorax_jax.transform._stretches import entire

B, S, D = 2, 6, 4
X = jnp.ones((B, S, D))
W = jnp.ones((D, D))
TOKENS = jnp.arange(1, B * S + 1, dtype=jnp.float32).reshape(B, S)


def trace(fn, *args, starts=None):
    """The followed jaxpr of `fn`, whose first argument holds the tokens."""
    jaxpr = jax.make_jaxpr(fn)(*args)
    return jaxpr, follow(jaxpr, {0: (0, 1)} if starts is None else starts)


def results(fn, *args, starts=None):
    return trace(fn, *args, starts=starts)[1].results


def said(axes):
    """Axes in short: the labels along each, merged ones together, `-` for lost."""

    def one(axis):
        return "-" if isinstance(axis, Lost) else tuple(s.label for s in axis)

    return [one(axis) for axis in axes]


def products(jaxpr):
    return [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]


BATCH, SEQ = (0,), (1,)


OPERATIONS = {
    "sum": (lambda x: x.sum(1), [BATCH, ()]),
    "norm": (lambda x: x - x.mean(-1, keepdims=True), [BATCH, SEQ, ()]),
    "softmax": (jax.nn.softmax, [BATCH, SEQ, ()]),
    "along": (lambda x: jax.nn.softmax(x, 1), [BATCH, SEQ, ()]),
    "cumsum": (lambda x: jnp.cumsum(x, 1), [BATCH, SEQ, ()]),
    "transpose": (lambda x: x.transpose(1, 2, 0), [SEQ, (), BATCH]),
    "merge": (lambda x: x.reshape(-1, D), [(0, 1), ()]),
    "merge-other": (lambda x: x.transpose(1, 0, 2).reshape(-1, D), [(1, 0), ()]),
    "merge-all": (lambda x: x.reshape(-1), [(0, 1, None)]),
    "back": (lambda x: x.reshape(-1, D).reshape(B, S, D), [BATCH, SEQ, ()]),
    "heads": (lambda x: x.reshape(B, S, 2, 2), [BATCH, SEQ, (), ()]),
    "chunks": (lambda x: x.reshape(B, 2, 3, D), [BATCH, SEQ, SEQ, ()]),
    "new axes": (lambda x: x[:, None, :, None], [BATCH, (), SEQ, (), ()]),
    "squeeze": (lambda x: x[:, None].squeeze(1), [BATCH, SEQ, ()]),
    "repeat": (
        lambda x: jnp.repeat(x[:, :, None], 3, axis=2).reshape(B, S * 3, D),
        [BATCH, (1, None), ()],
    ),
    "features": (lambda x: x[..., 1:3], [BATCH, SEQ, ()]),
    "rotate": (
        lambda x: jnp.concatenate([-x[..., 2:], x[..., :2]], -1),
        [BATCH, SEQ, ()],
    ),
    "positions": (lambda x: x + jnp.ones((1, S, D)), [BATCH, SEQ, ()]),
    "where": (lambda x: jnp.where(x > 0, x, 0.0), [BATCH, SEQ, ()]),
    "last": (lambda x: x[:, -1], [BATCH, ()]),
    "split": (lambda x: jnp.split(x, 2, axis=1)[1], [BATCH, SEQ, ()]),
    "gram": (lambda x: x.swapaxes(1, 2) @ x, [BATCH, (), ()]),
    "scores": (lambda x: x @ x.swapaxes(1, 2), [BATCH, SEQ, SEQ]),
    "attend": (
        lambda x: jax.nn.softmax(x @ x.swapaxes(1, 2)) @ x,
        [BATCH, SEQ, ()],
    ),
    "top_k": (lambda x: lax.top_k(x, 2)[0], [BATCH, SEQ, ()]),
    "one hot": (lambda x: jax.nn.one_hot(jnp.argmax(x, -1), 3), [BATCH, SEQ, ()]),
    "optimization_barrier": (lax.optimization_barrier, [BATCH, SEQ, ()]),
    "real fft": (lambda x: jnp.fft.rfft(x), [BATCH, SEQ, ()]),
    "pointwise conv": (
        lambda x: conv(x, jnp.ones((1, D, D)), "VALID"),
        [BATCH, SEQ, ()],
    ),
    "causal conv": (
        lambda x: conv(x, jnp.ones((3, 1, D)), [(2, 0)], D),
        [BATCH, SEQ, ()],
    ),
    "centered conv": (
        lambda x: conv(x, jnp.ones((3, D, D)), "SAME"),
        [BATCH, SEQ, ()],
    ),
    "ragged": (
        lambda x: lax.ragged_dot(
            x.reshape(-1, D), jnp.ones((2, D, 3)), jnp.array([4, 8])
        ),
        [(0, 1), ()],
    ),
    "written features": (lambda x: x.at[..., 1].set(0.0), [BATCH, SEQ, ()]),
    "vmap": (jax.vmap(lambda x: jnp.tanh(x @ W)), [BATCH, SEQ, ()]),
    "vmap 1": (jax.vmap(lambda x: x @ W, 1, 0), [SEQ, BATCH, ()]),
    "vmapped gather": (
        jax.vmap(lambda x: x[:, jnp.argmax(x[0])]),
        [BATCH, SEQ],
    ),
    "take along": (
        lambda x: jnp.take_along_axis(x, jnp.argmax(x, -1)[..., None], -1)[..., 0],
        [BATCH, SEQ],
    ),
    # From here on, orders that are not known.
    "sort": (lambda x: jnp.sort(x, 1), [BATCH, "-", ()]),
    "permutation": (lambda x: x[:, jnp.argsort(x[0, :, 0])], [BATCH, "-", ()]),
    "fixed permutation": (
        lambda x: x[:, jnp.array([1, 0, 2, 3, 5, 4])],
        [BATCH, "-", ()],
    ),
    "sorted rows": (
        lambda x: x.reshape(-1, D)[jnp.argsort(x[..., 0].reshape(-1))],
        ["-", ()],
    ),
    "added": (lambda x: x + x[:, jnp.argsort(x[0, :, 0])], [BATCH, "-", ()]),
    "shift": (
        lambda x: jnp.concatenate([jnp.zeros((B, 1, D)), x[:, :-1]], 1),
        [BATCH, "-", ()],
    ),
    "shift by pad": (
        lambda x: x + jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1],
        [BATCH, "-", ()],
    ),
    "roll": (lambda x: jnp.roll(x, 1, 1), [BATCH, "-", ()]),
    "reversed twin": (lambda x: x + x[:, ::-1], [BATCH, "-", ()]),
    "cls": (
        lambda x: jnp.concatenate([jnp.zeros((B, 1, D)), x], 1),
        [BATCH, "-", ()],
    ),
    "twice": (lambda x: jnp.concatenate([x, x], 1), [BATCH, "-", ()]),
    "dynamic slice": (
        lambda x: lax.dynamic_slice_in_dim(x, jnp.argmax(x[0, :, 0]), 3, 1),
        [BATCH, "-", ()],
    ),
    "cache": (
        lambda x: lax.dynamic_update_slice(
            jnp.zeros((B, 9, D)), x, (0, jnp.argmax(x[0, :, 0]), 0)
        ),
        [BATCH, "-", ()],
    ),
    "top tokens": (
        lambda x: lax.top_k(x.swapaxes(1, 2), 2)[0],
        [BATCH, (), "-"],
    ),
    "scatter": (
        lambda x: jnp.zeros((9, D)).at[jnp.argsort(x[0, :, 0])].add(x[0]),
        ["-", ()],
    ),
    "segments": (
        lambda x: jax.ops.segment_sum(x[0], jnp.array([0, 0, 1, 1, 2, 2]), 3),
        ["-", ()],
    ),
    "fft": (lambda x: jnp.fft.fft(x, axis=1).real, [BATCH, "-", ()]),
    "strided conv": (
        lambda x: conv(x, jnp.ones((3, D, D)), "SAME", stride=2),
        [BATCH, "-", ()],
    ),
    "valid conv": (
        lambda x: conv(x, jnp.ones((3, D, D)), "VALID"),
        [BATCH, "-", ()],
    ),
    "pooling": (
        lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 1), (1, 1, 1), "SAME"),
        [BATCH, "-", ()],
    ),
    "mixed reshape": (lambda x: x.reshape(3, 4, D), ["-", "-", ()]),
    "unknown": (lambda x: lax.linalg.qr(x)[0], ["-", "-", "-"]),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name):
    fn, expected = OPERATIONS[name]
    [axes] = results(fn, X)
    assert said(axes) == expected


def conv(x, kernel, padding, groups=1, stride=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride,),
        padding,
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=groups,
    )


# What the axes say must be true of an array that holds a number for each token.

STEPS = [
    "transpose", "reshape", "expand", "squeeze", "repeat", "slice", "reverse", "pad",
    "halves", "scan", "reduce", "max", "sort",
]  # fmt: skip


def draw_step(draw, shape):
    """One operation on an array of this shape, and whether it keeps the order known."""
    ndim = len(shape)
    kind = draw(st.sampled_from(STEPS))
    axis = draw(st.integers(0, ndim - 1))
    n = shape[axis]
    if kind == "transpose":
        order = draw(st.permutations(range(ndim)))
        return kind, lambda x: x.transpose(order)
    if kind == "reshape":
        sizes, left = [], int(np.prod(shape))
        while left > 1 and len(sizes) < 4:
            divisors = [d for d in range(2, left + 1) if left % d == 0]
            sizes.append(draw(st.sampled_from(divisors)))
            left //= sizes[-1]
        if left > 1:
            sizes.append(left)
        sizes.insert(draw(st.integers(0, len(sizes))), 1)
        return kind, lambda x: x.reshape(sizes)
    if kind == "expand":
        return kind, lambda x: jnp.expand_dims(x, axis)
    if kind == "squeeze":
        return kind, lambda x: jnp.squeeze(
            x, [i for i, m in enumerate(shape) if m == 1]
        )
    if kind == "repeat":
        times = draw(st.integers(2, 3))
        return kind, lambda x: jnp.repeat(jnp.expand_dims(x, axis), times, axis)
    if kind == "slice":
        start = draw(st.integers(0, n - 1))
        stop = draw(st.integers(start + 1, n))
        stride = draw(st.integers(1, 2))
        return kind, lambda x: lax.slice_in_dim(x, start, stop, stride, axis)
    if kind == "reverse":
        return kind, lambda x: jnp.flip(x, axis)
    if kind == "pad":
        low, high = draw(st.integers(0, 2)), draw(st.integers(-1 if n > 1 else 0, 2))
        config = [(low, high, 0) if i == axis else (0, 0, 0) for i in range(ndim)]
        return kind, lambda x: lax.pad(x, jnp.float32(0), config)
    if kind == "halves":
        at = draw(st.integers(0, n))
        flip = draw(st.booleans())

        def halves(x):
            parts = jnp.split(x, [at], axis)
            return jnp.concatenate(parts[::-1] if flip else parts, axis)

        return kind, halves
    if kind == "scan":

        def scanned(x):
            body = lambda carry, x: (carry, jnp.flip(x, 0) if x.ndim else x)  # noqa: E731
            return lax.scan(body, 0.0, x, reverse=True)[1]

        return kind, scanned
    if kind == "reduce":
        return kind, lambda x: x.max(axis)
    if kind == "max":
        return kind, lambda x: jnp.maximum(x, jnp.swapaxes(x, 0, -1).reshape(x.shape))
    return kind, lambda x: -jnp.sort(-x, axis)


@st.composite
def chains(draw):
    """A tracked array of shape (batch, seq), or both beside features, and steps."""
    batch, seq = draw(st.sampled_from([(2, 3), (3, 4), (2, 2), (1, 4), (4, 6)]))
    width = draw(st.sampled_from([None, 1, 2, 3]))
    shape = (batch, seq) if width is None else (batch, seq, width)
    steps, x = [], jax.ShapeDtypeStruct(shape, jnp.float32)
    for _ in range(draw(st.integers(1, 6))):
        if not x.shape:
            break
        kind, step = draw_step(draw, x.shape)
        after = jax.eval_shape(step, x)
        if np.prod(after.shape) > 300 or len(after.shape) > 6:
            continue
        steps.append((kind, step))
        x = after
    return shape, steps


KEPT = {"transpose", "expand", "squeeze", "repeat", "reverse", "scan"}


@settings(max_examples=400, deadline=None)
@given(chains())
def test_axes_say_which_token_is_where(chain):
    """Every entry of the result is the number of the token that its axes say.

    Where the order is lost, or tokens are gone, nothing is said; what only moves
    entries about never loses it.
    """
    shape, steps = chain
    tokens = jnp.arange(1.0, 1 + shape[0] * shape[1]).reshape(shape[:2])
    x = jnp.broadcast_to(tokens.reshape(shape[:2] + (1,) * (len(shape) - 2)), shape)

    def fn(x):
        for _, step in steps:
            x = step(x)
        return x

    [axes] = results(fn, x)
    kinds = {kind for kind, _ in steps}
    if kinds <= KEPT:
        assert not any(isinstance(axis, Lost) for axis in axes)
    try:
        expected = lay_out(tokens, axes, fn(x).shape)
    except FollowError:
        assert not kinds <= KEPT
        return
    found = np.asarray(fn(x))
    # Padding along features is a zero beside a token, not another token.
    np.testing.assert_array_equal(found, np.where(found == 0, 0, expected))


# Bodies: calls, branches and loops.


def with_derivative(fn):
    fn = jax.custom_vjp(fn)
    fn.defvjp(lambda *args: (fn(*args), None), lambda _, dy: dy)
    return fn


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, with_derivative])
def test_calls_are_entered(wrap):
    jaxpr, followed = trace(wrap(lambda x: x.swapaxes(0, 1) @ W), X)
    [product] = products(jaxpr)
    assert said(followed.axes(product, 0)) == [SEQ, BATCH, ()]
    assert said(followed.results[0]) == [SEQ, BATCH, ()]


def test_layers_are_scanned():
    """The body is the same for all; weights have an axis of layers, tokens do not."""

    def model(x, layers):
        block = jax.checkpoint(lambda x, w: (x + jnp.tanh(x @ w), x.sum(1)))
        return lax.scan(block, x, layers)

    jaxpr, followed = trace(model, X, jnp.ones((3, D, D)))
    [product] = products(jaxpr)
    assert said(followed.axes(product, 0)) == [BATCH, SEQ, ()]
    assert [said(axes) for axes in followed.results] == [
        [BATCH, SEQ, ()],
        [(), BATCH, ()],
    ]


def test_time_is_scanned():
    """Inside there is one token at a time; outside its results stand where it stood."""

    def rnn(x):
        def cell(h, x):
            h = jnp.tanh(x @ W + h)
            return h, h

        h, ys = lax.scan(cell, jnp.zeros((B, D)), x.swapaxes(0, 1), reverse=True)
        return h, ys.swapaxes(0, 1)

    jaxpr, followed = trace(rnn, X)
    assert [said(axes) for axes in followed.results] == [[BATCH, ()], [BATCH, SEQ, ()]]
    axes = followed.axes(products(jaxpr)[0], 0)
    assert said(axes) == [BATCH, ()]
    with pytest.raises(FollowError, match=r"no axis of the array runs along axis 1"):
        lay_out(TOKENS, axes, (B, D))


def test_chunks_are_scanned():
    """One chunk holds positions of the sequence that depend on the turn."""

    def chunked(x):
        chunks = x.reshape(B, 2, 3, D).swapaxes(0, 1)
        return lax.map(lambda x: x @ W, chunks).swapaxes(0, 1).reshape(B, S, D)

    jaxpr, followed = trace(chunked, X)
    assert said(followed.results[0]) == [BATCH, SEQ, ()]
    axes = followed.axes(products(jaxpr)[0], 0)
    with pytest.raises(FollowError, match=r"in pieces of sizes \[3\]"):
        lay_out(TOKENS, axes, (B, 3, D))


def test_loops_turn_until_nothing_changes():
    """The reversal reaches the last place after three turns."""

    def turn(carry):
        a, b, c = carry
        return a[:, ::-1], a, b

    def looped(x):
        zero = jnp.zeros_like(x)
        return lax.fori_loop(0, 5, lambda _, carry: turn(carry), (x, zero, zero))

    found = results(looped, X)
    assert [said(axes) for axes in found] == [[BATCH, "-", ()]] * 3

    def steady(x):
        start = (jnp.zeros(()), x, jnp.zeros_like(x))
        go = lambda c: c[0] < 5  # noqa: E731
        return lax.while_loop(go, lambda c: (c[0] + 1, c[1] @ W, c[1] + c[2]), start)

    jaxpr, followed = trace(steady, X)
    assert [said(axes) for axes in followed.results[1:]] == [[BATCH, SEQ, ()]] * 2
    assert said(followed.axes(products(jaxpr)[0], 0)) == [BATCH, SEQ, ()]


def test_branches_must_agree():
    def fn(x, flip, other):
        return lax.cond(flip, lambda x: other(x), lambda x: x, x)

    same = results(lambda x, f: fn(x, f, lambda x: x + 1), X, True)
    assert said(same[0]) == [BATCH, SEQ, ()]
    constant = results(lambda x, f: fn(x, f, jnp.zeros_like), X, True)
    assert said(constant[0]) == [BATCH, SEQ, ()]
    flipped = results(lambda x, f: fn(x, f, lambda x: x[:, ::-1]), X, True)
    assert said(flipped[0]) == [BATCH, "-", ()]


def test_a_shared_function_must_be_called_alike():
    """Its equations are the same ones whoever calls it: jaxprs are shared."""
    layer = jax.jit(lambda x: x @ W)
    for second, problem in [
        (lambda x: x + 1, None),
        (lambda x: x[:, ::-1], "one function is called"),
        (jnp.zeros_like, "one function is called"),  # no tokens of these
        (lambda x: jnp.sort(x, 1), "they are sorted"),
    ]:
        jaxpr, followed = trace(
            lambda x, second=second: layer(x) + layer(second(x)).sum(1, keepdims=True),
            X,
        )
        first, again = products(jaxpr)
        assert first is again
        if problem is None:
            assert said(followed.axes(first, 0)) == [BATCH, SEQ, ()]
        else:
            with pytest.raises(FollowError, match=problem):
                followed.axes(first, 0)
            if second is not jnp.zeros_like:
                assert said(followed.axes(first, 0, among=[0, 2])) == [BATCH, ()]


def test_equations_without_dead_results_are_the_same():
    """An interpreter may drop results of a scan: what is inside stays known."""
    from lorax_jax.transform._jaxpr import without_results

    def model(x, layers):
        body = lambda x, w: (jax.jit(lambda x: x @ w)(x), x.sum(1))  # noqa: E731
        return lax.scan(body, x, layers)

    jaxpr, followed = trace(model, X, jnp.ones((3, D, D)))
    [scan] = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
    smaller, _ = without_results(scan, [False, True])
    assert smaller is not scan
    [product] = products(smaller.params["jaxpr"])
    assert said(followed.axes(product, 0)) == [BATCH, SEQ, ()]


# Tokens divided among devices.

MESH = ("data", "model")


@pytest.fixture
def mesh():
    return jax.make_mesh(
        (2, 2),
        MESH,
        devices=jax.devices()[:4],
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
    )


@pytest.mark.parametrize(
    ("split", "back", "body", "expected"),
    [
        (P("data"), P("data"), lambda x: x @ W, [BATCH, SEQ, ()]),
        (P("data"), P("data"), lambda x: lax.psum(x, "model"), [BATCH, SEQ, ()]),
        (P(), P(), lambda x: x @ W, [BATCH, SEQ, ()]),
        (P(None, "data"), P("data"), lambda x: x.swapaxes(0, 1), [SEQ, BATCH, ()]),
        (P(None, None, "model"), P(), lambda x: lax.psum(x, "model"), [BATCH, SEQ, ()]),
        (P("data"), P(), lambda x: lax.psum(x, "data"), ["-", SEQ, ()]),
        (P("data"), P(None, "data"), lambda x: x, ["-", "-", ()]),
        (P(None, "data"), P(None, "model"), lambda x: x, [BATCH, "-", ()]),
        (P(), P("data"), lambda x: x, ["-", SEQ, ()]),
        (P(None, "data"), P(None, "data"), lambda x: x[:, ::-1], [BATCH, "-", ()]),
    ],
)
def test_shard_map(mesh, split, back, body, expected):
    x = jnp.ones((4, 8, D))
    mapped = jax.shard_map(
        body, mesh=mesh, in_specs=split, out_specs=back, check_vma=False
    )
    jaxpr, followed = trace(mapped, x)
    assert said(followed.results[0]) == expected
    for product in products(jaxpr):
        if split == P():
            assert said(followed.axes(product, 0)) == [BATCH, SEQ, ()]
        else:
            with pytest.raises(FollowError, match=r"inside a `shard_map` that divides"):
                followed.axes(product, 0)


# Two arrays of equal shapes.


def test_equal_sizes_are_told_apart():
    """batch == seq == width: an axis is what flowed into it."""
    x = jnp.ones((4, 4, 4))

    def fn(x):
        scores = jnp.einsum("bqd,bkd->bqk", x, x)
        return scores, jnp.einsum("bqk,bkd->qbd", scores, x), jnp.einsum("bsd->dsb", x)

    found = [said(axes) for axes in results(fn, x)]
    assert found == [[BATCH, SEQ, SEQ], [SEQ, BATCH, ()], [(), SEQ, BATCH]]
    [mixed] = results(lambda x: x + x.swapaxes(0, 1), x)
    assert said(mixed) == ["-", "-", ()]


def test_cross_attention_of_equal_lengths():
    """Only the queries' tokens are followed; keys of another text are as long."""

    def attend(x, context, w):
        q, k, v = x @ w, context @ w, context @ w
        scores = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", q, k))
        return jnp.einsum("bqk,bkd->bqd", scores, v) @ w

    jaxpr, followed = trace(attend, X, X, W)
    with_weight = [e for e in products(jaxpr) if e.invars[1].aval.shape == (D, D)]
    found = [said(followed.axes(e, 0)) for e in with_weight]
    tokens, other = [BATCH, SEQ, ()], [(), (), ()]
    assert sorted(found, key=str) == sorted([tokens, other, other, tokens], key=str)
    with pytest.raises(FollowError, match="or never entered it"):
        lay_out(TOKENS, ((), ()), (B, S))

    jaxpr, followed = trace(attend, X, X, W, starts={1: (0, 1)})
    found = [said(followed.axes(e, 0)) for e in with_weight_of(jaxpr)]
    # The output has one row for each query, batch by batch as the keys have.
    mixed = [BATCH, (), ()]
    assert sorted(found, key=str) == sorted([other, tokens, tokens, mixed], key=str)


def with_weight_of(jaxpr):
    return [e for e in products(jaxpr) if e.invars[1].aval.shape == (D, D)]


# Experts.


def test_tokens_sorted_by_expert_are_refused(relaxed):
    """As many sorted rows as tokens: a mask would fit, and would be wrong."""

    def moe(x, router, experts):
        rows = x.reshape(-1, D)
        expert = jnp.argmax(rows @ router, -1)
        order = jnp.argsort(expert)
        sizes = jnp.bincount(expert, length=2)
        out = lax.ragged_dot(rows[order], experts, sizes)
        return jnp.zeros_like(out).at[order].set(out).reshape(x.shape)

    args = X, jnp.ones((D, 2)), jnp.ones((2, D, D))
    jaxpr, followed = trace(moe, *args)
    [product] = [e for e in equations(jaxpr) if e.primitive.name.startswith("ragged")]
    with pytest.raises(FollowError, match=r"lost +`gather`: tokens are picked") as info:
        followed.axes(product, 0, among=[0])
    assert re.search(r"at  .*test_follow.py:\d+ \(.*moe\)", str(info.value))
    [router] = [e for e in products(jaxpr) if e.invars[1].aval.shape == (D, 2)]
    assert said(followed.axes(router, 0)) == [(0, 1), ()]
    assert said(followed.results[0]) == ["-", "-", ()]


def test_tokens_sent_to_experts_by_a_product_are_refused(relaxed):
    """Slots of an expert hold other tokens in every batch; the batch is still known."""

    def moe(x, router, experts):
        gates = jax.nn.softmax(x @ router)
        expert = jax.nn.one_hot(jnp.argmax(gates, -1), 2)
        place = jnp.cumsum(expert, 1) * expert
        send = jax.nn.one_hot(place.astype(int) - 1, 3) * expert[..., None]
        sent = jnp.einsum("bsec,bsd->becd", send, x)
        out = jnp.einsum("becd,edf->becf", sent, experts)
        return jnp.einsum("becf,bsec,bse->bsf", out, send, gates)

    args = X, jnp.ones((D, 2)), jnp.ones((2, D, 5))
    jaxpr, followed = trace(moe, *args)
    [(product, x)] = [
        (e, 1 - at)
        for e in products(jaxpr)
        for at, v in enumerate(e.invars)
        if v.aval.shape == args[2].shape
    ]
    axes = followed.axes(product, x)
    assert sorted(said(axes)) == [(), (), (), BATCH]
    with pytest.raises(FollowError, match="no axis of the array runs along axis 1"):
        lay_out(TOKENS, axes, product.invars[x].aval.shape)
    assert said(followed.results[0]) == [BATCH, SEQ, ()]


def test_experts_in_parallel_are_followed():
    """Every expert sees every token, and the mask is repeated for each."""

    def moe(x, router, experts):
        out = jnp.einsum("bsd,edf->ebsf", x, experts)
        return jnp.einsum("ebsf,bse->bsf", out, jax.nn.softmax(x @ router))

    args = X, jnp.ones((D, 2)), jnp.ones((2, D, D))
    assert said(results(moe, *args)[0]) == [BATCH, SEQ, ()]


def test_unrolled_steps_are_counted_as_picked():
    """A loop over single tokens: what it stacks is not known to be in order."""

    def rnn(x):
        h, out = jnp.zeros((B, D)), []
        for t in range(S):
            h = jnp.tanh(x[:, t] @ W + h)
            out.append(h)
        return jnp.stack(out, 1)

    [axes] = results(rnn, X)
    assert said(axes) == [BATCH, (), ()]
    with pytest.raises(FollowError, match="picked one by one"):
        lay_out(TOKENS, axes, X.shape)


# Whole models.

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 32,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
CONFIGS = {"llama": LLAMA, "gpt2": GPT2, "bert": BERT}


def followed_model(model, ids, **kwargs):
    """The jaxpr of a model on abstract parameters, its weights and what is followed."""
    leaves, tree = jax.tree.flatten(model.abstract())

    def fn(leaves, ids):
        return model.apply(jax.tree.unflatten(tree, leaves), ids, **kwargs)

    jaxpr = jax.make_jaxpr(fn)(leaves, ids)
    kernels = {leaf.shape[-2:] for leaf in leaves if len(leaf.shape) > 1}
    return jaxpr, kernels, follow(jaxpr, {len(leaves): (0, 1)})


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_models(family, scan, masked):
    """Every weight of every layer sees all tokens in their order."""
    model = models.from_config(CONFIGS[family], scan_layers=scan)
    ids = jnp.zeros((3, 5), int)
    mask = {"mask": jnp.ones((3, 5), int)} if masked else {}
    jaxpr, kernels, followed = followed_model(model, ids, **mask)
    sites = [e for e in products(jaxpr) if e.invars[1].aval.shape in kernels]
    per_layer = {"llama": 7, "gpt2": 4, "bert": 6}[family]
    head = 0 if family == "bert" else 1
    assert len(sites) == (1 if scan else 2) * per_layer + head
    for site in sites:
        assert said(followed.axes(site, 0)) == [BATCH, SEQ, ()]


def evaluate(jaxpr, consts, values, seen):
    """What enters each product, in order; calls are entered, nothing is compiled."""
    env = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, values, strict=True))
    read = lambda v: v.val if _jaxpr.is_literal(v) else env[v]  # noqa: E731
    for eqn in jaxpr.eqns:
        operands = [read(v) for v in eqn.invars]
        if eqn.primitive.name == "dot_general":
            seen.append((eqn, operands))
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if inner is not None:
            inner, held = _jaxpr.closed(inner)
            out = evaluate(inner, held, operands, seen)
        else:
            out = _jaxpr.bind(eqn, operands)
        env.update(zip(eqn.outvars, out, strict=True))
    return [read(v) for v in jaxpr.outvars]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_a_changed_token_reaches(family):
    """Measured: attention looks back, so a token changes no row before its own.

    Along the axis that is said to be the sequence, the first row that changes is the
    token's; along the batch, its text alone changes. Batch, sequence, heads and the
    size of a head are equal.
    """
    n = 4
    config = dict(CONFIGS[family])
    config |= {"num_attention_heads": n, "num_key_value_heads": n, "n_head": n}
    config = {k: v for k, v in config.items() if k in CONFIGS[family]}
    model = models.from_config(config)
    params = model.init(jax.random.key(0))
    ids = jnp.arange(n * n).reshape(n, n)
    jaxpr = jax.make_jaxpr(lambda ids: model.apply(params, ids))(ids)
    followed = follow(jaxpr, {0: (0, 1)})
    runs = []
    for b, t in [(None, None), (2, 1), (0, 3)]:
        changed = ids if b is None else ids.at[b, t].set(31)
        seen = []
        evaluate(*_jaxpr.closed(jaxpr), [changed], seen)
        runs.append((b, t, seen))
    (_, _, before), *others = runs
    checked = 0
    for b, t, after in others:
        for (eqn, old), (_, new) in zip(before, after, strict=True):
            for i in (0, 1):
                labels = said(followed.axes(eqn, i))
                if sorted(labels)[-2:] != [BATCH, SEQ] or labels.count(SEQ) != 1:
                    continue
                differs = np.asarray(old[i]) != np.asarray(new[i])
                at = labels.index(BATCH), labels.index(SEQ)
                rest = tuple(j for j in range(differs.ndim) if j not in at)
                rows = differs.any(axis=rest)
                rows = rows if at[0] < at[1] else rows.T  # (batch, seq)
                np.testing.assert_array_equal(np.flatnonzero(rows.any(1)), [b])
                assert np.flatnonzero(rows[b])[0] == t
                checked += 1
    assert checked > 2 * len(before)  # x of every product, and the keys


@pytest.mark.parametrize("library", ["nnx", "linen"])
def test_flax_attention(library, relaxed):
    """Heads are axes of their own there, and positions are added."""
    if library == "nnx":
        from flax import nnx

        module = nnx.MultiHeadAttention(2, D, decode=False, rngs=nnx.Rngs(0))
        fn = lambda x: module(x + jnp.ones((S, D)))  # noqa: E731
    else:
        from flax import linen

        module = linen.MultiHeadDotProductAttention(2)
        params = module.init(jax.random.key(0), X)
        fn = lambda x: module.apply(params, x + jnp.ones((S, D)))  # noqa: E731
    jaxpr, followed = trace(fn, X)
    assert said(followed.results[0]) == [BATCH, SEQ, ()]
    found = [said(followed.axes(e, 0)) for e in products(jaxpr)]
    assert [BATCH, SEQ, ()] in found  # queries, keys, values
    assert [BATCH, SEQ, (), ()] in found  # the output, of all heads
    assert len(found) == 6


def test_sequence_first(relaxed):
    """(seq, batch, width), as older models keep it, with merged heads."""

    def attend(x, w):
        x = x.swapaxes(0, 1)  # (seq, batch, width)
        heads = (x @ w).reshape(S, B * 2, D // 2).swapaxes(0, 1)  # (batch heads, seq,)
        scores = jax.nn.softmax(heads @ heads.swapaxes(1, 2))
        mixed = (scores @ heads).swapaxes(0, 1).reshape(S, B, D)
        return mixed @ w

    jaxpr, followed = trace(attend, X, W)
    found = [said(followed.axes(e, 0)) for e in with_weight_of(jaxpr)]
    assert found == [[SEQ, BATCH, ()]] * 2
    inner = [said(followed.axes(e, 0)) for e in products(jaxpr)[1:3]]
    assert [(0, None), SEQ, ()] in inner


def test_flash_attention(monkeypatch):
    """cuDNN's kernel has a row for each query. It takes even lengths: others grow."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)

    def attend(x, w):
        x = jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0)))
        out = jax.nn.dot_product_attention(
            x, x, x, is_causal=True, implementation="cudnn"
        )[:, :-1]
        return jnp.einsum("bshd,hde->bse", out, w)

    x, w = jnp.ones((B, 5, 2, 8), jnp.bfloat16), jnp.ones((2, 8, 16), jnp.bfloat16)
    jaxpr, followed = trace(attend, x, w)
    [product] = products(jaxpr)
    assert said(followed.axes(product, 0)) == [BATCH, SEQ, (), ()]
    assert lay_out(jnp.ones((B, 5)), followed.axes(product, 0)[:2], (B, 5)).all()


# Laying out values.


def test_values_are_laid_out():
    def fn(x):
        y = x.transpose(1, 0, 2).reshape(-1, D)  # (seq batch, width)
        return y, jnp.repeat(x[:, ::-1], 2, 2), x[:, 1:], x.reshape(B, 3, 2, D)

    merged, turned, cut, chunks = results(fn, X)
    tokens = np.asarray(TOKENS)
    found = jax.jit(lambda t: lay_out(t, merged[:1], (S * B,)))(TOKENS)
    np.testing.assert_array_equal(found, tokens.T.ravel())
    found = lay_out(TOKENS, turned, (B, S, 2 * D))
    expected = np.repeat(tokens[:, ::-1, None], 2 * D, 2)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(lay_out(TOKENS, cut[:2], (B, 5)), tokens[:, 1:])
    found = lay_out(TOKENS, chunks[:3], (B, 3, 2))
    np.testing.assert_array_equal(found, tokens.reshape(B, 3, 2))
    mask = lay_out(TOKENS > 3, (cut[1], cut[0]), (5, B))
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, (tokens > 3)[:, 1:].T)


def test_padding_gets_a_value_of_its_own():
    fn = lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0))).reshape(B, 3, 3, D)  # noqa: E731
    [axes] = results(fn, X)
    assert said(axes) == [BATCH, SEQ, SEQ, ()]
    found = lay_out(TOKENS, axes[:3], (B, 3, 3), padding=-1)
    expected = np.pad(np.asarray(TOKENS), ((0, 0), (1, 2)), constant_values=-1)
    np.testing.assert_array_equal(found, expected.reshape(B, 3, 3))
    assert not lay_out(TOKENS > 0, axes[:3], (B, 3, 3))[:, 0, 0].any()


def test_one_row_needs_no_axis():
    """A batch of one may come and go: all tokens are of that text."""
    [axes] = results(lambda x: x[0], jnp.ones((1, S, D)))
    found = lay_out(TOKENS[:1], axes[:1], (S,))
    np.testing.assert_array_equal(found, TOKENS[0])


def test_values_that_do_not_fit_are_refused():
    full, merged, scores = entire(0, B), entire(0, B) + entire(1, S), entire(1, S)
    both = (full, scores)
    with pytest.raises(FollowError, match="7 entries along axis 1, which has 6 where"):
        lay_out(jnp.ones((B, 7)), both, (B, S))
    with pytest.raises(FollowError, match="1 entries along axis 1, which has 6 where"):
        lay_out(jnp.ones((B, 1)), both, (B, S))
    with pytest.raises(
        FollowError, match=r"pieces of sizes \[6, 6\].*stands there twice"
    ):
        lay_out(TOKENS, (full, scores, scores), (B, S, S))
    with pytest.raises(FollowError, match="no axis of the array runs along axis 0"):
        lay_out(TOKENS, (scores,), (S,))
    with pytest.raises(FollowError, match="12 entries run along one of 13"):
        lay_out(TOKENS, (merged,), (13,))
    with pytest.raises(
        FollowError, match=r"run along 1, and the values of shape \(2,\)"
    ):
        lay_out(jnp.ones(B), (merged,), (12,))
    with pytest.raises(FollowError, match="got 1 `labels` for values of shape"):
        lay_out(TOKENS, (merged,), (12,), labels=["tokens"])
    with pytest.raises(FollowError, match=r"they are sorted\n  at  model.py:3"):
        lay_out(TOKENS, (Lost("they are sorted", "model.py:3"),), (12,))
    halves = Stretch(1, 3, 2, whole=6, extent=6), Stretch(1, 2, 2, whole=6, extent=6)
    with pytest.raises(FollowError, match="stands there twice"):
        lay_out(jnp.ones(6), (halves[:1], halves[1:]), (3, 2), labels=[1])


# What to follow.


def test_starts():
    ids, embedded = jnp.ones((B, S), int), jnp.ones((B, S, D))
    table = jnp.ones((9, D))
    fn = lambda table, ids, more: (table[ids], table[ids] + more)  # noqa: E731
    jaxpr, followed = trace(fn, table, ids, embedded, starts={1: ("b", "s")})
    assert [said(axes) for axes in followed.results] == [[("b",), ("s",), ()]] * 2
    starts = {1: (None, "s"), 2: ("b", "s")}
    jaxpr, followed = trace(fn, table, ids, embedded, starts=starts)
    assert [said(axes) for axes in followed.results] == [
        [(), ("s",), ()],
        [("b",), ("s",), ()],
    ]
    assert said(trace(fn, table, ids, embedded, starts={})[1].results[0]) == [()] * 3
    for starts, problem in [
        ({3: (0,)}, "names input 3, and the jaxpr has 3"),
        ({1: (0, 1, 2)}, r"axes \(0, 1, 2\) of input 1, which has the shape \(2, 6\)"),
        ({0: (0,), 1: (0,)}, "axis 0 has 9 entries in one input and 2 in input 1"),
    ]:
        with pytest.raises(FollowError, match=problem):
            follow(jaxpr, starts)


def test_other_equations_are_refused():
    _, followed = trace(lambda x: x @ W, X)
    other, _ = trace(lambda x: x @ W + 1, X)
    with pytest.raises(FollowError, match="this `dot_general` is no equation of the"):
        followed.axes(products(other)[0], 0)
