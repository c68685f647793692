"""Hugging Face configs: what is handled, what is ignored, what is refused by name."""

import re

import pytest

from lorax_jax.models import ConfigError
from lorax_jax.models._config import Gpt2Config, LlamaConfig, config_from_hf
from lorax_jax.models._rope import Rope
from lorax_jax.models._transformers import config_class


def test_a_mapping_and_a_config_object_read_alike(family, mapping):
    fields = {k: v for k, v in mapping.items() if k != "model_type"}
    hf_config = config_class(mapping["model_type"])(**fields)
    assert config_from_hf(hf_config) == config_from_hf(mapping)


def test_missing_attributes_take_the_class_defaults():
    config = config_from_hf({"model_type": "llama"})
    assert isinstance(config, LlamaConfig)
    assert (config.hidden_size, config.head_dim) == (4096, 128)
    assert config.rope == Rope(10000.0)
    config = config_from_hf({"model_type": "gpt2"})
    assert isinstance(config, Gpt2Config)
    assert config.n_inner == 3072


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama2", {"qkv_bias": False, "o_bias": False, "mlp_bias": False}),
        ("llama_biases", {"qkv_bias": True, "o_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": 5, "qkv_bias": False}),
        ("qwen2", {"qkv_bias": True, "o_bias": False, "sliding_window": None}),
        ("qwen2_window", {"sliding_window": 4}),
        ("qwen3", {"qk_norm": True, "qkv_bias": False, "head_dim": 16}),
        ("qwen3_biases", {"qk_norm": True, "qkv_bias": True, "o_bias": True}),
    ],
)
def test_what_tells_the_families_apart(config_of, name, expected):
    config = config_from_hf(config_of(name))
    assert {field: getattr(config, field) for field in expected} == expected


@pytest.mark.parametrize(
    "leftovers",
    [
        # As found in config.json files on the hub.
        {"torch_dtype": "bfloat16", "_name_or_path": "x", "use_cache": False},
        {"is_llama_config": True, "rope_interleaved": False},
        {"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}},
        {"attention_dropout": 0.1, "unsloth_fixed": True, "temperature": 0.6},
        {"quantization_config": None, "pretraining_tp": 1},
        {"sliding_window": None, "use_sliding_window": False},
        {"_attn_implementation": "eager", "architectures": ["LlamaForCausalLM"]},
    ],
)
def test_what_has_no_effect_is_ignored(config_of, leftovers):
    plain = config_from_hf(config_of("llama2"))
    assert config_from_hf(config_of("llama2") | leftovers) == plain


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama2", {"model_type": "gemma"}, "`model_type` = 'gemma' is not one of"),
        ("llama2", {"pretraining_tp": 2}, r"pretraining_tp = 2    \(usual: 1\)"),
        ("llama2", {"hidden_act": "tanh"}, "`hidden_act` = 'tanh' is not one of"),
        (
            "llama2",
            {"quantization_config": {"quant_method": "gptq"}},
            "quantization_config = {'quant_method': 'gptq'}",
        ),
        (
            "llama2",
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type = 'dynamic'",
        ),
        ("llama2", {"partial_rotary_factor": 0.5}, "'partial_rotary_factor': 0.5"),
        ("llama2", {"rope_interleaved": True}, "rope_interleaved = True"),
        ("llama2", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map = "),
        ("llama2", {"use_qk_norm": True}, r"use_qk_norm = True    \(usual: None\)"),
        ("llama2", {"sliding_window": 4}, "sliding_window = 4"),
        ("llama2", {"num_key_value_heads": 3}, "is not a multiple of"),
        ("llama2", {"layer_types": ["full_attention"] * 2}, "layer_types = "),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types = "),
        ("mistral", {"attention_bias": True}, "attention_bias = True"),
        ("mistral", {"mlp_bias": True}, "mlp_bias = True"),
        ("qwen2", {"attention_bias": True}, "attention_bias = True"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
            "mixes {'full_attention': 1, 'sliding_attention': 1}",
        ),
        (
            "qwen3",
            {"layer_types": ["full_attention", "chunked_attention"]},
            r"`layer_types` holds \['chunked_attention'\]",
        ),
        ("gpt2", {"n_embd": 33}, "`n_embd` = 33 is not a multiple of `n_head` = 4"),
        ("gpt2", {"activation_function": "tanh"}, "`activation_function` = 'tanh'"),
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            r"scale_attn_by_inverse_layer_idx = True    \(usual: False\)",
        ),
        ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn = True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
    ],
)
def test_what_changes_the_computation_is_refused(config_of, name, changes, message):
    with pytest.raises(ConfigError, match=message):
        config_from_hf(config_of(name) | changes)


def test_all_refused_attributes_are_listed_at_once(config_of):
    spoiled = config_of("llama2") | {"pretraining_tp": 4, "logit_scale": 0.5}
    with pytest.raises(ConfigError) as error:
        config_from_hf(spoiled)
    assert re.search(r"logit_scale = 0.5.*\n.*pretraining_tp = 4", str(error.value))


def test_something_else_than_a_config_is_refused():
    with pytest.raises(TypeError, match="got str. For a checkpoint folder use"):
        config_from_hf("some/folder")
