"""Each family's parameter paths beside the names its checkpoints use.

A table is plain data, a tuple of `(ours, theirs, layout)`:

- `ours` is a path in our tree; `{i}` is the layer, which a scanned tree leaves out
  (there the leaf holds all layers, first axis).
- `theirs` is the tensor's name in a Hugging Face checkpoint.
- `layout` is `"linear"` where they store the transpose, `(d_out, d_in)`, and `"same"`
  where the two agree: embeddings, vectors and GPT-2's `Conv1D` kernels.
"""

from .._names import Entry, NameMap
from ._bert_config import BertConfig
from ._config import Gpt2Config, LlamaConfig

Names = tuple[Entry, ...]


LM_HEAD = "lm_head.weight"
_PREDICTIONS = "cls.predictions"


def names_for(config: LlamaConfig | Gpt2Config) -> Names:
    """The name table of one model: exactly its parameters, in the model's order.

    Args:
        config: which biases, norms and head the model has decides on its entries.

    Returns:
        A tuple of `(ours, theirs, layout)`.
    """
    return _gpt2(config) if isinstance(config, Gpt2Config) else _llama(config)


def _llama(config: LlamaConfig) -> Names:
    entries: list[Entry] = [
        ("embed_tokens/embedding", "model.embed_tokens.weight", "same")
    ]

    def linear(module: str, bias: bool) -> None:
        ours, theirs = (
            f"layers/{{i}}/{module}",
            "model.layers.{i}." + module.replace("/", "."),
        )
        entries.append((f"{ours}/kernel", f"{theirs}.weight", "linear"))
        if bias:
            entries.append((f"{ours}/bias", f"{theirs}.bias", "same"))

    def norm(module: str) -> None:
        theirs = "model.layers.{i}." + module.replace("/", ".")
        entries.append((f"layers/{{i}}/{module}/scale", f"{theirs}.weight", "same"))

    norm("input_layernorm")
    for projection in ("q_proj", "k_proj", "v_proj"):
        linear(f"self_attn/{projection}", config.qkv_bias)
    linear("self_attn/o_proj", config.o_bias)
    if config.qk_norm:
        norm("self_attn/q_norm")
        norm("self_attn/k_norm")
    norm("post_attention_layernorm")
    for projection in ("gate_proj", "up_proj", "down_proj"):
        linear(f"mlp/{projection}", config.mlp_bias)
    entries.append(("norm/scale", "model.norm.weight", "same"))
    if not config.tie_word_embeddings:
        entries.append(("lm_head/kernel", LM_HEAD, "linear"))
    return tuple(entries)


def _gpt2(config: Gpt2Config) -> Names:
    entries: list[Entry] = [
        ("wte/embedding", "transformer.wte.weight", "same"),
        ("wpe/embedding", "transformer.wpe.weight", "same"),
    ]
    for module, leaf in (
        ("ln_1", "scale"),
        ("attn/c_attn", "kernel"),
        ("attn/c_proj", "kernel"),
        ("ln_2", "scale"),
        ("mlp/c_fc", "kernel"),
        ("mlp/c_proj", "kernel"),
    ):
        theirs = "transformer.h.{i}." + module.replace("/", ".")
        entries.append((f"h/{{i}}/{module}/{leaf}", f"{theirs}.weight", "same"))
        entries.append((f"h/{{i}}/{module}/bias", f"{theirs}.bias", "same"))
    entries.append(("ln_f/scale", "transformer.ln_f.weight", "same"))
    entries.append(("ln_f/bias", "transformer.ln_f.bias", "same"))
    if not config.tie_word_embeddings:
        entries.append(("lm_head/kernel", LM_HEAD, "linear"))
    return tuple(entries)


def bert_names(config: BertConfig) -> NameMap:
    """The same for BERT, whose masked-LM head has a name of its own.

    A bare `BertModel` has tensors such as `encoder.layer.0.output.dense.weight`; under
    a head they begin with `bert.`.

    Args:
        config: its head and pooler decide on the entries.

    Returns:
        A map that also knows what a tied head is called.
    """
    entries: list[Entry] = []
    body = "bert." if config.head else ""

    def table(module: str) -> None:
        theirs = body + module.replace("/", ".")
        entries.append((f"{module}/embedding", f"{theirs}.weight", "same"))

    def linear(module: str, body: str = body) -> None:
        theirs = body + module.replace("/", ".")
        entries.append((f"{module}/kernel", f"{theirs}.weight", "linear"))
        entries.append((f"{module}/bias", f"{theirs}.bias", "same"))

    def norm(module: str, body: str = body) -> None:
        theirs = body + module.replace("/", ".")
        entries.append((f"{module}/scale", f"{theirs}.weight", "same"))
        entries.append((f"{module}/bias", f"{theirs}.bias", "same"))

    for name in ("word", "position", "token_type"):
        table(f"embeddings/{name}_embeddings")
    norm("embeddings/LayerNorm")
    layer = "encoder/layer/{i}"
    for projection in ("query", "key", "value"):
        linear(f"{layer}/attention/self/{projection}")
    for half in ("attention/output", "intermediate", "output"):
        linear(f"{layer}/{half}/dense")
        if half != "intermediate":
            norm(f"{layer}/{half}/LayerNorm")
    if config.pooler:
        linear("pooler/dense")
    if config.head == "masked_lm":
        linear("cls/predictions/transform/dense", "")
        norm("cls/predictions/transform/LayerNorm", "")
        if config.tied:
            entries.append(("cls/predictions/bias", f"{_PREDICTIONS}.bias", "same"))
        else:
            linear("cls/predictions/decoder", "")
    if config.head == "classifier":
        linear("classifier", "")
    tied = "embeddings/word_embeddings/embedding" if config.tied else None
    return NameMap(tuple(entries), head=f"{_PREDICTIONS}.decoder", tied=tied)
