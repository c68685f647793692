"""Adapters on parts of a fused leaf: as of an unfused model, and no larger."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, equations, tolerance

import lorax_jax as lj
from lorax_jax._errors import AdapterError
from lorax_jax.adapters import Fixed

D, KV, G, SIZE, T = 16, 2, 3, 4, 5
SPLIT = (KV, G + 2, SIZE)
QUERY, VALUE = (0, G), (G + 1, G + 2)


def part(*middle, **more):
    return {1: {"split": SPLIT, "take": (None, middle, None)}, **more}


def attention(q, k, v):
    """Grouped-query attention of (t, kv, g, size), (t, kv, size), (t, kv, size)."""
    scores = jax.nn.softmax(jnp.einsum("tngh,snh->ngts", q, k), axis=-1)
    return jnp.einsum("ngts,snh->tngh", scores, v)


def fused(params, x):
    y = (x @ params["qkv"]).reshape(-1, *SPLIT)
    return attention(y[:, :, :G], y[:, :, G], y[:, :, G + 1])


def unfused(params, x):
    q = (x @ params["q"]).reshape(-1, KV, G, SIZE)
    k, v = ((x @ params[name]).reshape(-1, KV, SIZE) for name in "kv")
    return attention(q, k, v)


@pytest.fixture
def x(key):
    return jax.random.normal(key, (T, D))


@pytest.fixture
def params(key):
    width = KV * (G + 2) * SIZE
    return {"qkv": jax.random.normal(jax.random.fold_in(key, 1), (D, width)) / 4}


def taken(w):
    """The unfused kernels."""
    w = w.reshape(-1, *SPLIT)
    q, k, v = w[:, :, :G], w[:, :, G], w[:, :, G + 1]
    return {n: p.reshape(len(w), -1) for n, p in zip("qkv", (q, k, v), strict=True)}


def plan_of(params, x, **options):
    parts = {"q": part(*QUERY, rank=2), "v": part(*VALUE, rank=3, alpha=6)}
    config = lj.LoraConfig({"qkv": {"parts": parts}}, init=False, **options)
    return lj.plan(config, params, fused, (x,))


@pytest.mark.parametrize("kind", [{}, {"dora": True}, {"rslora": True}])
def test_as_of_an_unfused_model(params, x, key, kind):
    """q and v of the interleaved kernel are those of a model that keeps them apart."""
    plan = plan_of(params, x, **kind)
    together = lj.init(plan, params, key=key)
    apart = taken(params["qkv"])
    rules = {"q": {"rank": 2}, "v": {"rank": 3, "alpha": 6}}
    other = lj.plan(lj.LoraConfig(rules, init=False, **kind), apart, unfused, (x,))
    assert plan.trainable == other.trainable
    separate = lj.init(other, apart, key=key)
    # Away from the start, where every gain of DoRA is 1.
    together = lj.Adapter(
        jax.tree.map(lambda t: 1.5 * t, together.train), together.fixed
    )
    for name in "qv":
        held, like = together.train[f"qkv@{name}"], separate.train[name]
        separate.train[name] = {k: v.reshape(like[k].shape) for k, v in held.items()}
        fixed, like = together.fixed[f"qkv@{name}"], separate.fixed[name]
        for k in like:  # the scale, the rank and DoRA's norms agree
            assert_close(fixed[k].reshape(like[k].shape), like[k], length=D)

    def loss(fn):
        def run(train, fixed, params):
            bound = lj.bind(params, lj.Adapter(train, fixed))
            return jnp.sum(jnp.sin(lj.adapt(fn)(bound, x)))

        return jax.jit(jax.value_and_grad(run))

    value, grads = loss(fused)(together.train, together.fixed, params)
    wanted, expected = loss(unfused)(separate.train, separate.fixed, apart)
    assert_close(value, wanted, length=D, factor=8)
    for name in "qv":
        for k, grad in grads[f"qkv@{name}"].items():
            like = expected[name][k]
            assert_close(grad.reshape(like.shape), like, length=D, factor=8)
    merged = taken(lj.merge(params, together)["qkv"])
    assert_close(merged, lj.merge(apart, separate), length=D)
    # Nobody adapts the keys: not a bit of theirs changes.
    np.testing.assert_array_equal(merged["k"], apart["k"])


def made(jaxpr, size):
    """How many values at least this large the program makes."""
    return sum(
        var.aval.size >= size and bool(var.aval.shape)
        for eqn in equations(jaxpr)
        for var in eqn.outvars
    )


@pytest.mark.parametrize("dora", [False, True])
def test_nothing_of_the_weights_size(params, x, key, dora):
    """Not in the step either: every value of that size is one of the model's own."""
    few, size = x[:2], params["qkv"].size
    adapter = lj.init(plan_of(params, few, dora=dora), params, key=key)

    def run(train, x):
        bound = lj.bind(params, lj.Adapter(train, adapter.fixed))
        return jnp.sum(lj.adapt(fused)(bound, x))

    plain = jax.make_jaxpr(fused)(params, few)
    assert made(plain, size) == 0
    jaxpr = jax.make_jaxpr(jax.grad(run))(adapter.train, few)
    assert made(jaxpr, size) == 0
    assert "scatter" not in str(jaxpr)


def test_a_bias_of_b_is_the_parts(params, x, key):
    plan = plan_of(params, x, lora_bias=True)
    adapter = lj.init(plan, params, key=key)
    for i, train in enumerate(adapter.train.values()):
        train["bias"] = jax.random.normal(jax.random.key(i), train["bias"].shape)
    bound = lj.bind(params, adapter)
    y = lj.adapt(lambda p, x: x @ p["qkv"])(bound, x)
    plain = {
        n: {k: v for k, v in t.items() if k != "bias"} for n, t in adapter.train.items()
    }
    merged = lj.merge(params, lj.Adapter(plain, adapter.fixed))["qkv"]
    shift = np.zeros(SPLIT, np.float32)
    shift[:, :G] = adapter.train["qkv@q"]["bias"]  # scale 1
    shift[:, G + 1 :] = 2 * adapter.train["qkv@v"]["bias"]
    assert_close(y, x @ merged + shift.reshape(1, -1), length=D)
    # And as merged into a bias that the model has.
    layer = {"layer": {"kernel": params["qkv"], "bias": jnp.zeros(shift.size)}}

    def fn(params, x):
        return x @ params["layer"]["kernel"] + params["layer"]["bias"][None]

    rules = {"layer/kernel": {"parts": {"q": part(*QUERY, rank=2)}}}
    plan = lj.plan(lj.LoraConfig(rules, init=False, lora_bias=True), layer, fn, (x,))
    adapter = lj.init(plan, layer, key=key)
    adapter.train["layer/kernel@q"]["bias"] = jnp.ones((KV, G, SIZE))
    expected = lj.adapt(fn)(lj.bind(layer, adapter), x)
    assert_close(fn(lj.merge(layer, adapter), x), expected, length=D)


def test_parts_have_masks_of_their_own(x, key):
    """Dropout of one part leaves the others' alone."""
    params = {"w": jnp.zeros((D, 6))}
    parts = {"a": {1: (0, 3), "dropout": 0.5}, "b": {1: (3, 6), "dropout": 0.5}}
    config = lj.LoraConfig({"w": {"parts": parts}}, rank=1)
    fn = lj.adapt(lambda p, x: x @ p["w"])
    plan = lj.plan(config, params, lambda p, x: x @ p["w"], (x,))
    adapter = lj.init(plan, params, key=key)
    for train in adapter.train.values():
        train |= {"a": jnp.ones((D, 1)), "b": jnp.ones((1, 3))}
    a, b = jnp.split(fn(lj.bind(params, adapter, key=key), x), 2, axis=1)
    assert (a == a[:, :1]).all() and (b == b[:, :1]).all()
    assert not jnp.array_equal(a, b)
    whole = fn(lj.bind(params, adapter), x)
    assert_close(
        whole, jnp.broadcast_to(x.sum(1, keepdims=True), whole.shape), length=D
    )
    mask = 2 * tolerance(jnp.float32, D)
    assert jnp.abs(a[:, 0] - whole[:, 0]).min() > mask  # it is on


def test_bound_to_a_leaf_that_it_does_not_fit(params, x, key):
    adapter = lj.init(plan_of(params, x), params, key=key)
    with pytest.raises(AdapterError, match=r"part    all, 0:2:1 of 2, 0:3:1 of 5"):
        lj.bind({"qkv": jnp.zeros((D, 80))}, adapter)


def test_magnitudes_are_of_whole_columns(params, x, key):
    config = lj.LoraConfig({"qkv": {"parts": {"half": {0: (0, 8)}}}}, rank=2)
    plan = lj.plan(config, params, fused, (x,))
    adapter = lj.init(plan, params, key=key)
    (name,) = adapter.fixed
    role = dataclasses.replace(adapter.fixed[name].role, kind="dora")
    norm = jnp.ones(40)
    fixed = Fixed(role, {**adapter.fixed[name], "norm": norm})
    train = adapter.train[name] | {"magnitude": norm}
    with pytest.raises(AdapterError, match=r"'qkv@half' takes some of the inputs"):
        lj.bind(params, lj.Adapter({name: train}, {name: fixed}))
