"""Base weights that live in host memory, larger together than a device's memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

import lorax_jax as lj
from lorax_jax.adapters import _memory

COUNT, D, F = 5, 6, 10


@pytest.fixture
def params():
    keys = jax.random.split(jax.random.key(0), COUNT)
    return {f"w{i}": jax.random.normal(key, (D, F)) for i, key in enumerate(keys)}


@pytest.fixture
def on_host(params):
    device = jax.devices()[0]
    if "pinned_host" not in {m.kind for m in device.addressable_memories()}:
        pytest.skip("this device has no pinned host memory")
    host = SingleDeviceSharding(device, memory_kind="pinned_host")
    return {name: jax.device_put(leaf, host) for name, leaf in params.items()}


def apply(params, x):
    return sum(x @ params[name] for name in sorted(params))


def make(config, params):
    types = {f"w{i}": jax.ShapeDtypeStruct((D, F), jnp.float32) for i in range(COUNT)}
    plan = lj.plan(lj.LoraConfig("w.", **config), types, apply, (jnp.ones((2, D)),))
    return lj.init(plan, params, key=jax.random.key(1))


def on_device():
    """Weights of this shape in the device's own memory."""
    found = [x for x in jax.live_arrays() if x.shape == (D, F)]
    return [x for x in found if x.sharding.memory_kind == "device"]


@pytest.mark.parametrize("config", [{"dora": True}, {"dora": True, "init": False}])
def test_norms_are_taken_of_one_weight_at_a_time(params, on_host, monkeypatch, config):
    want = jax.tree.map(np.asarray, make({"rank": 2, **config}, params))
    params.clear()
    assert not on_device()
    others, real = [], jax.device_put

    def put(x, *args, **kwargs):
        others.append(len(on_device()))
        return real(x, *args, **kwargs)

    monkeypatch.setattr(_memory.jax, "device_put", put)
    found = make({"rank": 2, **config}, on_host)
    assert others == [0] * COUNT  # when a weight comes, the one before has gone
    assert not on_device()
    for one, other in zip(*map(jax.tree.leaves, (want, found)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_plain_lora_moves_nothing(on_host, monkeypatch):
    monkeypatch.setattr(_memory.jax, "device_put", None)  # would raise if it were used
    assert make({"rank": 2}, on_host).train["w0"]["a"].shape == (D, 2)


def streamed(params, x):
    """A model that brings each weight to the device when it is used."""
    for name in sorted(params):
        x = x @ jax.device_put(params[name], jax.memory.Space.Device)
        x = jnp.tanh(x @ jnp.ones((F, D)))
    return x


@pytest.mark.parametrize("dora", [False, True])
def test_a_model_streams_its_weights(params, on_host, dora):
    """Plans, starts, trains and merges on weights that never all leave the host."""
    x = jax.random.normal(jax.random.key(2), (3, D))
    config = lj.LoraConfig("w.", rank=2, dora=dora, init=dora)

    def run(params):
        plan = lj.plan(config, params, streamed, (x,))
        train, fixed = lj.init(plan, params, key=jax.random.key(1))

        def loss(train):
            bound = lj.bind(params, lj.Adapter(train, fixed))
            return jnp.sin(lj.adapt(streamed)(bound, x)).sum()

        return jax.jit(jax.value_and_grad(loss))(train)

    found, want = run(on_host), run(params)
    for one, other in zip(*map(jax.tree.leaves, (found, want)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
