"""Tiny configs of every family; a test that asks for `family` runs on each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_jax import models

_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
_LLAMA = {
    **_TOKENS,
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "max_position_embeddings": 64,
}
_GPT2 = {
    **_TOKENS,
    "model_type": "gpt2",
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.1,
}

FAMILIES = {
    "llama2": _LLAMA | {"model_type": "llama", "num_key_value_heads": 4},
    "llama3": _LLAMA
    | {
        "model_type": "llama",
        "rope_theta": 500.0,
        # Chosen so that the four frequencies of a head fall into all three bands.
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "llama_biases": _LLAMA
    | {
        "model_type": "llama",
        "head_dim": 12,
        "attention_bias": True,
        "mlp_bias": True,
        "hidden_act": "gelu_pytorch_tanh",
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "smollm2": _LLAMA
    | {
        "model_type": "llama",
        "hidden_size": 36,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    "mistral": _LLAMA | {"model_type": "mistral", "sliding_window": 5},
    "qwen2": _LLAMA | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_window": _LLAMA
    | {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 0,
    },
    "qwen3": _LLAMA | {"model_type": "qwen3", "head_dim": 16},
    "qwen3_biases": _LLAMA
    | {
        "model_type": "qwen3",
        "head_dim": 8,
        "attention_bias": True,
        "hidden_act": "gelu",
        "tie_word_embeddings": True,
    },
    "gpt2": _GPT2,
    "gpt2_untied": _GPT2
    | {
        "tie_word_embeddings": False,
        "n_inner": 40,
        "activation_function": "relu",
        "scale_attn_weights": False,
    },
}


def pytest_generate_tests(metafunc):
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", FAMILIES)
    if "scan" in metafunc.fixturenames:
        metafunc.parametrize("scan", [False, True], ids=["unrolled", "scanned"])


@pytest.fixture
def mapping(family):
    """One family's config, as a parsed `config.json` would be."""
    return dict(FAMILIES[family])


@pytest.fixture(scope="session")
def config_of():
    """`config_of(name, **changes)`: a config by family name."""
    return lambda name, **changes: FAMILIES[name] | changes


@pytest.fixture(scope="session")
def tiny():
    """`tiny(name)`: a model and random parameters, the same ones stacked or not.

    Drawn with NumPy, biases and norms too: that compiles nothing.
    """

    @functools.cache
    def make(name, *, scan_layers=False):
        plain = models.from_config(FAMILIES[name])
        draw = np.random.default_rng(0)
        params = jax.tree.map(
            lambda leaf: np.asarray(
                (leaf.ndim == 1) + 0.15 * draw.normal(size=leaf.shape), leaf.dtype
            ),
            plain.abstract(),
        )
        if not scan_layers:
            return plain, jax.device_put(params)
        layers = "h" if name.startswith("gpt2") else "layers"
        stack = [params[layers][str(i)] for i in range(plain.num_layers)]
        params[layers] = jax.tree.map(lambda *leaves: np.stack(leaves), *stack)
        model = models.from_config(FAMILIES[name], scan_layers=True)
        return model, jax.device_put(params)

    return make


@pytest.fixture(scope="session")
def jitted():
    """`jitted(model)`: its `apply`, compiled once a shape for all tests."""
    return functools.cache(lambda model: jax.jit(model.apply))


@pytest.fixture(scope="session")
def ids():
    """Two rows of twelve tokens."""
    return jnp.asarray(np.random.default_rng(0).integers(2, 97, (2, 12)), jnp.int32)


@pytest.fixture(scope="session")
def ragged():
    """Rows of 12 and 5 tokens: the batch, its mask, and the rows by themselves."""
    draw = np.random.default_rng(1)
    rows = [draw.integers(2, 97, n).astype(np.int32) for n in (12, 5)]
    batch = np.ones((2, 12), np.int32)
    mask = np.zeros((2, 12), bool)
    for i, row in enumerate(rows):
        batch[i, 12 - len(row) :] = row
        mask[i, 12 - len(row) :] = True
    return batch, mask, rows
