"""Modules of a model with many layers, and patterns of paths that take them."""

import re
from collections.abc import Mapping
from typing import Any

from .._names import Module, NameMap

ALL_LINEAR = "all-linear"

# What messages call a configuration that is in no file.
WHAT = "The PEFT configuration"

# More layers than models have. What holds for all of them is taken to hold always.
LAYERS = 256


def group(values: Mapping[Module, Any]) -> dict[str, Any]:
    """A regex of whole paths for each family of layers that share a value.

    Families of few layers come first, so that a family of all layers can be written as
    any number and still leave those to their own rule.
    """
    families: dict[tuple[str, ...], dict[Any, list[int]]] = {}
    plain: dict[str, Any] = {}
    for module, value in values.items():
        if module.layer is None:
            plain[re.escape(module.path)] = value
        else:
            family = families.setdefault(module.around, {})
            family.setdefault(value, []).append(module.layer)
    found: dict[str, Any] = {}
    for around, by_value in families.items():
        everywhere = sum(map(len, by_value.values())) == LAYERS
        ordered = sorted(by_value.items(), key=lambda item: len(item[1]))
        for i, (value, layers) in enumerate(ordered):
            which = "|".join(map(str, layers))
            if everywhere and i == len(ordered) - 1:
                which = r"\d+"
            elif len(layers) > 1:
                which = f"(?:{which})"
            found[which.join(map(re.escape, around))] = value
    return found | plain


def takes(pattern: str, module: Module) -> bool:
    """Whether a regex takes a module, by its path or that of a stack of its layers."""
    stacked = "".join(module.around).replace("//", "/")
    return any(re.fullmatch(pattern, path) for path in (module.path, stacked))


def is_linear(module: Module, names: NameMap) -> bool:
    """Whether PEFT's "all-linear" takes a module: a matrix, and not the head.

    A table does not say which of its `"same"` tensors are matrices. Flax calls those
    `kernel`.
    """
    named = module.path.split("/")[-1] == "kernel"
    matrix = module.layout == "linear" or (module.layout == "same" and named)
    return matrix and module.name != names.head
