"""A checkpoint grows as the adapters did that are merged into it."""

import dataclasses
import os
from collections.abc import Iterable

from .._errors import CheckpointError
from .._growth import Growth, Table
from .._names import NameMap
from ._base_folder import BaseFolder
from ._file_growth import FileGrowth, FileTensor
from ._files import AdapterFiles, open_adapter
from ._grown import file_tensors, peft_growth
from ._grown_tensor import GrownTensor
from ._kernels import is_turned, shape_turned_back
from ._onto_base import TOKEN_TABLES, existing, own_names
from ._piece import HEAD


def grow_base(
    base: BaseFolder,
    folders: Iterable[str | os.PathLike],
    names: NameMap | None,
    grown: Growth | None = None,
) -> Growth | None:
    """Lets a checkpoint's tensors grow, where adapters were trained on such.

    Args:
        base: the checkpoint. Its `grown` is set.
        folders: the adapters' folders.
        names: the model's name table; folders with PEFT's keys do without.
        grown: how the parameters of adapters in memory grew.

    Returns:
        How it grows, or `None` if it stays, or has grown already.

    Raises:
        CheckpointError: if it does not fit, or two adapters say different things.
    """
    found = [] if grown is None else [FileGrowth(grown, file_tensors(grown, names))]
    for folder in folders:
        with open_adapter(folder) as files:
            one = _of_folder(files, base, names)
            found += [] if one is None else [one]
    if not found:
        return None
    growth, tensors = found[0]
    for other, _ in found[1:]:
        if other != growth:
            raise CheckpointError(
                "Two of the adapters were trained on vocabularies that grew "
                f"differently: {growth} and {other}. Merge one of them, or train both "
                "on the same tokens."
            )
    new: dict[str, GrownTensor] = {}
    counts = set()
    for table, tensor in zip(growth.tables, tensors, strict=True):
        if tensor is None:
            raise CheckpointError(
                f"Which tensor of {base.path} is {table.path!r}, which grew, is not "
                "known. Give `names`, a table of (path, tensor name, layout)."
            )
        name = existing(tensor.name, base)
        new[name] = GrownTensor(table, growth, tensor.turned)
        shape = base.entry(name).shape
        fits = len(shape) == table.ndim
        counts.add(shape[new[name].axis] if fits else shape)
    if counts == {growth.after}:
        return None
    if counts != {growth.before}:
        raise CheckpointError(
            "The adapter was trained on a vocabulary that grew from "
            f"{growth.before:,} tokens to {growth.after:,}, and {base.path} counts "
            f"{', '.join(map(str, counts))}. Merge it into the base that it was "
            "trained on."
        )
    if base.tied and HEAD in base:  # a copy of the table
        new.setdefault(HEAD, next(iter(new.values())))
    base.grown = new
    return growth


def _of_folder(
    files: AdapterFiles, base: BaseFolder, names: NameMap | None
) -> FileGrowth | None:
    """How an adapter's vocabulary grew, and the tensors of its tables."""
    if files.record is not None:
        grown = files.record.grown
        if grown is None or names is None:
            return grown
        return FileGrowth(grown.growth, file_tensors(grown.growth, names))
    names = own_names(files, base) if names is None else names
    shapes = {}
    for tensor in base:
        path, shape = names.path(tensor), base.entry(tensor).shape
        if path is not None:
            turned = is_turned(names.layout(path), len(shape))
            shapes[path] = shape_turned_back(shape) if turned else shape
    growth = peft_growth(files, names, shapes)
    if growth is None:
        return None
    tensors = file_tensors(growth, names)
    taken = {existing(tensor.name, base) for tensor in tensors if tensor is not None}
    others = [
        tensor
        for tensor in base
        if tensor not in taken
        and _counts_tokens(tensor)
        and base.entry(tensor).shape[0] == growth.before
    ]
    more = tuple(Table(name, 0, len(base.entry(name).shape)) for name in others)
    growth = dataclasses.replace(growth, tables=growth.tables + more)
    return FileGrowth(growth, tensors + tuple(FileTensor(n, False) for n in others))


def _counts_tokens(tensor: str) -> bool:
    """Whether a tensor is a table of tokens or a head by its name."""
    if tensor in (HEAD, HEAD.replace(".weight", ".bias")):
        return True
    module, _, last = tensor.rpartition(".")
    return last == "weight" and module.split(".")[-1] in TOKEN_TABLES
