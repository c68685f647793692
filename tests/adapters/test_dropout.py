"""Dropout acts on the input of A, with a key given by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_jax as lj

D, RATE = 64, 0.25


def stack(params, x):
    return jax.lax.scan(lambda x, w: (x @ w, x @ w), x, params["w"])[1]


@pytest.fixture
def setting(key):
    """A stack of zero weights, so that all one sees is the adapter."""
    params = {"w": jnp.zeros((3, D, D))}
    config = lj.LoraConfig("w", rank=4, dropout=RATE, init=False)
    plan = lj.plan(config, params, stack, (jnp.ones((5, D)),))
    return params, lj.init(plan, params, key=key)


def run(setting, key, x, fn=stack):
    params, adapter = setting
    return lj.adapt(fn)(lj.bind(params, adapter, key=key), x)


def test_without_a_key_it_is_off(setting):
    x = jnp.ones((5, D))
    params, adapter = setting
    plain = stack(lj.merge(params, adapter), x)
    np.testing.assert_allclose(run(setting, None, x), plain, rtol=1e-5)


def test_keys_decide(setting):
    x = jnp.ones((5, D))
    one, two, other = (run(setting, jax.random.key(i), x) for i in (0, 0, 1))
    assert np.array_equal(one, two) and not np.allclose(one, other)


def test_every_layer_has_a_mask_of_its_own(setting):
    params, adapter = setting
    same = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), adapter)

    def each(params, x):
        return jax.lax.scan(lambda c, w: (c, x @ w), 0.0, params["w"])[1]

    out = run((params, same), jax.random.key(0), jnp.ones((5, D)), each)
    assert not np.allclose(out[0], out[1]) and not np.allclose(out[1], out[2])


def test_it_keeps_the_mean_and_drops_the_rate(setting):
    """Masks of many keys: the right share of zeros, scaled so that the mean stays."""
    params, adapter = setting
    eye = jnp.eye(D)[None].repeat(3, 0)
    rank_d = {"w": {"a": eye, "b": eye}}
    adapter = lj.Adapter(rank_d, adapter.fixed)

    def first(params, x):
        return x @ params["w"][0]

    x = jnp.ones((40, D))
    keys = jax.random.split(jax.random.key(2), 20)
    out = jax.vmap(lambda key: run((params, adapter), key, x, first))(keys)
    dropped = float((out == 0).mean())
    deviation = np.sqrt(RATE * (1 - RATE) / out.size)
    assert abs(dropped - RATE) < 5 * deviation
    assert set(np.unique(np.asarray(out, np.float32).round(4))) == {
        0.0,
        np.float32(1 / (1 - RATE)).round(4),
    }


def test_remat_sees_the_same_mask(setting):
    params, adapter = setting
    x = jnp.ones((5, D))

    def loss(train, wrap):
        bound = lj.bind(params, lj.Adapter(train, adapter.fixed), key=jax.random.key(1))
        return (wrap(lj.adapt(stack))(bound, x) ** 2).sum()

    plain, saved = (
        jax.grad(loss)(adapter.train, wrap) for wrap in (lambda f: f, jax.checkpoint)
    )
    np.testing.assert_allclose(plain["w"]["a"], saved["w"]["a"], rtol=1e-4, atol=1e-4)
