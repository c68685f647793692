"""The sites of a file that PEFT wrote, from its keys and its configuration."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from .. import _peft
from .._errors import CheckpointError
from .._names import NameMap
from ..planning import Plan
from ..structure import Use
from ._file_site import FileSite
from ._files import TENSORS, AdapterFiles
from ._kernels import check_groups, order_in
from ._keys import keys, parse, prefix_of
from ._peft_copies import peft_copies
from ._peft_parameters import packed_sites
from ._resolve import Tree
from ._safetensors import Reader
from ._sites import is_shared


class Found(NamedTuple):
    """What a PEFT file holds and lacks.

    Attributes:
        prefix: what its keys start with.
        sites: its sites.
        missing: keys that its configuration promises and the file does not have.
        promised: how many sites those are.
        bias: which biases the configuration trains.
    """

    prefix: str
    sites: list[FileSite]
    missing: list[str]
    promised: int
    bias: str


def peft_sites(
    files: AdapterFiles,
    names: NameMap,
    tree: Tree,
    plan: Plan | None,
    *,
    conv1d: bool = False,
) -> Found:
    """Reads the sites off a file's keys; ranks and scales off its configuration.

    Keys of modules that `names` or the parameters do not have are left to the caller:
    no site claims them.

    Args:
        files: the open folder.
        names: the model's name table.
        tree: the parameters.
        plan: a plan, which knows whether an embedding is tied, and which axes are
            inputs.
        conv1d: the table's `"same"` kernels are known to be `(d_in, d_out)`.

    Raises:
        CheckpointError: if it cannot be told how a kernel lies.
    """
    ranks = _peft.Ranks(files.config, files.what)
    rate = _rate(files)
    kind = "dora" if _peft.flag(files.config, "use_dora", files.what) else "lora"
    bias = _peft.flag(files.config, "lora_bias", files.what)
    prefix = prefix_of(files.tensors.entries)
    modules: dict[str, bool] = {}
    for key in files.tensors.entries:
        parsed = parse(key, prefix)
        if parsed is not None:
            modules.setdefault(parsed.module, parsed.table)
    packed = packed_sites(files, names, tree, plan, modules)
    modules = {m: table for m, table in modules.items() if m not in packed.keys}
    tied = _tied(names, tree, plan)
    table = None if tied is None else names.module(tied)
    shared = table is not None and _is_shared(files, names, table, prefix, plan)
    turned = False
    if plan is None and not conv1d:
        turned = _outputs_first(files, names, tree, modules, prefix)
    sites = []

    def add(module: str, path: str, use: Use | None, head: str | None = None) -> None:
        rank, alpha, scale = ranks(module)
        is_kernel = not modules[module] and use is None
        order = None
        if is_kernel:
            down, up = (
                entry.shape if entry is not None else ()
                for entry in map(
                    files.tensors.entries.get, keys(module, prefix=prefix).values()
                )
            )
            check_groups(module, down, up)
            order = order_in(names.layout(path), max(len(down), len(up)) - 1)
        sites.append(
            FileSite(
                path=path,
                use=use,
                key=module,
                tied=head,
                table=modules[module],
                rank=rank,
                alpha=alpha,
                scale=scale,
                dropout=rate,
                kind=kind,
                bias=bias,
                order=order,
                turned=turned and is_kernel and names.layout(path) == "same",
            )
        )

    for module in modules:
        path = names.module_path(module)
        if path is not None and tree.knows(path):
            if path != tied:
                add(module, path, None)
            elif shared:
                add(module, path, None, names.head)
            else:
                add(module, path, "lookup")
        elif path is None and module == names.head and tied is not None and not shared:
            add(module, tied, "head")
    lost = [
        list(keys(m, kind=kind, table=table, bias=bias, prefix=prefix).values())
        for m, table in _promised(files, names, tree, tied, modules).items()
    ]
    lost += [list(keys(m, prefix=prefix).values()) for m in packed.missing]
    copies = peft_copies(files, names, tree, set(modules), prefix)
    lost += [[key] for key in copies.missing]
    missing = [key for keys_ in lost for key in keys_]
    whole = [*sites, *packed.sites, *copies.sites]
    return Found(prefix, whole, missing, len(lost), copies.bias)


def _rate(files: AdapterFiles) -> float:
    rate = _peft.number(files.config, "lora_dropout", files.what)
    if not 0 <= rate < 1:
        raise CheckpointError(
            f"{files.what} has `lora_dropout` = {rate}; a probability in [0, 1) is "
            "meant."
        )
    return float(rate)


def _tied(names: NameMap, tree: Tree, plan: Plan | None) -> str | None:
    """The path of an embedding whose two uses PEFT adapts separately."""
    path = names.tied
    if path is None or not tree.knows(path) or names.module_path(names.head):
        return None
    if plan is not None and not any(
        site.path == path and (site.use or is_shared(plan, site)) for site in plan
    ):
        return None
    return path


def _is_shared(
    files: AdapterFiles, names: NameMap, table: str, prefix: str, plan: Plan | None
) -> bool:
    """Whether embedding and head hold one adapter, each the other's transpose."""
    head = names.head
    one = keys(table, table=True, prefix=prefix)
    other = keys(head, table=False, prefix=prefix)
    if files.config.get("use_dora"):
        return False  # each has magnitudes of its own
    ensured = bool(files.config.get("ensure_weight_tying"))
    if plan is not None and any(
        site.path == names.tied and is_shared(plan, site) for site in plan
    ):
        return True
    every = (*one.values(), *other.values())
    if not all(key in files.tensors.entries for key in every):
        return ensured and one["a"] in files.tensors.entries
    same = mirrored(files.tensors, one, other)
    if ensured and not same:
        raise CheckpointError(
            f"{files.what} ensures that {table!r} and {head!r} have one adapter, and "
            f"{TENSORS} holds two. Set `ensure_weight_tying` to false to load both."
        )
    return same


def _outputs_first(
    files: AdapterFiles,
    names: NameMap,
    tree: Tree,
    modules: Mapping[str, bool],
    prefix: str,
) -> bool:
    """Whether kernels that the table calls `"same"` are `(d_out, d_in)`.

    GPT-2's `Conv1D` keeps `(d_in, d_out)`; a model here may as well keep what torch's
    `Linear` has. A kernel that is not square tells, for all of them.
    """
    seen: dict[bool, str] = {}
    square = None
    for module, table in modules.items():
        path = names.module_path(module)
        place = None if path is None or table else tree.find(path)
        if path is None or place is None or names.layout(path) != "same":
            continue
        shape = tree.leaves[place.leaf].shape
        kept = tuple(n for axis, n in enumerate(shape) if axis not in place.stack)
        down, up = (
            files.tensors.entries.get(key)
            for key in keys(module, prefix=prefix).values()
        )
        if down is None or up is None or len(down.shape) != 2 or len(up.shape) != 2:
            continue
        if kept[0] == kept[1]:
            square = module
        elif (up.shape[0], down.shape[1]) in (kept, kept[::-1]):
            seen[(up.shape[0], down.shape[1]) == kept] = module
    if len(seen) == 1:
        return next(iter(seen))
    if square is None or (not seen and files.config.get("fan_in_fan_out") is True):
        return False
    raise CheckpointError(
        f"{square!r} is square, and `names` calls it 'same': whether its weight is "
        "(d_in, d_out) or (d_out, d_in) cannot be told. Give the `plan`, e.g. that of "
        "`LoraConfig.from_peft(folder, names)`."
    )


def mirrored(
    tensors: Reader, table: Mapping[str, str], head: Mapping[str, str]
) -> bool:
    """Whether the head's tensors are those of the embedding.

    Its factors are theirs the other way round; a copy of the table is the same.
    """
    other_side = {"a": "b", "b": "a"}
    for name, one in table.items():
        other = head[other_side.get(name, name)]
        left, right = tensors.entries[one], tensors.entries[other]
        turn = -1 if name in other_side else 1
        if left.dtype != right.dtype or left.shape != right.shape[::turn]:
            return False
        if left.dtype is None:
            continue
        theirs = tensors.read(other)
        theirs = theirs.T if name in other_side else theirs
        if not np.array_equal(tensors.read(one), theirs):
            return False
    return True


def _promised(
    files: AdapterFiles,
    names: NameMap,
    tree: Tree,
    tied: str | None,
    modules: Mapping[str, bool],
) -> dict[str, bool]:
    """Modules that the targets take and that have no key; whether each is a table."""
    chosen = _peft.Targets(files.config, files.what)
    if chosen.targets is None or chosen.all_linear:
        return {}
    known: dict[str, bool] = {
        module.name: module.path.split("/")[-1] == "embedding"
        for module in names.expand(tree.layers())
        if tree.knows(module.path)
    }
    if tied is not None:
        known[names.head] = False
    return {m: table for m, table in known.items() if m not in modules and chosen(m)}
