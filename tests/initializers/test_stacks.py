"""Layers of one stack at ranks of their own: each draws as it would alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_jax as lj

E, D_IN, D_OUT = 3, 400, 300
RANKS = 1, 4, 9, 4
METHODS = {
    # The scale of A and of B, times which all draws are of one size at every rank.
    "kaiming": (lambda rank: 1 / np.sqrt(3 * D_IN), None),
    "gaussian": (lambda rank: 1 / rank, None),
    "random": (lambda rank: 1 / np.sqrt(3 * D_IN), lambda rank: 1 / np.sqrt(3 * rank)),
}


def stacked(spec):
    """One product for each layer of a stack."""

    def fn(params, x):
        scan = jax.lax.scan
        return scan(lambda x, w: (x, jnp.einsum(spec, x, w)), x, params["w"])[1]

    return fn


MODELS = {
    "dense": (stacked("bd,df->bf"), (D_IN, D_OUT), (2, D_IN)),
    "experts": (stacked("ebd,edf->ebf"), (E, D_IN, D_OUT), (E, 2, D_IN)),
}


@functools.cache
def factors(method, model, dtype="float32"):
    fn, shape, x = MODELS[model]
    params = {"w": jax.ShapeDtypeStruct((len(RANKS), *shape), jnp.float32)}
    rules = {f"{i}/w": {"rank": rank} for i, rank in enumerate(RANKS)}
    config = lj.LoraConfig(rules, alpha=3, init=method, dtype=dtype)
    plan = lj.plan(config, params, fn, (jax.ShapeDtypeStruct(x, jnp.float32),))
    start = lj.init(plan, params, key=jax.random.key(0)).train["w"]
    return np.asarray(start["a"]), np.asarray(start["b"])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_each_layer_draws_at_its_own_rank(method, model):
    a, b = factors(method, model)
    experts = MODELS[model][1][:-2]
    assert a.shape == (len(RANKS), *experts, D_IN, max(RANKS))
    assert b.shape == (len(RANKS), *experts, max(RANKS), D_OUT)
    of_a, of_b = METHODS[method]
    for i, rank in enumerate(RANKS):
        # Exactly zero on both sides of the padding: else one side would move the other.
        assert not a[i, ..., rank:].any() and not b[i, ..., rank:, :].any()
        assert_deviation(a[i, ..., :rank], of_a(rank))
        if of_b is None:
            assert not b[i].any()
        else:
            assert_deviation(b[i, ..., :rank, :], of_b(rank))


def assert_deviation(values, deviation):
    """Within five standard errors of the variance, those of a normal law."""
    error = np.sqrt(2 / values.size)
    assert abs(values.var(dtype=np.float64) / deviation**2 - 1) < 5 * error


@pytest.mark.parametrize("model", MODELS)
def test_layers_and_experts_share_no_draw(model):
    """Those of one rank, which are drawn in one call, too."""
    a, b = factors("random", model)
    for x in (a[..., :1], b[..., :1, :]):
        assert len(np.unique(x)) > 0.99 * x.size


def test_padding_in_another_dtype():
    """Rounded once from float32, and zero stays zero."""
    wanted = factors("random", "experts")
    found = factors("random", "experts", "bfloat16")
    for x, y in zip(found, wanted, strict=True):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_array_equal(x, y.astype(jnp.bfloat16))
