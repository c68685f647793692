"""Starts that are taken from the weight, converted, folded, saved and loaded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_jax as lj
from lorax_jax.planning import fitted

X = jnp.asarray(np.random.default_rng(1).normal(0, 1, (5, 12)), jnp.float32)


def model(params, x):
    for i in range(2):
        x = x @ params["h"]["w"][i]
    return x @ params["out"]


@pytest.fixture(scope="module")
def params():
    draw = np.random.default_rng(0)
    shapes = {"h": {"w": (2, 12, 12)}, "out": (12, 8)}
    return jax.tree.map(
        lambda s: jnp.asarray(draw.normal(0, 0.3, s), jnp.float32),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora", "mica"])
def test_all_that_can_be_done_with_them(params, tmp_path, init):
    rules = {"h/w": {"rank": 2}, "out": {"rank": 3}}
    config = lj.LoraConfig(rules, alpha=3, init=init)
    plan = lj.plan(config, params, model, (X,))
    adapter = lj.init(plan, params, key=jax.random.key(0))
    moved = jax.tree.map(lambda x: 1.1 * x + 0.01, adapter.train)
    adapter = adapter._replace(train=moved)

    def output(adapter, params=params):
        return np.asarray(lj.adapt(model)(lj.bind(params, adapter), X))

    wanted = output(adapter)
    assert np.abs(wanted - np.asarray(model(params, X))).max() > 0.01  # it acts
    plain = lj.to_lora(adapter)
    new = fitted(plan, plain)
    counted = lj.count(params, plain)
    assert counted.trainable == new.trainable and counted.total == new.total
    residual, folded = lj.fold(params, adapter)
    found = {"to_lora": output(plain), "fold": output(folded, residual)}
    for name, one, its in (("own", adapter, plan), ("plain", plain, new)):
        lj.save_adapter(tmp_path / name, one, plan=its)
        loaded, receipt = lj.load_adapter(tmp_path / name, params)
        found[name] = output(loaded)
        assert receipt.plan.trainable == its.trainable
        assert jax.tree.structure(loaded) == jax.tree.structure(one)
        assert {site.init for site in receipt.plan} == {init}
    for name, value in found.items():
        np.testing.assert_allclose(value, wanted, atol=1e-5, err_msg=name)
