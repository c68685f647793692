"""What PEFT writes of the base beside an adapter."""

from collections.abc import Collection, Iterable

import jax
import numpy as np

from .._names import NameMap
from ._resolve import Tree
from ._safetensors import Reader

_WEIGHT = ".weight"


def base_copies(
    keys: Iterable[str],
    tensors: Reader,
    names: NameMap,
    tree: Tree,
    *,
    prefix: str,
    residuals: Collection[str],
) -> dict[str, str]:
    """Tensors that an adapter does without: PEFT writes a table or a head it adapts.

    Args:
        keys: those that no site has claimed.
        tensors: the file.
        names: the model's name table.
        tree: the parameters.
        prefix: what the keys start with.
        residuals: modules of which PEFT keeps a residual, which is no copy.

    Returns:
        What each of those is that say nothing new.
    """
    found = {}
    for key in keys:
        tensor = key.removeprefix(prefix).replace(".base_layer.", ".")
        if tensor.endswith(_WEIGHT) and tensor.removesuffix(_WEIGHT) in residuals:
            found[key] = "the residual of the base's"
            continue
        path = names.path(tensor)
        if tensor == f"{names.head}{_WEIGHT}":
            path = path or names.tied
        leaf = tree.leaves.get(path or "")
        entry = tensors.entries[key]
        if entry.dtype is None or not isinstance(leaf, jax.Array | np.ndarray):
            continue
        theirs = tensors.read(key).astype(leaf.dtype)
        theirs = theirs.T if names.layout(path or "") == "linear" else theirs
        if np.array_equal(theirs, np.asarray(leaf)):
            found[key] = "a copy of the base's"
    return found
