"""DoRA's numbers: norms, gains, and what stays as it was."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import draw, equations
from jax._src.ad_checkpoint import saved_residuals

import lorax_jax as lj
from lorax_jax.adapters import Fixed, Role, base_norm, column_norm

ROLE = Role("w", (0,), (1,), kind="dora")


def linear(params, x):
    return x @ params["w"]


def stacked(params, x):
    return jax.lax.scan(lambda x, w: (jnp.maximum(x @ w, 0.0), None), x, params["w"])[0]


def started(params, fn, x, key, **config):
    config = {"rank": 3, "alpha": 6, "dora": True} | config
    plan = lj.plan(lj.LoraConfig("w", **config), params, fn, (x,))
    return plan, lj.init(plan, params, key=key)


def moved(adapter, key, size=0.3):
    leaves, tree = jax.tree.flatten(adapter.train)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        x + size * jax.random.normal(k, x.shape, x.dtype)
        for k, x in zip(keys, leaves, strict=True)
    ]
    return adapter._replace(train=jax.tree.unflatten(tree, drawn))


@pytest.mark.parametrize("fn", [linear, stacked])
@pytest.mark.parametrize("jit", [False, True])
def test_it_starts_as_the_base_bit_for_bit(key, fn, jit):
    shape = (48, 40) if fn is linear else (3, 40, 40)
    params, x = {"w": draw(key, shape)}, draw(key, (7, shape[-2]))
    _, adapter = started(params, fn, x, key)

    def run(train, x):
        return lj.adapt(fn)(lj.bind(params, lj.Adapter(train, adapter.fixed)), x)

    wrap = jax.jit if jit else lambda f: f
    assert np.array_equal(wrap(run)(adapter.train, x), wrap(fn)(params, x))
    # In a step that also takes gradients, too.
    loss = wrap(jax.value_and_grad(lambda t: run(t, x).sum()))
    plain = wrap(lambda: fn(params, x).sum())
    assert loss(adapter.train)[0] == plain()


def test_it_starts_as_the_base_where_b_is_not_zero(key):
    """Magnitudes start as the norms of what the factors make of the weight."""
    params, x = {"w": draw(key, (24, 16))}, draw(key, (5, 24))
    _, adapter = started(params, linear, x, key, init=False)
    train, scale = adapter.train["w"], adapter.fixed["w"]["scale"]
    delta = scale * train["a"] @ train["b"]
    np.testing.assert_allclose(
        train["magnitude"], jnp.linalg.norm(params["w"] + delta, axis=0), rtol=1e-5
    )
    ours = lj.adapt(linear)(lj.bind(params, adapter), x)
    np.testing.assert_allclose(ours, x @ (params["w"] + delta), rtol=2e-5, atol=1e-5)


def test_columns_of_zeros(key):
    w = draw(key, (6, 4)).at[:, 1].set(0)
    params, x = {"w": w}, draw(key, (3, 6))
    _, adapter = started(params, linear, x, key)

    def loss(train):
        bound = lj.bind(params, lj.Adapter(train, adapter.fixed))
        return (lj.adapt(linear)(bound, x) ** 2).sum()

    value, grads = jax.value_and_grad(loss)(adapter.train)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    merged = lj.merge(params, adapter)["w"]
    assert np.array_equal(merged, w)


@pytest.mark.parametrize("left", [0.0, 1e-7, 1e-5, 1e-3, 0.1])
def test_a_delta_that_nearly_cancels_the_weight(key, left):
    """What is left is never taken for less than the noise of the sum."""
    a, b = draw(key, (32, 3)), draw(jax.random.key(1), (3, 20))
    w = a @ b
    scale = jnp.asarray(-(1 - left), jnp.float32)
    norm = base_norm(w, ROLE)
    found = np.asarray(column_norm(w, a, b, scale, norm, ROLE), np.float64)
    exact = np.linalg.norm(np.asarray(w, np.float64) * left, axis=0)
    largest = 2 * np.asarray(norm, np.float64)
    eps = np.finfo(np.float32).eps
    assert np.isfinite(found).all() and (found >= 0.9 * eps * largest).all()
    # Squares are right to rounding of the largest of them.
    assert (np.abs(found**2 - exact**2) <= 16 * eps * largest**2).all()


@pytest.mark.parametrize("d_in", [64, 4096])
def test_norms_of_a_base_in_sixteen_bits(key, d_in):
    w = draw(key, (d_in, 96)).astype(jnp.bfloat16)
    wide = np.asarray(w, np.float64)
    exact = np.linalg.norm(wide, axis=0)
    found = np.asarray(base_norm(w, ROLE), np.float64)
    assert (np.abs(found - exact) / exact).max() <= 1e-6
    a, b = 0.1 * draw(key, (d_in, 4)), draw(jax.random.key(1), (4, 96))
    scale = jnp.float32(2.0)
    delta = 2 * np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    exact = np.linalg.norm(wide + delta, axis=0)
    found = np.asarray(column_norm(w, a, b, scale, base_norm(w, ROLE), ROLE), "f8")
    assert (np.abs(found - exact) / exact).max() <= 1e-6


@pytest.mark.parametrize("grad", [False, True])
def test_no_copy_of_the_weight_in_float32(key, grad):
    """Read off the jaxpr of a step on a base in bfloat16, `bind` included."""
    shape = (64, 80)
    params = {"w": draw(key, shape).astype(jnp.bfloat16)}
    x = draw(key, (5, 64)).astype(jnp.bfloat16)
    _, adapter = started(params, linear, x, key)

    def run(train, params, x):
        bound = lj.bind(params, lj.Adapter(train, adapter.fixed))
        return lj.adapt(linear)(bound, x).astype(jnp.float32).sum()

    step = jax.grad(run) if grad else run
    jaxpr = jax.make_jaxpr(step)(adapter.train, params, x)
    made = [
        var.aval
        for eqn in equations(jaxpr)
        for var in eqn.outvars
        if getattr(var.aval, "shape", ()) in (shape, shape[::-1])
    ]
    assert [aval for aval in made if aval.dtype == jnp.float32] == []


def test_what_is_kept_for_the_gradient_has_sixteen_bits(key):
    """Of a scanned model in bfloat16: the magnitudes' gradient needs the results."""
    params = {"w": draw(key, (3, 40, 40)).astype(jnp.bfloat16)}
    x = draw(key, (7, 40)).astype(jnp.bfloat16)
    _, adapter = started(params, stacked, x, key)

    def loss(train):
        bound = lj.bind(params, lj.Adapter(train, adapter.fixed))
        return lj.adapt(stacked)(bound, x).astype(jnp.float32).sum()

    kept = [aval for aval, _ in saved_residuals(loss, adapter.train)]
    along = {aval.dtype for aval in kept if aval.shape == (3, 7, 40)}
    assert along == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.usefixtures("relaxed")  # for Optax
def test_layers_that_are_left_out_stay_as_they_are(key):
    """Twenty steps of AdamW, whose weight decay pulls at every leaf."""
    params, x = {"w": draw(key, (4, 12, 12))}, draw(key, (5, 12))

    def each(params, x):
        return jax.lax.scan(lambda c, w: (c, x @ w), 0.0, params["w"])[1]

    config = lj.LoraConfig(r"w|\d+/w", rank=2, dora=True, layers=[1, 3])
    plan = lj.plan(config, params, each, (x,))
    adapter = lj.init(plan, params, key=key)
    tx = optax.adamw(0.05, weight_decay=0.1)

    def run(train):
        return lj.adapt(each)(lj.bind(params, lj.Adapter(train, adapter.fixed)), x)

    @jax.jit
    def step(train, state):
        grads = jax.grad(lambda t: ((run(t) - 1) ** 2).mean())(train)
        updates, state = tx.update(grads, state, train)
        return optax.apply_updates(train, updates), state

    train, state = adapter.train, tx.init(adapter.train)
    for _ in range(20):
        train, state = step(train, state)
    before, after = each(params, x), run(train)
    for layer, is_adapted in enumerate((False, True, False, True)):
        assert np.array_equal(before[layer], after[layer]) is not is_adapted
    left = jax.tree.map(lambda leaf: leaf[jnp.array([0, 2])], train)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(left))
    merged = lj.merge(params, lj.Adapter(train, adapter.fixed))["w"]
    assert np.array_equal(merged[0], params["w"][0])


def test_no_gradient_goes_through_the_norm(key):
    """As in section 4.3 of the paper: the gradient is that of a constant norm."""
    params, x = {"w": draw(key, (10, 8))}, draw(key, (5, 10))
    _, adapter = started(params, linear, x, key)
    adapter = moved(adapter, key)
    fixed = adapter.fixed["w"]
    scale = fixed["scale"]

    def ours(train):
        bound = lj.bind(params, lj.Adapter({"w": train}, adapter.fixed))
        return (lj.adapt(linear)(bound, x) ** 2).sum()

    start = adapter.train["w"]
    norm = jnp.linalg.norm(params["w"] + scale * start["a"] @ start["b"], axis=0)

    def slow(train):
        whole = params["w"] + scale * train["a"] @ train["b"]
        return ((x @ whole * (train["magnitude"] / norm)[None]) ** 2).sum()

    found, wanted = jax.grad(ours)(start), jax.grad(slow)(start)
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=2e-4, atol=1e-4)


def test_dropout_keeps_the_base_whole(key):
    """`y = x W + (g - 1)(x~ W) + g s (x~ A) B`: its mean is that without dropout."""
    params, x = {"w": draw(key, (16, 4))}, draw(key, (1, 16))
    _, adapter = started(params, linear, x, key, dropout=0.25)
    adapter = moved(adapter, key, 0.2)
    count = 4000

    def run(key):
        return lj.adapt(linear)(lj.bind(params, adapter, key=key), x)[0]

    out = np.asarray(jax.vmap(run)(jax.random.split(key, count)), np.float64)
    train, scale = adapter.train["w"], float(adapter.fixed["w"]["scale"])
    w, row = np.asarray(params["w"], np.float64), np.asarray(x[0], np.float64)
    delta = scale * np.asarray(train["a"] @ train["b"], np.float64)
    gain = np.asarray(train["magnitude"]) / np.linalg.norm(w + delta, axis=0)
    dropped = (gain - 1) * w + gain * delta  # what sees the dropped x
    mean = row @ w + row @ dropped
    variance = 0.25 / 0.75 * (row**2) @ dropped**2
    assert (np.abs(out.mean(0) - mean) <= 5 * np.sqrt(variance / count)).all()
    # The variance of a variance, for sums of sixteen bounded terms, is about 2 / n.
    assert (np.abs(out.var(0) / variance - 1) <= 5 * np.sqrt(3 / count)).all()


def test_the_merged_weight_is_the_formula(key):
    params, x = {"w": draw(key, (10, 8))}, draw(key, (5, 10))
    _, adapter = started(params, linear, x, key)
    adapter = moved(adapter, key)
    train, scale = adapter.train["w"], adapter.fixed["w"]["scale"]
    whole = params["w"] + scale * train["a"] @ train["b"]
    gain = train["magnitude"] / jnp.linalg.norm(whole, axis=0)
    np.testing.assert_allclose(lj.merge(params, adapter)["w"], gain[None] * whole, 1e-5)


def test_a_norm_of_a_base_behind_a_lora_is_the_bases_own(key):
    """Order: the norm is of the base, whatever came before."""
    params, x = {"w": draw(key, (10, 8))}, draw(key, (5, 10))
    _, dora = started(params, linear, x, key)
    dora = moved(dora, key)
    plain = Fixed(
        dataclasses.replace(ROLE, kind="lora"),
        {name: dora.fixed["w"][name] for name in ("scale", "rank")},
    )
    factors = {name: dora.train["w"][name] for name in ("a", "b")}
    lora = lj.Adapter({"w": factors}, {"w": plain})
    alone = lj.bind(params, dora)["w"].terms[0].gain.array
    behind = lj.bind(params, lora, dora)["w"].terms[1].gain.array
    assert np.array_equal(alone, behind)
