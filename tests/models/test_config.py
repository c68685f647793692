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


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama2", {"hidden_size": 65}, r"`hidden_size` = 65 is not a multiple of"),
        ("mistral", {"hidden_size": 65}, r"`hidden_size` = 65 is not a multiple of"),
        (
            "llama2",
            {"num_attention_heads": 0},
            r"`num_attention_heads` = 0; a whole nu",
        ),
        (
            "llama2",
            {"num_attention_heads": "six"},
            r"`num_attention_heads` = 'six'; a w",
        ),
        (
            "llama2",
            {"num_key_value_heads": 2.0},
            r"`num_key_value_heads` = 2\.0; a who",
        ),
        ("llama2", {"head_dim": 3}, r"`head_dim` = 3 is odd; rotary positions turn"),
        (
            "llama2",
            {"num_hidden_layers": -1},
            r"`num_hidden_layers` = -1; a whole numb",
        ),
        (
            "llama2",
            {"num_hidden_layers": 10**9},
            r"a whole number from 1 to 1,000 is m",
        ),
        ("qwen2", {"num_hidden_layers": 10**9}, r"a whole number from 1 to 1,000 is m"),
        ("llama2", {"vocab_size": True}, r"`vocab_size` = True; a whole number"),
        ("llama2", {"rms_norm_eps": NAN}, r"`rms_norm_eps` = nan; a number from 0 up"),
        ("llama2", {"rms_norm_eps": -1.0}, r"`rms_norm_eps` = -1\.0; a number from 0"),
        ("llama2", {"rms_norm_eps": "small"}, r"`rms_norm_eps` = 'small'; a number"),
        ("llama2", {"rope_theta": 0}, r"`rope_theta` = 0; a number above 0 is meant"),
        ("llama2", {"rope_theta": INF}, r"`rope_theta` = inf; a number above 0 is"),
        (
            "llama2",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1, "factor": 0}},
            r"`factor` = 0; a number above 0 is meant",
        ),
        ("gpt2", {"n_embd": 33}, r"`n_embd` = 33 is not a multiple of `n_head`"),
        ("gpt2", {"n_layer": 0}, r"`n_layer` = 0; a whole number from 1 to 1,000"),
        ("gpt2", {"layer_norm_epsilon": NAN}, r"`layer_norm_epsilon` = nan; a number"),
        ("llama2", {"bos_token_id": {"a": 1}}, r"`transformers` makes no llama config"),
    ],
)
def test_numbers_that_no_model_can_have(config_of, name, changes, message):
    with pytest.raises(ConfigError, match=message):
        config_from_hf(config_of(name) | changes)


def test_frequencies_that_are_not_in_order():
    rope = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 4.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    message = r"`low_freq_factor` = 4\.0 is not below `high_freq_factor` = 4\.0"
    with pytest.raises(ConfigError, match=message):
        config_from_hf({"model_type": "llama", "rope_parameters": rope})
