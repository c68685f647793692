"""Branches and loops: what they take, what they hand back, what they refuse."""

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, equations, random_adapter
from jax import lax

import lorax_jax as lj
from lorax_jax._errors import TransformError
from lorax_jax.adapters import Adapted, Role

W, V = Role("w", (0,), (1,)), Role("v", (0,), (1,))


@pytest.fixture
def params(key):
    first, second = jax.random.split(key)
    return {
        "w": jax.random.normal(first, (6, 6)) / 2,
        "v": jax.random.normal(second, (6, 6)) / 2,
    }


@pytest.fixture
def adapter(key, params):
    return random_adapter(key, params, [W, V])


@pytest.fixture
def x(key):
    return jax.random.normal(key, (4, 6))


def check(fn, params, adapter, *args):
    bound = lj.bind(params, adapter)
    expected = fn(lj.merge(params, adapter), *args)
    assert_close(lj.adapt(fn)(bound, *args), expected, factor=4)
    assert_close(jax.jit(lj.adapt(fn))(bound, *args), expected, factor=4)


@pytest.mark.parametrize("which", [0, 1])
def test_a_switch_between_two_weights(params, adapter, x, which):
    """Every branch hands back a weight of the same form: so does the switch."""

    def fn(params, x, i):
        w = lax.switch(i, [lambda p: p["w"].T, lambda p: p["v"].T], params)
        return x @ w.T

    check(fn, params, adapter, x, jnp.int32(which))


def test_a_weight_that_all_branches_hand_back_does_not_pass_through(params, adapter, x):
    def fn(params, x):
        return lax.cond(
            x.sum() > 0, lambda w, x: (w, x @ w), lambda w, x: (w, x), params["w"], x
        )

    bound = lj.bind(params, adapter)
    w, _ = lj.adapt(fn)(bound, x)
    assert isinstance(w, Adapted) and w.base is params["w"]
    jaxpr = jax.make_jaxpr(lambda b, x: lj.adapt(fn)(b, x)[1])(bound, x)
    (call,) = [e for e in equations(jaxpr) if e.primitive.name == "cond"]
    assert len(call.outvars) == 1


def test_a_weight_in_some_branches_only_is_refused(params, adapter, x):
    def fn(params, x):
        w = lax.cond(x.sum() > 0, lambda w: w, lambda w: jnp.zeros_like(w), params["w"])
        return x @ w

    with pytest.raises(TransformError, match="`cond`.* some branches and a plain"):
        lj.adapt(fn)(lj.bind(params, adapter), x)
    got = lj.adapt(fn, materialize=("cond",))(lj.bind(params, adapter), x)
    assert_close(got, fn(lj.merge(params, adapter), x))


def test_branches_with_weights_of_different_ranks_are_refused(key, params, x):
    def fn(params, x):
        w = lax.cond(x.sum() > 0, lambda p: p["w"], lambda p: p["v"], params)
        return x @ w

    small = random_adapter(key, params, [W], rank=2)
    large = random_adapter(key, params, [V], rank=3)
    with pytest.raises(TransformError, match="adapters differ in form"):
        lj.adapt(fn)(lj.bind(params, small, large), x)


@pytest.mark.parametrize("loop", ["while", "scan"])
def test_a_weight_that_changes_in_a_carry_is_refused(params, adapter, x, loop):
    def step(state):
        w, x = state
        return w * 0.5, jnp.tanh(x @ w)

    def fn(params, x):
        state = params["w"], x
        if loop == "scan":
            return lax.scan(lambda s, _: (step(s), None), state, None, length=2)[0][1]
        small = lambda state: state[1].sum() < 1e3  # noqa: E731
        return lax.while_loop(small, step, state)[1]

    bound = lj.bind(params, adapter)
    with pytest.raises(TransformError, match=f"`{loop}`.*changes step by step"):
        lj.adapt(fn)(bound, x)
    if loop == "scan":
        got = lj.adapt(fn, materialize="scan")(bound, x)
        assert_close(got, fn(lj.merge(params, adapter), x), factor=4)


@pytest.mark.parametrize("loop", ["while", "scan"])
def test_an_array_in_a_carry_that_becomes_a_weight_is_refused(params, adapter, x, loop):
    def fn(params, x):
        def step(state):
            w, x = state
            return params["w"], jnp.tanh(x @ w)

        state = jnp.eye(6), x
        if loop == "scan":
            return lax.scan(lambda s, _: (step(s), None), state, None, length=2)[0][1]
        return lax.while_loop(lambda s: s[1].sum() < 1e3, step, state)[1]

    with pytest.raises(TransformError, match="array in the carry of the loop becomes"):
        lj.adapt(fn)(lj.bind(params, adapter), x)


def test_a_scan_that_stacks_a_weight_is_refused(params, adapter, x):
    def fn(params, x):
        _, ws = lax.scan(lambda c, _: (c, params["w"]), 0.0, None, length=2)
        return x @ ws[1]

    with pytest.raises(TransformError, match="stacks an adapted weight as a result"):
        lj.adapt(fn)(lj.bind(params, adapter), x)


def test_a_for_loop_with_a_static_bound_has_a_gradient(params, adapter, x):
    """`fori_loop` is a scan then; the weights are read in the body alone."""

    def loss(train, params):
        bound = lj.bind(params, lj.Adapter(train, adapter.fixed))

        def fn(params, x):
            body = lambda i, x: jnp.tanh(x @ params["w"]) @ params["v"]  # noqa: E731
            return lax.fori_loop(0, 3, body, x).sum()

        return lj.adapt(fn)(bound, x)

    grads = jax.grad(loss)(adapter.train, params)
    assert all(leaf.any() for leaf in jax.tree.leaves(grads))


def test_reduced_precision_is_of_the_base_alone(params, adapter, x):
    def fn(params, x):
        return x @ lax.reduce_precision(params["w"], 8, 7)

    bound = lj.bind(params, adapter)
    base = fn(params, x)
    delta = x @ (lj.merge(params, adapter)["w"] - params["w"])
    assert_close(lj.adapt(fn)(bound, x), base + delta, factor=4)


def test_a_barrier_keeps_the_weight_symbolic(params, adapter, x):
    def fn(params, x):
        w, x = lax.optimization_barrier((params["w"], x))
        return x @ w

    check(fn, params, adapter, x)
    jaxpr = jax.make_jaxpr(lj.adapt(fn))(lj.bind(params, adapter), x)
    names = [e.primitive.name for e in equations(jaxpr)]
    assert names.count("optimization_barrier") == 1
