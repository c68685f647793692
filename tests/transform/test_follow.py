"""Where tokens are in every array: by data flow, never by shape."""

import jax
import jax.numpy as jnp
import pytest
from followed import (
    BATCH,
    SEQ,
    TOKENS,
    B,
    D,
    S,
    W,
    X,
    products,
    results,
    said,
    trace,
)
from jax import lax
from jax.sharding import PartitionSpec as P

from lorax_jax._errors import FollowError
from lorax_jax.transform import _jaxpr, follow, lay_out


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
    "a part of a chunk": (
        lambda x: x.reshape(B, 2, 3, D)[:, 1, :2],
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

    def model(x, layers):
        body = lambda x, w: (jax.jit(lambda x: x @ w)(x), x.sum(1))  # noqa: E731
        return lax.scan(body, x, layers)

    jaxpr, followed = trace(model, X, jnp.ones((3, D, D)))
    [scan] = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
    smaller, _ = _jaxpr.without_results(scan, [False, True])
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
