"""A model's folder as that of a deeper model, whose layers repeat its own.

The tensors of the new layers have names of their own and are read from the old ones'
bytes, so what merges and writes checkpoints need not know.
"""

import re
from typing import Any

from .._errors import CheckpointError, ConfigError, shorten
from .._ranges import Ranges, sources
from ._base_folder import BaseFolder

# What Transformers calls the number of layers, and what its configurations say of each
# of them in a list.
_COUNTS = ("num_hidden_layers", "n_layer")
_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")


def repeated(base: BaseFolder, ranges: Ranges) -> BaseFolder:
    """`base` with its layers repeated.

    Args:
        base: the open folder of a model.
        ranges: ranges of its layers.

    Raises:
        CheckpointError: if it cannot be told which tensors are those of layers, or if
            there are fewer layers than the ranges name.
    """
    counts = {name: base.config[name] for name in _COUNTS if name in base.config}
    if len(set(counts.values())) != 1:
        raise CheckpointError(
            f"The adapter is for a model whose layers are repeated, {ranges}, and the "
            f"configuration in {base.path} does not say how many there are: it has "
            f"none of {', '.join(_COUNTS)}. Merge in memory, with `merge`."
        )
    (count,) = set(counts.values())
    try:
        found = sources(ranges, count, "`layer_replication`")
    except ConfigError as error:
        raise CheckpointError(f"{error} That is {base.path}.") from None
    prefix = _layers(base, count)
    copies: dict[str, list[str]] = {}
    for new, old in enumerate(found):
        copies.setdefault(f"{prefix}{old}.", []).append(f"{prefix}{new}.")

    def new_names(name: str) -> list[str]:
        number = re.match(rf"{re.escape(prefix)}\d+\.", name)
        if number is None:
            return [name]
        rest = name[number.end() :]
        return [start + rest for start in copies.get(number[0], ())]

    config = dict(base.config) | dict.fromkeys(counts, len(found))
    for name in _LISTS:
        listed = config.get(name)
        if isinstance(listed, list) and len(listed) == count:
            config[name] = [listed[i] for i in found]
    return base.renamed(new_names, config)


def _layers(base: BaseFolder, count: Any) -> str:
    """What the names of layers' tensors begin with."""
    numbers: dict[str, set[int]] = {}
    for name in base:
        first = re.match(r"(.*?)(?<![^.])(\d+)\.", name)
        if first is not None:
            numbers.setdefault(first[1], set()).add(int(first[2]))
    found = [prefix for prefix, held in numbers.items() if held == {*range(count)}]
    if len(found) != 1:
        raise CheckpointError(
            f"The adapter is for a model whose layers are repeated, and in {base.path} "
            f"the tensors of {count} layers begin with {shorten(found) or 'nothing'}: "
            "one name is needed. Merge in memory, with `merge`."
        )
    return found[0]
