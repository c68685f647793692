"""A step of a scanned Llama: remat changes nothing, and every B moves."""

import jax
import numpy as np
import optax
from tiny_folder import CONFIG

import lorax_jax as lj
from lorax_jax import models, train


def one_step(remat):
    """The adapter after one step of plain gradient descent."""
    model = models.from_config(CONFIG, scan_layers=True, remat=remat)
    params = jax.jit(model.init)(jax.random.key(0))
    ids = np.random.default_rng(0).integers(0, 300, (1, 2, 13)).astype(np.int32)
    config = lj.LoraConfig("all-linear", rank=2, alpha=8, dropout=0.1)
    plan = lj.plan(config, params, model.apply, (ids[0],))
    adapter = lj.init(plan, params, key=jax.random.key(1))
    tx = optax.sgd(10.0)
    state = train.start(adapter, tx, jax.random.key(2))
    batch = train.Windows(ids, np.ones((1, 2, 12), np.float32))
    state, _ = train.make_step(model.apply, tx)(state, adapter.fixed, params, batch)
    return state.train


def test_every_b_moves_with_and_without_remat():
    plain, again = one_step(None), one_step("full")
    for name, factors in plain.items():
        layers = np.asarray(factors["b"]).reshape(CONFIG["num_hidden_layers"], -1)
        assert np.abs(layers).max(axis=1).min() > 0, name
        for factor in ("a", "b"):
            # The same sums, which XLA may order otherwise.
            np.testing.assert_allclose(
                again[name][factor], factors[factor], rtol=1e-4, atol=1e-5
            )
