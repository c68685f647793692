"""Our models with repeated layers, scanned and unrolled: one answer, one file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from helpers import assert_close

import lorax_jax as lj
from lorax_jax import models

RANGES = ((0, 2), (1, 3))
SOURCES = np.array([0, 1, 1, 2])
IDS = jnp.array([[5, 3, 9, 4], [7, 8, 2, 6]])
SMALL = {"vocab_size": 32, "initializer_range": 0.3}
CONFIGS = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 16,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 16,
    },
    "bert": {
        "model_type": "bert",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    },
}
TARGETS = r".*/(q_proj|down_proj|c_attn|c_proj|query|intermediate/dense)/kernel"


def made(family, scan):
    """A model of four layers, its parameters, and what they were made of."""
    model = models.from_config(SMALL | CONFIGS[family], scan_layers=scan)
    params = model.init(jax.random.key(0))
    deeper = lj.replicate(params, RANGES, layers=model.layers_path)
    return model.with_layers(4), deeper, params


def first(model):
    """The first array of what a model gives, for every family."""
    return jax.jit(lambda params, ids: jax.tree.leaves(model.apply(params, ids))[0])


def copied(model, params, scan):
    """The layers copied, as arrays."""
    if not scan:
        return jax.tree.map(jnp.copy, params)
    return lj.merge(params)


@pytest.mark.parametrize("family", CONFIGS)
def test_answers(family):
    found, files = [], []
    for scan in (False, True):
        model, params, _ = made(family, scan)
        assert model.num_layers == 4
        fn = first(model)
        plain = fn(copied(model, params, scan), IDS)
        assert_close(lj.adapt(fn)(params, IDS), plain, length=64)
        config = lj.LoraConfig(TARGETS, rank=2)
        plan = lj.plan(config, params, fn=fn, args=(IDS,))
        layers = {s.path.removeprefix(model.layers_path).split("/")[1] for s in plan}
        assert layers == {"0", "1", "2", "3"}
        adapter = drawn(plan, params)

        def loss(train, fn=fn, params=params, fixed=adapter.fixed):
            bound = lj.bind(params, lj.Adapter(train, fixed))
            out = lj.adapt(fn)(bound, IDS)
            return jnp.sin(out).sum(), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(adapter.train)
        assert_close(fn(lj.merge(params, adapter), IDS), out, length=64, factor=8)
        assert np.abs(out - plain).max() > 0.01
        found.append(out)
        files.append(_by_site(plan, grads))
    assert_close(found[0], found[1], length=64, factor=8)
    assert_close(files[0], files[1], length=64, factor=64)


def _by_site(plan, grads):
    """Gradients by the paths of single layers."""
    found = {}
    for slot in plan.slots:
        for i, site in enumerate(slot.sites):
            parts = grads[slot.name]
            stacked = bool(slot.layers)
            found[site.path] = jax.tree.map(
                lambda x, i=i, s=stacked: x[i] if s else x, parts
            )
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_generation(family, scan):
    """The cache has room for each copy: what is decoded is what a copy decodes."""
    model, params, _ = made(family, scan)
    plan = lj.plan(lj.LoraConfig(TARGETS, rank=2), params, fn=first(model), args=(IDS,))
    adapter = drawn(plan, params)
    cache = model.init_cache(2, 12)
    assert (cache.keys.shape[0] if scan else len(cache.keys)) == 4
    apply, bound = lj.adapt(model.apply), lj.bind(params, adapter)
    found = models.generate(apply, bound, IDS, max_new_tokens=6)
    merged = lj.merge(params, adapter)
    wanted = models.generate(model.apply, merged, IDS, max_new_tokens=6)
    assert jnp.array_equal(found[0], wanted[0])


@pytest.mark.parametrize(
    "scan, match",
    [(False, r"unexpected \['3'\]"), (True, "different leading axis sizes")],
    ids=["unrolled", "scanned"],
)
def test_the_model_must_know_its_layers(scan, match):
    _, params, _ = made("llama", scan)
    model = models.from_config(SMALL | CONFIGS["llama"], scan_layers=scan)
    with pytest.raises(ValueError, match=match):
        lj.adapt(model.apply)(params, IDS, cache=8)
