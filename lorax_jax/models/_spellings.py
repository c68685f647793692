"""What checkpoints hold beyond a name table: prefixes, old names, copies, leftovers."""

from collections.abc import Iterable, Set

from ._bert_config import BertConfig
from ._config import Gpt2Config, LlamaConfig
from ._names import LM_HEAD

AnyConfig = LlamaConfig | Gpt2Config | BertConfig

# The part of a name that stands before the headless model's own. Some checkpoints
# leave it out; others, of a BERT without a head, have it although they need not.
_PREFIX = {"gpt2": "transformer.", "bert": "bert."}
_DEFAULT_PREFIX = "model."

# Masks, frequencies and counters that old versions of Transformers saved.
_BUFFERS = (
    "{prefix}h.{i}.attn.bias",
    "{prefix}h.{i}.attn.masked_bias",
    "{prefix}layers.{i}.self_attn.rotary_emb.inv_freq",
    "{prefix}embeddings.position_ids",
    "{prefix}embeddings.token_type_ids",
)

# Layer norms as BERT's first checkpoints, converted from TensorFlow, spell them.
_OLD = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))

# What pretraining left in BERT's checkpoints for heads that were not asked for.
_BERT_HEADS = (
    "{prefix}pooler.dense.weight",
    "{prefix}pooler.dense.bias",
    "cls.seq_relationship.weight",
    "cls.seq_relationship.bias",
    "cls.predictions.bias",
    "cls.predictions.transform.dense.weight",
    "cls.predictions.transform.dense.bias",
    "cls.predictions.transform.LayerNorm.weight",
    "cls.predictions.transform.LayerNorm.bias",
    "cls.predictions.transform.LayerNorm.gamma",
    "cls.predictions.transform.LayerNorm.beta",
    "cls.predictions.decoder.weight",
    "cls.predictions.decoder.bias",
)


def found_name(config: AnyConfig, theirs: str, names: Set[str]) -> str:
    """How one checkpoint spells a tensor of the table.

    Args:
        config: the model's.
        theirs: the tensor's name in the table, its layer filled in.
        names: all tensors of the checkpoint.

    Returns:
        A name among `names`; where the tensor is missing, what it would be called.
    """
    prefix = _prefix(config)
    prefixed = any(name.startswith(prefix) for name in names)
    if theirs.startswith(prefix) and not prefixed:
        theirs = theirs.removeprefix(prefix)
    elif prefixed and isinstance(config, BertConfig) and config.head is None:
        theirs = prefix + theirs
    for new, old in _OLD:
        other = theirs.replace(new, old)
        if theirs not in names and other in names:
            return other
    return theirs


def leftovers(config: AnyConfig) -> set[str]:
    """Names of tensors that may be there and are not the model's.

    Args:
        config: the model's.

    Returns:
        Names, of which those in the model's own table are to be taken out.
    """
    extra = _BERT_HEADS if isinstance(config, BertConfig) else ()
    return {
        name.format(prefix=prefix, i=i)
        for name in (*_BUFFERS, *extra)
        for prefix in ("", _prefix(config))
        for i in range(config.num_layers)
    }


def copies(config: AnyConfig) -> Iterable[tuple[str, str]]:
    """Tied tensors that a checkpoint may hold twice: the copy, then the original.

    Args:
        config: the model's.

    Returns:
        Pairs of names as the table has them; the copy must equal the original.
    """
    if isinstance(config, BertConfig):
        if not config.tied:
            return ()
        table = "bert.embeddings.word_embeddings.weight"
        return (
            ("cls.predictions.decoder.weight", table),
            ("cls.predictions.decoder.bias", "cls.predictions.bias"),
        )
    if not config.tie_word_embeddings:
        return ()
    gpt2 = isinstance(config, Gpt2Config)
    table = "transformer.wte.weight" if gpt2 else "model.embed_tokens.weight"
    return ((LM_HEAD, table),)


def _prefix(config: AnyConfig) -> str:
    return _PREFIX.get(config.family, _DEFAULT_PREFIX)
