"""Adapters of parts: the audit knows the shapes of leaf, part and factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_jax as lj

WIDTH, OUT, LAYERS, TOKENS = 16, 12, 3, 7


def split_after(w, x):
    gate, up = jnp.split(x @ w, 2, axis=-1)
    return jnp.tanh(gate) * up


def split_before(w, x):
    gate, up = jnp.split(w, 2, axis=1)
    return jnp.tanh(x @ gate) * (x @ up)


def audit(layer, **options):
    def fn(params, x):
        def step(x, w):
            return layer(w, x) @ params["down"], None

        return jnp.sum(jax.lax.scan(step, x, params["up"])[0])

    draw = np.random.default_rng(0)
    shapes = {"up": (LAYERS, WIDTH, 2 * OUT), "down": (OUT, WIDTH)}
    params = {
        n: jnp.asarray(draw.normal(0, 0.2, s), jnp.float32) for n, s in shapes.items()
    }
    rule = {"parts": {"gate": {2: (0, OUT)}, "up": {2: (OUT, 2 * OUT)}}, **options}
    x = jnp.ones((TOKENS, WIDTH))
    plan = lj.plan(lj.LoraConfig({"up": rule}, rank=2), params, fn, (x,))
    adapter = lj.init(plan, params, key=jax.random.key(0))
    return lj.audit(fn, params, adapter, x)


@pytest.mark.parametrize("layer", [split_after, split_before])
@pytest.mark.parametrize("dora", [False, True])
def test_parts_pass(layer, dora):
    report = audit(layer, dora=dora)
    report.raise_if_failed()
    assert len(report.checks) == 6
