"""Leaves trained whole, and rows of tables, under PEFT's names."""

from collections.abc import Collection, Sequence

from .. import _peft
from .._errors import CheckpointError, closest, shorten
from .._names import NameMap
from ..planning import Site, Slot
from ._file_site import FileSite
from ._kernels import is_turned
from ._sites import module_of, part_of

_WEIGHT = ".weight"
_BASE = ".base_layer."
_OURS = "or leave `names` out for a file with our paths."


def copy_site(
    slot: Slot, site: Site, names: NameMap | None, adapted: Collection[str]
) -> FileSite:
    """A site without factors, as a file has it.

    Args:
        slot: the leaf.
        site: the site: a leaf that is trained whole, or rows of a table.
        names: the model's name table; `None` for keys of our paths.
        adapted: names of the modules that have factors.

    Raises:
        CheckpointError: if PEFT has no key for it.
    """
    key, tied, transposed = site.path, None, False
    if names is not None:
        layout = names.layout(site.path)
        if layout == "linear" and len(site.shape) > 2:
            raise CheckpointError(
                f"{site.path!r} of shape {site.shape} has more than two axes, and "
                "which of them PEFT's matrix has in its columns is not known where no "
                f"factors act. Give `names` a table of matrices, {_OURS}"
            )
        if site.role.kind == "rows":
            key = module_of(site.path, names)
            if key in adapted:
                raise CheckpointError(
                    f"{site.path!r} has factors and trained rows, and PEFT keeps one "
                    f"of them for a module. Leave one of the two out, {_OURS}"
                )
        else:
            key = _tensor(site.path, names)
            transposed = is_turned(layout, len(site.shape))
            module, _, last = key.rpartition(".")
            if last == "bias" and module in adapted:
                key = f"{module}{_BASE}bias"
            if site.path == names.tied and names.module_path(names.head) is None:
                tied = names.head + _WEIGHT
    return FileSite(
        path=site.path,
        use=None,
        key=key,
        tied=tied,
        table=False,
        rank=0,
        alpha=0.0,
        scale=1.0,
        dropout=0.0,
        part=part_of(slot),
        kind=site.role.kind,
        ids=slot.ids,
        transposed=transposed,
    )


def tensor_name(key: str) -> str:
    """The model's name of a tensor that was trained whole.

    >>> tensor_name("h.0.q.base_layer.bias")
    'h.0.q.bias'
    """
    return key.replace(_BASE, ".")


def modules_to_save(
    sites: Sequence[FileSite], names: NameMap, bias: str
) -> list[str] | None:
    """PEFT's modules of what is trained whole and is none of the trained biases.

    Raises:
        CheckpointError: if PEFT would train more, or less.
    """
    copies = {tensor_name(s.key): s for s in sites if s.kind == "whole"}
    adapted = adapted_modules(sites)
    whole = _peft.Whole({"bias": bias}, "")
    rest = [name for name in copies if not whole.biases(name, adapted)]
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in rest))
    known = [tensor.name for tensor in names.tensors(_peft.LAYERS)]
    inside: dict[str, list[str]] = {}
    for name in known:
        inside.setdefault(name.rpartition(".")[0], []).append(name)
    for module in modules:
        lacking = [name for name in inside.get(module, ()) if name not in copies]
        if lacking:
            raise CheckpointError(
                f"PEFT trains modules whole, and of {module!r} only a part is: "
                f"{shorten(lacking)} is not. Name all of its leaves in `whole`, "
                f"{_OURS}"
            )
    heads = [s.tied.removesuffix(_WEIGHT) for s in copies.values() if s.tied]
    modules += heads
    above = {
        ".".join(m.split(".")[:i]) for m in inside for i in range(1, m.count(".") + 2)
    }
    for module in modules:
        more = [name for name in above if name.endswith(module) and name not in modules]
        more += [name for name in adapted if f".{module}." in f".{name}."]
        if more:
            raise CheckpointError(
                f"PEFT's `modules_to_save` cannot name {module!r} alone: it would take "
                f"{shorten(sorted(more))} too. Train those whole as well, {_OURS}"
            )
    return modules or None


def adapted_modules(sites: Sequence[FileSite]) -> set[str]:
    """Names of the modules that have factors; bare parameters are none."""
    low_rank = [site for site in sites if site.low_rank and site.parameter is None]
    return {s.key for s in low_rank} | {s.tied for s in low_rank if s.tied is not None}


def _above(module: str) -> list[str]:
    """A module and those that hold it.

    >>> _above("h.0.q")
    ['h', 'h.0', 'h.0.q']
    """
    parts = module.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _tensor(path: str, names: NameMap) -> str:
    tensor = names.tensor(path)
    if tensor is None:
        near = closest(path, [entry[0] for entry in names.entries], 3)
        raise CheckpointError(
            f"`names` has no tensor for {path!r}, which is trained whole. Closest: "
            f"{shorten(near)}. Add an entry (path, tensor name, layout), {_OURS}"
        )
    return tensor
