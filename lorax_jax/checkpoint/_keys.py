"""Names of tensors in an adapter file.

PEFT's keys are `base_model.model.<module>` and one of four endings. The prefix may be
missing. A module's own name may hold anything, `lora_A` and `weight` and `default`
included, so a key is only ever read from its end.
"""

from collections.abc import Iterable
from typing import NamedTuple

PREFIX = "base_model.model."

_KERNEL = (".lora_A.weight", ".lora_B.weight")
_TABLE = (".lora_embedding_A", ".lora_embedding_B")

# Endings of tensors that belong to no plain LoRA, and what they are.
_OTHERS = {
    ".lora_magnitude_vector": "DoRA's magnitude",
    ".lora_A.bias": "a bias of A",
    ".lora_B.bias": "a bias of B",
    ".lora_diag": "KaSA's diagonal",
    ".lora_velora_embed": "VeLoRA's projection",
    ".token_adapter.trainable_tokens_delta": "trained rows of an embedding",
}


class Key(NamedTuple):
    """A key, taken apart.

    Attributes:
        module: what stands before the ending, without the prefix.
        factor: `"a"` or `"b"`.
        table: whether the module is an embedding.
    """

    module: str
    factor: str
    table: bool


def parse(key: str, prefix: str = PREFIX) -> Key | None:
    """Takes a key apart, or gives `None` if it names no factor.

    >>> parse("base_model.model.h.0.lora_A.default.weight.lora_B.weight")
    Key(module='h.0.lora_A.default.weight', factor='b', table=False)
    """
    for endings, table in ((_KERNEL, False), (_TABLE, True)):
        for ending, factor in zip(endings, "ab", strict=True):
            module = key.removesuffix(ending).removeprefix(prefix)
            if key.startswith(prefix) and key.endswith(ending) and module:
                return Key(module, factor, table)
    return None


def keys(module: str, *, table: bool, prefix: str = PREFIX) -> tuple[str, str]:
    """The keys of a module's A and B.

    >>> keys("model.embed_tokens", table=True)[0]
    'base_model.model.model.embed_tokens.lora_embedding_A'
    """
    down, up = _TABLE if table else _KERNEL
    return f"{prefix}{module}{down}", f"{prefix}{module}{up}"


def prefix_of(names: Iterable[str]) -> str:
    """PEFT's prefix if the keys carry it, else nothing.

    Keys carry it together or not at all: a file of both is not one that PEFT wrote,
    and its odd keys then belong to no module.
    """
    return PREFIX if any(name.startswith(PREFIX) for name in names) else ""


def explain(key: str) -> str:
    """A key with what is known about it, for a message.

    >>> explain("base_model.model.q.lora_B.bias")
    'base_model.model.q.lora_B.bias (a bias of B)'
    """
    for ending, meaning in _OTHERS.items():
        if key.endswith(ending):
            return f"{key} ({meaning})"
    if ".lora_A." in key or ".lora_B." in key:
        return f"{key} (no key that PEFT's `save_pretrained` writes)"
    return key
