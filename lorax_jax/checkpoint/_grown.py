"""Adapters of a vocabulary that grew: how far, and whether the parameters did too."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .. import _paths, _peft
from .._errors import CheckpointError
from .._growth import Growth, Table
from .._names import NameMap
from ..planning import Plan
from ._file_growth import FileGrowth, FileTensor
from ._files import AdapterFiles, open_adapter
from ._kernels import is_turned
from ._placed import Placed
from ._resolve import Tree


def read_growth(
    dir: str | os.PathLike, params: Any = None, *, names: Any = None
) -> Growth | None:
    """How the vocabulary grew that an adapter was trained on.

    A folder by `save_adapter` says so itself, if it was told. PEFT's says only which
    rows it trains: where the parameters lack some of them, the tables grow up to the
    last one. What PEFT's model had in new rows that were not trained (of an untied head
    that was left out, say) is not in its files; here they are means, as Transformers'
    are nearly.

    Args:
        dir: the adapter's folder.
        params: the parameters as they are without the adapter, or their types; needed
            for PEFT's folders.
        names: the model's name table, a `NameMap` or its entries; as `params`.

    Returns:
        What to give to `lorax_jax.grow`, or `None` where nothing grew.

    Raises:
        CheckpointError: if the folder is not what it should be, or `params` or `names`
            are needed.
    """
    with open_adapter(dir) as files:
        if files.record is not None:
            return None if files.record.grown is None else files.record.grown.growth
        if names is None or params is None:
            raise CheckpointError(
                f"{files.folder} was not written by this library, and tells only which "
                "rows it trains. Give `params` and `names` too, to compare."
            )
        leaves = Tree(params).leaves
        shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
        return peft_growth(files, NameMap.of(names), shapes)


def peft_growth(
    files: AdapterFiles, names: NameMap, shapes: Mapping[str, Sequence[int]]
) -> Growth | None:
    """How far tables of these shapes lack rows that PEFT trained.

    Raises:
        CheckpointError: if two of them count different numbers of tokens.
    """
    tables, before, last = [], {}, -1
    for module, ids in _peft.rows_by_module(files.config, names, files.what).items():
        path = names.tokens if module is None else names.module_path(module)
        if path is None or path not in shapes:
            continue
        axis = 1 if names.layout(path) == "linear" else 0
        if max(ids) >= shapes[path][axis]:
            tables.append(Table(path, axis, len(shapes[path])))
            before[path], last = shapes[path][axis], max(last, *ids)
    if len(set(before.values())) > 1:
        raise CheckpointError(
            f"{files.what} trains rows that tables of different sizes lack: {before}. "
            "Grow them one by one, with `lj.grow`."
        )
    if not tables:
        return None
    return Growth(tuple(tables), min(before.values()), last + 1)


def check_grown(files: AdapterFiles, tree: Tree) -> None:
    """Raises unless the parameters have the vocabulary that the file was trained on."""
    if files.record is None or files.record.grown is None:
        return
    growth = files.record.grown.growth
    for table in growth.tables:
        leaf = tree.leaves.get(table.path)
        if leaf is None or len(leaf.shape) != table.ndim:
            continue  # found missing, or misshapen, later
        found = leaf.shape[table.axis]
        if found != growth.after:
            raise CheckpointError(
                f"{files.folder} was trained on a vocabulary that grew from "
                f"{growth.before:,} tokens to {growth.after:,}, and {table.path!r} "
                f"counts {found:,} here. {_how(files)}"
            )


def check_rows(files: AdapterFiles, placed: Iterable[Placed]) -> None:
    """Raises if rows are to be replaced that the tables do not have."""
    for site, slot, _ in placed:
        count = slot.shape[slot.role.inputs[0]] if site.ids else 0
        if site.ids and max(site.ids) >= count:
            raise CheckpointError(
                f"{files.folder} trains row {max(site.ids):,} of {site.path!r}, which "
                f"has {count:,} here: the vocabulary grew before the adapter was "
                f"trained. {_how(files)}"
            )


def _how(files: AdapterFiles) -> str:
    folder = str(files.folder)
    if files.record is None:
        more = f"{folder!r}, params, names=names"
    elif files.record.grown is not None:
        more = f"{folder!r}"
    else:  # saved without `grown`
        return (
            "Grow the parameters first: `params, _ = lj.grow(params, tables, to=...)`."
        )
    return (
        "Grow the parameters first, `params, _ = lj.grow(params, "
        f"lj.checkpoint.read_growth({more}))`; `lj.models.load_adapted` does it by "
        "itself."
    )


def file_growth(
    grown: Growth | None, plan: Plan, params: Any, names: NameMap | None
) -> FileGrowth | None:
    """What a file says about how the vocabulary grew.

    Args:
        grown: as it was given to `save_adapter`.
        plan: the adapter's.
        params: the parameters, or `None`.
        names: the model's name table, or `None`.

    Raises:
        CheckpointError: if the plan or the parameters have other sizes.
    """
    if grown is None:
        return None
    if not isinstance(grown, Growth):
        raise CheckpointError(
            f"`grown` is a {type(grown).__name__}; a `Growth` is meant, as `lj.grow` "
            "and `lj.models.grow` return it."
        )
    shapes = {slot.role.path: slot.shape for slot in plan.slots}
    for path, leaf in _paths.flatten(params)[0]:
        if hasattr(leaf, "shape"):
            shapes[path] = tuple(leaf.shape)
    for table in grown.tables:
        shape = shapes.get(table.path)
        if shape is not None and shape[table.axis] != grown.after:
            raise CheckpointError(
                f"`grown` says that {table.path!r} grew to {grown.after:,} tokens, and "
                f"its shape is {shape}. Plan on the parameters that have grown."
            )
    return FileGrowth(grown, file_tensors(grown, names))


def file_tensors(
    growth: Growth, names: NameMap | None
) -> tuple[FileTensor | None, ...]:
    """The tensors of the tables, `None` where `names` does not tell."""
    found = []
    for table in growth.tables:
        tensor = None if names is None else names.tensor(table.path)
        if names is None or tensor is None:
            found.append(None)
        else:
            turned = is_turned(names.layout(table.path), table.ndim)
            found.append(FileTensor(tensor, turned))
    return tuple(found)
