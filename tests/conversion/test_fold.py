"""A residual base and a plain adapter on it, and back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn, started
from helpers import tolerance

import lorax_jax as lj
from lorax_jax._errors import AdapterError


def model(params, x):
    x = x @ params["w"] + params["bias"]
    return jnp.einsum("ni,nih->h", jnp.stack([x] * 3), params["e"])


X = jnp.asarray(np.random.default_rng(1).normal(0, 1, 6), jnp.float32)


def make(dtype=jnp.float32):
    draw = np.random.default_rng(0)
    shapes = {"w": (6, 5), "bias": (5,), "e": (3, 5, 4)}
    return {n: jnp.asarray(draw.normal(0, 1, s), dtype) for n, s in shapes.items()}


def plan_of(params, targets: Any = ("w", "e"), **config: Any):
    whole = lj.LoraConfig(targets, rank=2, alpha=3, **config)
    return lj.plan(whole, params, model, (X.astype(params["w"].dtype),))


def output(params, adapter):
    x = X.astype(params["w"].dtype)
    return np.asarray(lj.adapt(model)(lj.bind(params, adapter), x), np.float64)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
def test_the_residual_and_back(dtype, dora):
    params = make(dtype)
    adapter = started(plan_of(params, dora=dora), params)
    before = jax.tree.map(lambda x: x, params)
    residual, plain = lj.fold(params, adapter)
    assert all(params[name] is before[name] for name in params)
    assert residual["bias"] is params["bias"]
    for name in ("w", "e"):
        a0, b0 = (np.asarray(adapter.fixed[name][n]) for n in ("a0", "b0"))
        scale = np.asarray(adapter.fixed[name]["scale"])
        wanted = np.asarray(params[name], np.float64) - scale * (
            a0.astype(np.float64) @ b0.astype(np.float64)
        )
        assert residual[name].dtype == dtype
        # One rounding: half a unit in the last place, and the sum in float32.
        error = np.abs(np.asarray(residual[name], np.float64) - wanted)
        half = float(jnp.finfo(dtype).eps) / 2
        assert (error <= half * np.abs(wanted) + 1e-6).all()
        assert plain.train[name]["a"] is adapter.train[name]["a"]
        assert "a0" not in plain.fixed[name]
    # The rounding of 2 weights, each of norm 5 at most.
    limit = tolerance(dtype, 6, 8)
    assert np.abs(output(residual, plain) - output(params, adapter)).max() <= limit * 10
    back, again = lj.unfold(residual, plain, adapter, base=params)
    assert all(back[name] is params[name] for name in params)
    assert jax.tree.structure(again) == jax.tree.structure(adapter)
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(adapter), strict=True):
        np.testing.assert_array_equal(x, y)


def test_without_the_base_it_is_right_to_a_unit_in_the_last_place():
    params = make(jnp.bfloat16)
    adapter = started(plan_of(params))
    residual, plain = lj.fold(params, adapter)
    back, _ = lj.unfold(residual, plain, adapter)
    for name in ("w", "e"):
        new, old, left = (
            np.asarray(x[name], np.float64) for x in (back, params, residual)
        )
        unit = float(jnp.finfo(jnp.bfloat16).eps)
        larger = np.maximum(np.abs(left), np.maximum(np.abs(old), np.abs(new)))
        assert (np.abs(new - old) <= unit * larger).all()
    assert back["bias"] is residual["bias"]


def test_what_was_trained_on_the_residual_comes_back():
    params = make()
    adapter = started(plan_of(params))
    residual, plain = lj.fold(params, adapter)
    moved = plain._replace(train=jax.tree.map(lambda x: 1.1 * x, plain.train))
    _, again = lj.unfold(residual, moved, adapter, base=params)
    assert np.abs(output(params, again) - output(residual, moved)).max() <= 1e-4
    assert np.abs(output(params, again) - output(params, adapter)).max() > 0.1


def test_adapters_without_starting_factors_leave_the_base():
    params = make()
    adapter = drawn(plan_of(params))
    residual, plain = lj.fold(params, adapter)
    assert all(residual[name] is params[name] for name in params)
    assert plain.train == adapter.train


def test_parts_of_a_leaf():
    params = make()
    parts = {"q": {1: (0, 2)}, "v": {1: (3, 5)}}
    plan = plan_of(params, {"w": {"parts": parts}})
    adapter = started(plan)
    residual, plain = lj.fold(params, adapter)
    np.testing.assert_array_equal(residual["w"][:, 2], params["w"][:, 2])
    assert (residual["w"][:, :2] != params["w"][:, :2]).all()
    assert np.abs(output(residual, plain) - output(params, adapter)).max() <= 1e-5


def test_quantized_and_replicated_bases_are_refused():
    from lorax_jax.replication import replicate

    stack = {"h": {"w": jnp.ones((2, 4, 4))}}
    params = replicate(stack, [(0, 2), (1, 2)], layers="h")

    def layers(params, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, params["h"]["w"])[0]

    plan = lj.plan(lj.LoraConfig("h/w", rank=1), params, layers, (jnp.ones(4),))
    with pytest.raises(AdapterError, match="replicated, which share one array"):
        lj.fold(params, started(plan))


def test_one_use_of_a_tied_table_is_refused():
    params = {"t": jnp.ones((5, 4))}

    def tied(params, ids):
        return params["t"][ids] @ params["t"].T

    config = lj.LoraConfig({"t": {"tie": "head"}}, rank=1)
    plan = lj.plan(config, params, tied, (jnp.zeros(2, int),))
    with pytest.raises(AdapterError, match="tied, and adapted as the head alone"):
        lj.fold(params, started(plan))


def test_adapted_parameters_are_refused():
    params = make()
    adapter = started(plan_of(params))
    with pytest.raises(AdapterError, match="is adapted already"):
        lj.fold(lj.bind(params, adapter), adapter)


def test_wrong_companions_are_refused():
    params = make()
    adapter = started(plan_of(params))
    residual, plain = lj.fold(params, adapter)
    with pytest.raises(AdapterError, match=r"differs from `plain` about \['e'\]"):
        lj.unfold(residual, plain, started(plan_of(params, "w")))
    other = params | {"w": params["w"] + 1}
    with pytest.raises(AdapterError, match="'w' has another residual"):
        lj.unfold(residual, plain, adapter, base=other)
    with pytest.raises(AdapterError, match="'w', which the parameters do not have"):
        lj.unfold(residual, plain, adapter, base={"e": params["e"]})
