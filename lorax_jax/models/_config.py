"""Hugging Face configs to ours: handle every attribute, or refuse it by name.

A Hugging Face config holds some thirty attributes, of which a dozen change what the
model computes. Each is in one of three groups: *handled* (it becomes a field of
`LlamaConfig`, `Gpt2Config` or `BertConfig`), *ignorable* (it names files, tokens or
labels, or is a training-time dropout of the base, which these models do not apply), or
anything else, which must equal the config class's own default or is refused by name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from .._errors import ConfigError
from ._activations import checked_activation
from ._bert_config import BertConfig, read_bert
from ._numbers import check_heads, check_numbers
from ._rope import Rope, rope_from_hf

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
FAMILIES = (*LLAMA_LIKE, "gpt2", "bert")

# Attributes that say nothing about logits. Dropout of the base is in this group on
# purpose: these models run as `transformers` does in `eval` mode.
_IGNORABLE = frozenset(
    "_attn_implementation _attn_implementation_autoset _name_or_path architectures "
    "attention_dropout attention_probs_dropout_prob attn_implementation attn_pdrop "
    "bos_token_id classifier_dropout dtype embd_pdrop eos_token_id "
    "gradient_checkpointing hidden_dropout_prob id2label is_llama_config label2id "
    "max_position_embeddings max_sequence_length model_type n_ctx name_or_path "
    "num_labels output_attentions output_hidden_states pad_token_id prefix "
    "problem_type resid_pdrop return_dict summary_activation summary_first_dropout "
    "summary_proj_to_labels summary_type summary_use_proj task_specific_params "
    "tokenizer_class torch_dtype transformers.js_config transformers_version "
    "unsloth_fixed unsloth_version use_bfloat16 use_cache".split()
)

# Attributes that no config class here declares but real checkpoints carry, with the
# one value that means "as usual".
_AS_USUAL = {
    "is_decoder": (True, False),  # decides about caches in old code, not about logits
    "partial_rotary_factor": (None, 1.0),
    "position_embedding_type": (None, "absolute"),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
    "rope_interleaved": (None, False),
    "tie_encoder_decoder": (None, False),
    "use_sliding_window": (None, False),
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The numbers that define a Llama-like model; field names are Hugging Face's.

    `qkv_bias`, `o_bias` and `qk_norm` are what tells Llama (all biases or none),
    Mistral (none), Qwen2 (biases on q, k, v) and Qwen3 (norms on q and k) apart.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    initializer_range: float
    tie_word_embeddings: bool
    rope: Rope
    sliding_window: int | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def num_layers(self) -> int:
        """The same number under one name for both families."""
        return self.num_hidden_layers

    @property
    def cached_shape(self) -> tuple[int, int]:
        """Key heads and their width: what a cache holds of each token and layer."""
        return self.num_key_value_heads, self.head_dim


@dataclasses.dataclass(frozen=True)
class Gpt2Config:
    """The numbers that define a GPT-2 model; field names are Hugging Face's."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_inner: int
    n_layer: int
    n_head: int
    activation_function: str
    layer_norm_epsilon: float
    initializer_range: float
    tie_word_embeddings: bool
    scale_attn_weights: bool = True
    family: str = "gpt2"

    @property
    def num_layers(self) -> int:
        """The same number under one name for both families."""
        return self.n_layer

    @property
    def cached_shape(self) -> tuple[int, int]:
        """Heads and their width: what a cache holds of each token and layer."""
        return self.n_head, self.n_embd // self.n_head


def config_from_hf(hf_config: Any) -> LlamaConfig | Gpt2Config | BertConfig:
    """Reads a Hugging Face config, refusing what these models do not compute.

    Args:
        hf_config: a `transformers` config object, or a mapping such as a parsed
            `config.json`. A mapping needs `model_type`.

    Returns:
        A frozen, hashable `LlamaConfig`, `Gpt2Config` or `BertConfig`.

    Raises:
        ConfigError: for another `model_type`, and for any attribute whose value
            changes the computation in a way that is not implemented.

    Example:
        >>> config = config_from_hf({"model_type": "gpt2", "n_layer": 2})
        >>> config.n_layer, config.n_embd
        (2, 768)
    """
    given, defaults = _attributes(hf_config)
    check_numbers(given)
    family = given["model_type"]
    read = {"gpt2": _gpt2, "bert": read_bert}.get(family, _llama)
    config, handled = read(family, given)
    _refuse_unknown(family, given, defaults, handled)
    return config


def _attributes(hf_config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A config's attributes and its class's defaults, both as plain dictionaries."""
    from ._transformers import config_class

    if isinstance(hf_config, Mapping):
        given = {str(key): value for key, value in hf_config.items()}
    elif hasattr(hf_config, "to_dict"):
        given = hf_config.to_dict()
    else:
        raise TypeError(
            "A config must be a `transformers` config or a mapping with `model_type`; "
            f"got {type(hf_config).__name__}. For a checkpoint folder use "
            "`models.load(folder)`."
        )
    family = given.pop("model_type", None)
    if family not in FAMILIES:
        raise ConfigError(
            f"`model_type` = {family!r} is not one of the models here: "
            f"{', '.join(FAMILIES)}."
        )
    # The dtype is decided by `from_config` and `load`; passing it on would only make
    # `transformers` import torch to turn the name into a torch.dtype.
    for key in ("dtype", "torch_dtype"):
        given.pop(key, None)
    # `quantization_config` and friends are kept by the config class as they are, so
    # the round trip below loses nothing; it brings old spellings (`rope_theta`,
    # `rope_scaling`) into today's form and fills in the defaults.
    hf_class = config_class(family)
    check_numbers(given)
    names = ("hidden_size", "num_attention_heads")
    derived = given.get("head_dim") is None and family != "qwen3"  # which has a default
    if derived and all(name in given for name in names):
        check_heads(given[names[0]], given[names[1]], names)
    try:
        return hf_class(**given).to_dict(), hf_class().to_dict()
    except Exception as error:  # `transformers` checks some attributes, in many ways
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"`transformers` makes no {family} config of it: {reason:.200}"
        ) from error


def _llama(family: str, given: dict[str, Any]) -> tuple[LlamaConfig, set[str]]:
    act = checked_activation("hidden_act", given["hidden_act"])
    heads, kv_heads = given["num_attention_heads"], given["num_key_value_heads"]
    check_heads(heads, kv_heads, ("num_attention_heads", "num_key_value_heads"))
    head_dim = given.get("head_dim") or given["hidden_size"] // heads
    if head_dim % 2:
        raise ConfigError(
            f"`head_dim` = {head_dim} is odd; rotary positions turn pairs of numbers."
        )
    attention_bias = bool(given.get("attention_bias", False))
    config = LlamaConfig(
        family=family,
        vocab_size=given["vocab_size"],
        hidden_size=given["hidden_size"],
        intermediate_size=given["intermediate_size"],
        num_hidden_layers=given["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        hidden_act=act,
        rms_norm_eps=given["rms_norm_eps"],
        initializer_range=given["initializer_range"],
        tie_word_embeddings=bool(given["tie_word_embeddings"]),
        rope=rope_from_hf(given["rope_parameters"]),
        sliding_window=_window(family, given),
        qkv_bias=attention_bias or family == "qwen2",
        o_bias=attention_bias,
        mlp_bias=bool(given.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
    )
    common = {field.name for field in dataclasses.fields(config)}
    common |= {"rope_parameters"}
    common -= {"mlp_bias", "sliding_window"}
    return config, common | _OWN[family]


# What the families' configs do not share. The same name on another family's config
# would be read by nobody, so there it is refused.
_OWN: dict[str, set[str]] = {
    "llama": {"attention_bias", "mlp_bias"},
    "mistral": {"sliding_window"},
    "qwen2": {
        "layer_types",
        "max_window_layers",
        "sliding_window",
        "use_sliding_window",
    },
}
_OWN["qwen3"] = _OWN["qwen2"] | {"attention_bias"}


def _window(family: str, given: dict[str, Any]) -> int | None:
    """The sliding window of every layer, or None; mixtures are refused."""
    if family == "llama":
        return None
    if family == "mistral":
        return given["sliding_window"]
    kinds = set(given["layer_types"])
    unknown = sorted(kinds - {"full_attention", "sliding_attention"})
    if unknown:
        raise ConfigError(f"`layer_types` holds {unknown}, which are not here.")
    if len(kinds) > 1:
        raise _mixed_layers(given["layer_types"])
    return given["sliding_window"] if kinds == {"sliding_attention"} else None


def _mixed_layers(layer_types: list[str]) -> ConfigError:
    counts = {kind: layer_types.count(kind) for kind in sorted(set(layer_types))}
    return ConfigError(
        f"`layer_types` mixes {counts}; these models run one kind of attention in all "
        "layers (all full, or all with the same sliding window)."
    )


def _gpt2(family: str, given: dict[str, Any]) -> tuple[Gpt2Config, set[str]]:
    width, heads = given["n_embd"], given["n_head"]
    check_heads(width, heads, ("n_embd", "n_head"))
    config = Gpt2Config(
        vocab_size=given["vocab_size"],
        n_positions=given["n_positions"],
        n_embd=width,
        n_inner=given["n_inner"] or 4 * width,
        n_layer=given["n_layer"],
        n_head=heads,
        activation_function=checked_activation(
            "activation_function", given["activation_function"]
        ),
        layer_norm_epsilon=given["layer_norm_epsilon"],
        initializer_range=given["initializer_range"],
        tie_word_embeddings=bool(given["tie_word_embeddings"]),
        scale_attn_weights=bool(given["scale_attn_weights"]),
        family=family,
    )
    return config, {field.name for field in dataclasses.fields(config)}


def _refuse_unknown(
    family: str, given: dict[str, Any], defaults: dict[str, Any], handled: set[str]
) -> None:
    """Raises for every attribute that is neither handled, ignorable nor default."""
    refused = {}
    for name, value in given.items():
        if name in handled or name in _IGNORABLE:
            continue
        usual = _AS_USUAL.get(name, ())
        if name in defaults:
            usual = (*usual, defaults[name])
        elif name not in _AS_USUAL:
            usual = (None,)
        if value not in usual:
            refused[name] = (value, usual[-1])
    if refused:
        lines = [
            f"  {name} = {value!r}    (usual: {usual!r})"
            for name, (value, usual) in sorted(refused.items())
        ]
        raise ConfigError(
            f"This {family} config sets attributes that these models do not compute:\n"
            + "\n".join(lines)
            + "\nIf one of them has no effect on the logits, remove it from the config "
            "and load again."
        )
