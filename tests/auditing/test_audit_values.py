"""Wider activations and gradients of zeros are found, at the model's line."""

import jax
import jax.numpy as jnp
import numpy as np
from audited import LAYERS, build, layer, line_of, model, model_scanned
from jax import lax

import lorax_jax as lj
from lorax_jax.adapters import LowRank
from lorax_jax.auditing import _zeros

# Widths


def test_bfloat16_stays_bfloat16(stack, each):
    fn = model(stack, each)
    params, adapter, x = build(fn, jnp.bfloat16)
    assert adapter.train["head"]["a"].dtype == jnp.float32
    assert lj.audit(fn, params, adapter, x)["no wider activation"].passed


def test_a_base_that_widens_is_not_blamed(stack):
    def wide(w, x):
        y = (x @ w).astype(jnp.float32)
        return (y / (1 + jnp.abs(y))).astype(jnp.bfloat16)

    fn = model(stack, wide)
    params, adapter, x = build(fn, jnp.bfloat16)
    assert lj.audit(fn, params, adapter, x).ok


def widened(self, x, op, inner):
    """A kind of adapter that forgets its output's dtype."""
    y = inner(x).astype(jnp.float32)
    return y + self.delta(x.astype(jnp.float32), op, y)


def test_an_adapter_that_widens_inside_is_blamed(stack, each, monkeypatch):
    """In every layer, although it is cast back; what follows is not blamed."""

    def act(self, x, op, inner):
        return widened(self, x, op, inner).astype(jnp.bfloat16)

    monkeypatch.setattr(LowRank, "act", act)
    fn = model(stack, each)
    params, adapter, x = build(fn, jnp.bfloat16)
    report = lj.audit(fn, params, adapter, x)
    assert [check.name for check in report.failed] == ["no wider activation"]
    found = report["no wider activation"]
    assert found.source.startswith(line_of(layer, "x @ w"))
    assert "makes float32[16,16] where the base has 16 bits" in found.detail


def test_an_adapter_that_hands_on_a_wider_result_is_blamed(each, monkeypatch):
    """Only where it begins: the tanh that goes on in float32 is not to blame."""

    def fn(params, x):
        return each(params["head"], x)

    monkeypatch.setattr(LowRank, "act", widened)
    params, adapter, x = build(model_scanned(), jnp.bfloat16)
    del adapter.train["layers"], adapter.fixed["layers"]
    report = lj.audit(fn, params, adapter, x)
    assert [check.name for check in report.failed] == ["no wider activation"]
    found = report["no wider activation"]
    assert found.source.startswith(line_of(layer, "x @ w"))
    assert "makes float32[16,12] where" in found.detail and "tanh" not in found.detail


# Gradients of zeros


def test_a_stopped_input_is_found(stack, each):
    """Nothing below a `stop_gradient` learns; what lies above it does."""

    def fn(params, x):
        x = stack(each, params["layers"], x)
        return jnp.tanh(lax.stop_gradient(x) @ params["head"])

    params, adapter, x = build(model(stack, each))
    report = lj.audit(fn, params, adapter, x)
    assert [check.name for check in report.failed] == ["no zero gradient"]
    found = report["no zero gradient"]
    assert found.source.startswith(line_of(layer, "x @ w"))
    assert found.detail.count("is zero") == 2 and "'head'" not in found.detail


def test_one_stopped_layer_is_found():
    def fn(params, x):
        for i in range(LAYERS):
            w = params["layers"][i]
            x = x @ (lax.stop_gradient(w) if i == 1 else w)
        return jnp.tanh(x) @ params["head"]

    params, adapter, x = build(model_scanned())
    found = lj.audit(fn, params, adapter, x)["no zero gradient"]
    assert "the gradient of a of 'layers', layer 1 of 3, is zero" in found.detail
    assert "the gradient of b of 'layers', layer 1 of 3, is zero" in found.detail


def test_layers_that_are_left_out_have_no_gradient():
    fn = model_scanned()
    params, _, x = build(fn)
    config = lj.LoraConfig("2/layers", rank=3)
    adapter = lj.init(lj.plan(config, params, fn, (x,)), params, key=jax.random.key(0))
    assert lj.audit(fn, params, adapter, x).ok


def test_the_gradient_of_a_leaf_that_is_trained_whole_is_wanted():
    fn = model_scanned()
    params, _, x = build(fn)
    config = lj.LoraConfig("layers", rank=3, whole="head")
    adapter = lj.init(lj.plan(config, params, fn, (x,)), params, key=jax.random.key(0))
    assert lj.audit(fn, params, adapter, x).ok


def test_a_weight_that_is_not_used_is_found():
    params, adapter, x = build(model_scanned())

    def fn(params, x):
        return jnp.tanh(x @ params["head"])

    found = lj.audit(fn, params, adapter, x)["no zero gradient"]
    assert found.passed is False and found.source == "(never used)"


def test_padded_ranks_have_gradients_where_they_are_true(stack):
    fn = model(stack, layer)
    params, _, x = build(fn)
    targets = {"0/layers": {"rank": 1}, "[12]/layers": {"rank": 4}}
    plan = lj.plan(lj.LoraConfig(targets), params, model_scanned(), (x,))
    adapter = lj.init(plan, params, key=jax.random.key(1))
    assert lj.audit(fn, params, adapter, x).ok
    # The run starts from random B within each layer's true rank only.
    started = _zeros._started(adapter.train["layers"], adapter.fixed["layers"])
    assert (started["b"][0, 1:] == 0).all() and (started["b"][0, 0] != 0).all()
    assert (started["b"][1:] != 0).all()
    assert np.array_equal(started["a"], adapter.train["layers"]["a"])
