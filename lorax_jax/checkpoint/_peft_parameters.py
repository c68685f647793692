"""Bare parameters in a file that PEFT wrote: `target_parameters`."""

from collections.abc import Collection
from typing import NamedTuple

from .. import _peft
from .._errors import CheckpointError
from .._names import NameMap
from ..planning import Plan
from ._file_site import BASE_LAYER, FileSite, Part
from ._files import AdapterFiles
from ._packed import is_mirrored, keys_of, part_read
from ._resolve import Tree
from ._sites import part_of


class Packed(NamedTuple):
    """What a PEFT file holds of bare parameters.

    Attributes:
        sites: its sites.
        keys: what stands before the endings in the keys that are theirs.
        missing: the same of those that it promises and does not have.
    """

    sites: list[FileSite]
    keys: frozenset[str]
    missing: list[str]


def packed_sites(
    files: AdapterFiles,
    names: NameMap,
    tree: Tree,
    plan: Plan | None,
    modules: Collection[str],
) -> Packed:
    """Reads them off the keys and the configuration of a file.

    Args:
        files: the open folder.
        names: the model's name table.
        tree: the parameters.
        plan: a plan, which knows which axes are inputs.
        modules: what stands before the endings in the file's keys.

    Raises:
        CheckpointError: if the keys are nested deeper than the table has parameters.
    """
    adapted = _peft.Parameters(files.config, files.what)
    if not adapted.names:
        return Packed([], frozenset(), [])
    ranks = _peft.Ranks(files.config, files.what)
    sites, known, missing = [], set(), []
    for tensor in names.tensors(tree.layers()):
        if not adapted(tensor.name):
            continue
        owner = tensor.name.rpartition(".")[0]
        key = keys_of(owner, names, adapted)[tensor.name]
        known.add(key)
        if not tree.knows(tensor.path):
            continue
        if key not in modules:
            missing.append(key)
            continue
        rank, alpha, scale = ranks(tensor.name)
        part, mirrored = _axes(tensor.name, tensor.path, names, tree, plan)
        sites.append(
            FileSite(
                path=tensor.path,
                use=None,
                key=key,
                tied=None,
                table=False,
                rank=rank,
                alpha=alpha,
                scale=scale,
                dropout=0.0,
                part=part,
                parameter=tensor.name,
                mirrored=mirrored,
            )
        )
    _check_depth(modules, known)
    return Packed(sites, frozenset(known), missing)


def _axes(
    tensor: str, path: str, names: NameMap, tree: Tree, plan: Plan | None
) -> tuple[Part | None, bool]:
    """The roles of our axes, where no plan says them, and whether theirs differ."""
    if plan is not None:
        slots = (
            slot
            for slot in plan.slots
            if any(site is not None and site.path == path for site in slot.sites)
        )
        slot = next(slots, None)
        if slot is not None:
            return None, is_mirrored(tensor, path, part_of(slot), names)
    place = tree.find(path, 3) or tree.find(path, 2)
    if place is None:
        return None, False
    whole = enumerate(tree.leaves[place.leaf].shape)
    shape = tuple(n for axis, n in whole if axis not in place.stack)
    return part_read(tensor, path, shape, names), False


def _check_depth(modules: Collection[str], known: Collection[str]) -> None:
    for module in modules:
        inside = module.endswith(BASE_LAYER) and module not in known
        if inside and module.removesuffix(BASE_LAYER) in known:
            raise CheckpointError(
                f"The file has factors under {module!r}: PEFT adapts more parameters "
                "of that module than `names` lists, and which of them is which is "
                "told by their order. List all that `target_parameters` takes, in the "
                "order in which the module's class makes them."
            )
