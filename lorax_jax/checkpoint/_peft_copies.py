"""Whole leaves and rows of tables in a file that PEFT wrote."""

from collections.abc import Collection
from typing import NamedTuple

from .. import _peft
from .._errors import CheckpointError, shorten
from .._names import NameMap
from ._copies import tensor_name
from ._file_site import FileSite, Part
from ._files import AdapterFiles
from ._kernels import is_turned, shape_turned_back
from ._keys import ROWS
from ._resolve import Tree


class Copies(NamedTuple):
    """What a PEFT file holds beside factors.

    Attributes:
        sites: leaves that were trained whole, and rows of tables.
        missing: keys that the configuration promises and the file does not have.
        bias: which biases the configuration trains.
    """

    sites: list[FileSite]
    missing: list[str]
    bias: str


def peft_copies(
    files: AdapterFiles,
    names: NameMap,
    tree: Tree,
    adapted: Collection[str],
    prefix: str,
) -> Copies:
    """Reads them off the keys and the configuration of a file.

    Args:
        files: the open folder.
        names: the model's name table.
        tree: the parameters.
        adapted: names of the modules that have factors.
        prefix: what the keys start with.

    Raises:
        CheckpointError: if PEFT trained one use of a tied table.
    """
    chosen = _peft.Whole(files.config, files.what)
    found: dict[str, str] = {}  # tensors by name, with the keys that they have
    head, table = f"{names.head}.weight", names.tensor(names.tied or "")
    ensured = _peft.flag(files.config, "ensure_weight_tying", files.what)
    both = ensured and table is not None and chosen.saves(table)
    for key in files.tensors.entries:
        name = tensor_name(key.removeprefix(prefix))
        if chosen(name, adapted) or (both and name == head):
            found[name] = key
    sites = []
    for name, key in found.items():
        path = names.path(name)
        if path is None and name == head and names.tied is not None:
            path = names.tied
            if table in found:
                continue  # the head's copy of the table, or so it should be
        if path is None:
            continue
        shape = files.tensors.entries[key].shape
        turned = is_turned(names.layout(path), len(shape))
        shape = shape_turned_back(shape) if turned else shape
        if tree.find(path, len(shape)) is None:
            _check_axes(tree, path, len(shape))
            continue
        tied = None
        if path == names.tied and names.module_path(names.head) is None:
            tied = _copy_of_head(files, found, names)
        part = Part(shape, (), tuple(range(len(shape))))
        sites.append(_site(path, key.removeprefix(prefix), part, "whole", tied, turned))
    known = {tensor.name: tensor.path for tensor in names.tensors(tree.layers())}
    missing = [
        prefix + _key(name, adapted, chosen)
        for name, path in known.items()
        if name not in found and chosen(name, adapted) and _is_there(tree, path)
    ]
    rows, lost = _rows(files, names, tree, prefix)
    bias = chosen.bias
    if not any(chosen.biases(name, adapted) for name in (*found, *known)):
        bias = "none"  # a model without any
    return Copies(sites + rows, missing + lost, bias)


def _site(
    path: str,
    key: str,
    part: Part,
    kind: str,
    tied: str | None = None,
    transposed: bool = False,
    ids: tuple[int, ...] = (),
) -> FileSite:
    return FileSite(
        path=path,
        use=None,
        key=key,
        tied=tied,
        table=False,
        rank=0,
        alpha=0.0,
        scale=1.0,
        dropout=0.0,
        part=part,
        kind=kind,
        ids=ids,
        transposed=transposed,
    )


def _key(name: str, adapted: Collection[str], chosen: _peft.Whole) -> str:
    module, _, last = name.rpartition(".")
    inside = last == "bias" and module in adapted and not chosen.saves(name)
    return f"{module}.base_layer.bias" if inside else name


def _is_there(tree: Tree, path: str) -> bool:
    return any(tree.find(path, axes) is not None for axes in range(6))


def _check_axes(tree: Tree, path: str, axes: int) -> None:
    for more in range(axes + 1, 9):
        place = tree.find(path, more)
        if place is not None:
            shape = tuple(tree.leaves[place.leaf].shape)
            raise CheckpointError(
                f"{place.leaf!r} has the shape {shape}, and the file holds it whole "
                f"with {axes} axes: which of ours those are is not known. Load such a "
                "leaf from a file with our paths."
            )


def _copy_of_head(files: AdapterFiles, found: dict[str, str], names: NameMap) -> str:
    """The key of the head's copy of a tied table, without the prefix."""
    table, head = names.tensor(names.tied or ""), f"{names.head}.weight"
    if not (table in found and head in found):
        raise CheckpointError(
            f"{files.what} trains {shorten([n for n in (table, head) if n in found])} "
            "whole in one of its uses, and the model has one weight for the table and "
            "the head. Train it with `ensure_weight_tying`, or untie the model."
        )
    return head


def _rows(
    files: AdapterFiles, names: NameMap, tree: Tree, prefix: str
) -> tuple[list[FileSite], list[str]]:
    """Sites of trained rows, and the keys of those that the file lacks."""
    modules = {
        key.removeprefix(prefix).removesuffix(ROWS): key
        for key in files.tensors.entries
        if key.endswith(ROWS)
    }
    sites, missing = [], []
    for name, ids in _peft.rows_by_module(files.config, names, files.what).items():
        if name is None and len(modules) != 1:
            raise CheckpointError(
                f"{files.what} trains rows of the input embedding, and `names` does "
                "not say which of its tables that is. Say so: "
                "`NameMap(names, tied=<path>)`."
            )
        module = next(iter(modules)) if name is None else name
        path = names.module_path(module)
        place = None if path is None else tree.find(path, 2)
        if path is None or place is None:
            continue
        if module not in modules:
            missing.append(f"{prefix}{module}{ROWS}")
            continue
        shape = tuple(tree.leaves[place.leaf].shape)[len(place.stack) :]
        axis = 1 if names.layout(path) == "linear" else 0
        part = Part(shape, (axis,), (1 - axis,), lookup=True)
        sites.append(_site(path, module, part, "rows", ids=ids))
    return sites, missing
