"""Names of tensors in an adapter file.

PEFT's keys are `base_model.model.<module>` and one of a few endings, or the name of a
tensor of the model where that tensor was trained whole. The prefix may be missing. A
module's own name may hold anything, `lora_A` and `weight` and `default` included, so a
key is only ever read from its end.
"""

from collections.abc import Iterable
from typing import NamedTuple

PREFIX = "base_model.model."

# Endings by the name that the array has in an adapter.
_KERNEL = {"a": ".lora_A.weight", "b": ".lora_B.weight", "bias": ".lora_B.bias"}
_TABLE = {"a": ".lora_embedding_A", "b": ".lora_embedding_B"}
_APART = {"a0": ".lora_A0.weight", "b0": ".lora_B0.weight"}
_MAGNITUDE = ".lora_magnitude_vector"
ROWS = ".token_adapter.trainable_tokens_delta"

# Endings of tensors, and what they are, for messages.
_OTHERS = {
    _MAGNITUDE: "DoRA's magnitude",
    _APART["a0"]: "a starting factor",
    _APART["b0"]: "a starting factor",
    ".lora_A.bias": "a bias of A",
    ".lora_B.bias": "a bias of B",
    ".lora_diag": "KaSA's diagonal",
    ".lora_velora_embed": "VeLoRA's projection",
    ROWS: "trained rows of an embedding",
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
        for factor in "ab":
            ending = endings[factor]
            module = key.removesuffix(ending).removeprefix(prefix)
            if key.startswith(prefix) and key.endswith(ending) and module:
                return Key(module, factor, table)
    return None


def keys(
    module: str,
    *,
    kind: str = "lora",
    table: bool = False,
    bias: bool = False,
    apart: bool = False,
    prefix: str = PREFIX,
) -> dict[str, str]:
    """The keys of a site's tensors, by the names of its arrays.

    Args:
        module: what stands before the endings; of a leaf trained whole, all of it.
        kind: the kind of adapter.
        table: whether the module is an embedding.
        bias: whether B has a bias.
        apart: whether starting factors have tensors of their own.
        prefix: what stands before the module.

    >>> keys("model.embed_tokens", table=True)["a"]
    'base_model.model.model.embed_tokens.lora_embedding_A'
    >>> list(keys("q", kind="dora")), keys("norm.weight", kind="whole", prefix="")
    (['a', 'b', 'magnitude'], {'whole': 'norm.weight'})
    """
    if kind == "whole":
        return {"whole": prefix + module}
    if kind == "rows":
        return {"rows": prefix + module + ROWS}
    endings = dict(_TABLE if table else _KERNEL)
    if not bias:
        endings.pop("bias", None)
    if apart:
        endings |= _APART
    if kind == "dora":
        endings["magnitude"] = _MAGNITUDE
    return {name: prefix + module + ending for name, ending in endings.items()}


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
    factor = key.endswith((_KERNEL["a"], _KERNEL["b"]))
    if not factor and (".lora_A." in key or ".lora_B." in key):
        return f"{key} (no key that PEFT's `save_pretrained` writes)"
    return key
