"""Loading an adapter's folder onto a checkpoint's own tensors.

A table in which the checkpoint's tensors are the paths stands in for a model's, so that
a folder with PEFT's keys can be merged without any model.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from .. import _paths
from .._errors import CheckpointError, closest, shorten
from .._names import Entry, Layout, NameMap
from ..adapters import Adapter
from ._base_folder import BaseFolder
from ._copies import tensor_name
from ._file_site import FileSite, Part
from ._files import AdapterFiles
from ._fused import whole_modules
from ._kernels import is_turned, order_in, turned_back
from ._keys import parse, prefix_of
from ._loading import Loading
from ._piece import HEAD

# Architectures whose layers are `Conv1D`, which stores kernels as we do. Only square
# ones need the name: the shape tells the others.
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_WEIGHT = ".weight"

# Modules that hold a table of tokens, by the last part of their names.
TOKEN_TABLES = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")


def existing(tensor: str, base: BaseFolder) -> str:
    """The tensor under its own name, or that of a checkpoint without a head.

    Such a checkpoint leaves out the first part of every name.
    """
    for name in (tensor, tensor.partition(".")[2]):
        if name in base:
            return name
    raise CheckpointError(
        f"The adapter changes {tensor}, which {base.path} does not have. Closest: "
        f"{shorten(closest(tensor, base, 3))}. Merge it into the base that it was "
        "trained on."
    )


def load_onto(
    files: AdapterFiles, base: BaseFolder, names: NameMap | None
) -> tuple[Adapter, NameMap]:
    """Loads a folder onto the checkpoint's own tensors, as if they were parameters."""
    record, own = files.record, names is None
    if names is None:
        if record is not None and record.keys == "paths":
            raise CheckpointError(
                f"The keys of {files.folder} are paths. Give `names`, a table of "
                "(path, tensor name, layout), or save the adapter with `names`."
            )
        if files.config.get("target_parameters"):
            raise CheckpointError(
                f"{files.what} has `target_parameters`, and a checkpoint alone does "
                "not say how those lie, nor in which order a module has them. Give "
                "`names`, a table of (path, tensor name, layout)."
            )
        names = own_names(files, base)
        if record is not None:
            known = whole_modules(record.sites, rslora=record.rslora)
            sites = tuple(new for site in known for new in _renamed(site, names, base))
            # Here tensors are the paths, which those that grew are not.
            record = dataclasses.replace(record, sites=sites, grown=None)
            files = files._replace(record=record)
    params: dict[str, Any] = {}
    for tensor in base:
        path = names.path(tensor) or _with_prefix(tensor, names)
        if path is not None and base.entry(tensor).dtype is not None:
            _put(params, path, _leaf(base, tensor, path, names, files))
    # In a table of our own making, "same" means what Conv1D stores.
    known: Any = {"conv1d": own, "norms": False, "repeated": True}
    loading = Loading(files, params, None, names, **known)
    return loading.run(strict=True)[0], names


def _renamed(site: FileSite, names: NameMap, base: BaseFolder) -> list[FileSite]:
    """A site under its tensor's name, its weight flattened to `(d_in, d_out)`."""
    replace = dataclasses.replace
    if not site.low_rank:
        return _renamed_copy(site, names, base)
    path, part = names.module_path(site.key) or site.key, site.part
    if site.use == "head":
        if path != site.key:  # the checkpoint's head is not tied
            return [replace(site, path=path, use=None, part=None, base=None)]
        return [replace(site, path=names.tied or path)]
    if site.order is not None:  # the tensor's own axes say how it lies
        order = order_in(names.layout(path), len(site.order))
        return [replace(site, path=path, part=None, base=None, order=order)]
    found = []
    if site.tied is not None and (head := names.module_path(site.tied)) is not None:
        other = replace(site, path=head, key=site.tied, tied=None, table=False)
        found.append(replace(other, part=None, base=None))
        site = replace(site, tied=None)
    axes = () if part is None else (*part.inputs, *part.outputs)
    if part is None or axes != tuple(range(len(axes))):
        return [*found, replace(site, path=path, part=None, base=None)]
    d_in, d_out = (
        math.prod(part.shape[axis] for axis in side)
        for side in (part.inputs, part.outputs)
    )
    flat = Part((d_in, d_out), (0,), (1,), (), part.lookup)
    return [*found, replace(site, path=path, part=flat)]


def _renamed_copy(site: FileSite, names: NameMap, base: BaseFolder) -> list[FileSite]:
    """The same for a leaf trained whole, and for rows of a table."""
    replace = dataclasses.replace
    if site.kind == "rows":
        path = names.module_path(site.key)
        if path is None or site.part is None:
            return [site]
        axis = 1 if names.layout(path) == "linear" else 0
        shape = math.prod(site.part.shape[i] for i in site.part.outputs)
        rows = site.part.shape[site.part.inputs[0]]
        sizes = (rows, shape) if axis == 0 else (shape, rows)
        part = Part(sizes, (axis,), (1 - axis,), lookup=True)
        return [replace(site, path=path, part=part)]
    found = []
    for key in (site.key, site.tied):
        path = None if key is None else names.path(tensor_name(key))
        if key is None or path is None:
            continue
        shape = base.entry(existing(tensor_name(key), base)).shape
        part = Part(shape, (), tuple(range(len(shape))))
        one = replace(site, path=path, key=key, tied=None, part=part)
        found.append(replace(one, transposed=False))
    if len(found) == 1 and site.tied is not None:  # the head has no tensor of its own
        found = [replace(found[0], tied=site.tied)]
    return found or [site]


def _with_prefix(tensor: str, names: NameMap) -> str | None:
    """The path of a tensor of a checkpoint without a head."""
    firsts = {theirs.partition(".")[0] for _, theirs, _ in names.entries}
    found = (names.path(f"{first}.{tensor}") for first in sorted(firsts))
    return next((path for path in found if path is not None), None)


def _leaf(
    base: BaseFolder, tensor: str, path: str, names: NameMap, files: AdapterFiles
) -> Any:
    """A tensor as a leaf of a parameter tree: its values are read when asked for."""
    leaf = base.mapped(tensor)
    if is_turned(names.layout(path), leaf.ndim):
        leaf = turned_back(leaf)
    elif names.layout(path) == "linear" and leaf.ndim == 3:  # experts stay in front
        leaf = leaf.swapaxes(1, 2)
    sites = files.record.sites if files.record is not None else ()
    parts = (s.part.leaf_shape for s in sites if s.path == path and s.part)
    shape = next(parts, leaf.shape)
    if shape == leaf.shape or math.prod(shape) != math.prod(leaf.shape):
        return leaf
    if leaf.flags.c_contiguous:
        return leaf.reshape(shape)
    return _Shaped(shape, leaf.dtype)


@dataclasses.dataclass
class _Shaped:
    """A leaf whose values nobody needs to see."""

    shape: tuple[int, ...]
    dtype: Any


def _put(params: dict[str, Any], path: str, leaf: Any) -> None:
    parts = [part.replace("~1", "/").replace("~0", "~") for part in path.split("/")]
    *above, last = parts
    for key in above:
        params = params.setdefault(key, {})
    params[last] = leaf


def own_names(files: AdapterFiles, base: BaseFolder) -> NameMap:
    """A table in which the checkpoint's tensors are the paths."""
    entries = files.tensors.entries
    prefix = prefix_of(entries)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    tables = set()
    for key, entry in entries.items():
        parsed = parse(key, prefix)
        if parsed is not None and len(entry.shape) >= 2:
            shapes.setdefault(parsed.module, {})[parsed.factor] = entry.shape
            if parsed.table:
                tables.add(parsed.module)
    first = _left_out(shapes, base)
    copies = {tensor_name(key.removeprefix(prefix)) for key in entries}
    # Beside factors it is the base's own weight that PEFT wrote, not one it trained.
    copies -= {f"{module}{_WEIGHT}" for module in shapes}
    fits: dict[str, set[Layout]] = {}
    for tensor in base:
        if tensor == HEAD and base.tied:
            continue  # a copy of the table, which nobody reads
        if len(base.entry(tensor).shape) != 2 or first + tensor in copies:
            fits[tensor] = {"same"}
        elif tensor.endswith(_WEIGHT):
            module = first + tensor.removesuffix(_WEIGHT)
            fits[tensor] = _fits(shapes.get(module, {}), base.entry(tensor).shape)
            if module in tables or tensor.split(".")[-2] in TOKEN_TABLES:
                fits[tensor] = {"same"}
    conv1d = base.config.get("model_type") in _CONV1D
    conv1d = conv1d or bool(files.config.get("fan_in_fan_out"))
    square: Layout = "same" if conv1d else "linear"
    found: list[Entry] = []
    for tensor, fit in fits.items():
        layout = square if len(fit) != 1 else next(iter(fit))
        found.append((_paths.escape(tensor), first + tensor, layout))
    return NameMap(tuple(found))


def _fits(
    factors: Mapping[str, tuple[int, ...]], shape: tuple[int, ...]
) -> set[Layout]:
    """The layouts in which a tensor has the shape of its factors' product."""
    if set(factors) != {"a", "b"}:
        return set()
    product = factors["b"][0], factors["a"][1]
    found: set[Layout] = set()
    found |= {"linear"} if product == shape else set()
    found |= {"same"} if product[::-1] == shape else set()
    return found


def _left_out(modules: Iterable[str], base: BaseFolder) -> str:
    """The first part of the modules' names where the tensors do without it."""
    for module in modules:
        first, dot, rest = module.partition(".")
        if f"{module}{_WEIGHT}" in base:
            return ""
        if f"{rest}{_WEIGHT}" in base:
            return first + dot
    return ""
