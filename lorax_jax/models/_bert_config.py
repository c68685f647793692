"""BERT's config: which attributes define the encoder, and which head stands on it."""

import dataclasses
from typing import Any

from .._errors import ConfigError
from ._activations import checked_activation

# Transformers' class names, from `architectures`, and the head that each has.
HEADS = {
    "BertModel": None,
    "BertForMaskedLM": "masked_lm",
    "BertForSequenceClassification": "classifier",
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The numbers that define a BERT; field names are Hugging Face's.

    Two fields are not: `head` is None, `"masked_lm"` or `"classifier"`, and `pooler`
    says whether there is a dense layer on the first token, which the classifier needs
    and a bare encoder may have.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    max_position_embeddings: int
    type_vocab_size: int
    initializer_range: float
    layer_norm_eps: float
    tie_word_embeddings: bool = True
    head: str | None = None
    pooler: bool = True
    num_labels: int = 2
    family: str = "bert"

    @property
    def num_layers(self) -> int:
        """The same number under one name for all families."""
        return self.num_hidden_layers

    @property
    def tied(self) -> bool:
        """Whether a head shares the table of tokens."""
        return self.head == "masked_lm" and self.tie_word_embeddings


def read_bert(family: str, given: dict[str, Any]) -> tuple[BertConfig, set[str]]:
    """A `BertConfig`, and the attributes that it takes care of.

    Args:
        family: `"bert"`.
        given: the config's attributes, defaults filled in.

    Raises:
        ConfigError: for a head, an activation or a width that is not implemented.
    """
    width, heads = given["hidden_size"], given["num_attention_heads"]
    if width % heads:
        raise ConfigError(
            f"`hidden_size` = {width} is not a multiple of "
            f"`num_attention_heads` = {heads}."
        )
    if given.get("is_decoder"):
        raise ConfigError(
            "`is_decoder` = True makes BERT's attention causal; this one is an encoder."
        )
    head = _head(given.get("architectures"))
    numbers = {
        field.name: given[field.name]
        for field in dataclasses.fields(BertConfig)
        if field.name in given and field.name != "hidden_act"
    }
    config = BertConfig(
        **numbers
        | {
            "hidden_act": checked_activation("hidden_act", given["hidden_act"]),
            "num_labels": len(given["id2label"]),
            "head": head,
            "pooler": head != "masked_lm",
            "family": family,
        }
    )
    return config, set(numbers) | {"hidden_act", "is_decoder"}


def _head(architectures: list[str] | None) -> str | None:
    """The head that a config's `architectures` asks for; nothing is a bare encoder."""
    names = architectures or ["BertModel"]
    if len(names) != 1 or names[0] not in HEADS:
        raise ConfigError(
            f"`architectures` = {names} is not one of those here: {', '.join(HEADS)}. "
            "For the encoder alone set `architectures` to ['BertModel'] in the config."
        )
    return HEADS[names[0]]
