"""Adapters as the changes that they make to a checkpoint's tensors."""

import dataclasses
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from .. import _paths
from .._errors import AdapterError, CheckpointError, closest, shorten
from .._names import Entry, Layout, NameMap
from ..adapters import Adapter, Fixed
from ..planning import Slot
from ..structure import Use
from ._base_folder import BaseFolder
from ._factors import host
from ._files import AdapterFiles, open_adapter
from ._kernels import order_in, order_of
from ._keys import parse, prefix_of
from ._load import Loading
from ._record import FileSite, Part
from ._sites import part_of, tensor_layout

# Architectures whose layers are `Conv1D`, which stores kernels as we do. Only square
# ones need the name: the shape tells the others.
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_WEIGHT = ".weight"
HEAD = "lm_head.weight"

# Modules that hold a table of tokens, by the last part of their names.
TOKEN_TABLES = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """What an adapter adds to one tensor: `scale * a @ b`, laid out as the tensor is.

    Attributes:
        tensor: the tensor's name; the head's even where it is tied and has none.
        source: the tensor that it is added to; the table for a tied head.
        a: `(d_in, rank)`.
        b: `(rank, d_out)`.
        scale: the multiplier, a float32.
        layout: `"linear"` if the tensor is `(d_out, d_in)`, else `"same"`.
        use: the only use of a tied weight that it acts in, or `None`.
        kernel: whether the tensor is a convolution's, `(d_out, ...)`, whose other axes
            are flattened to `d_in` here.
    """

    tensor: str
    source: str
    a: np.ndarray
    b: np.ndarray
    scale: np.float32
    layout: Layout
    use: Use | None
    kernel: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the tensor that it fits, less the window of a kernel."""
        shape = self.a.shape[0], self.b.shape[1]
        return shape if self.layout == "same" else shape[::-1]

    def on_head(self, tensor: str) -> "Piece":
        """The same change where the head has a tensor of its own."""
        return dataclasses.replace(
            self, tensor=tensor, source=tensor, a=self.b.T, b=self.a.T, layout="linear"
        )


def pieces_of(
    adapter: Adapter | str | os.PathLike, base: BaseFolder, names: NameMap | None
) -> list[Piece]:
    """The changes of an adapter, or of an adapter's folder.

    Args:
        adapter: one of the two. A folder is loaded as `load_adapter` does, strictly.
        base: the model that it is merged into.
        names: the model's name table; folders with PEFT's keys do without.

    Raises:
        CheckpointError: if a tensor is not in the base, or has another shape.
    """
    if isinstance(adapter, Adapter):
        if names is None:
            raise CheckpointError(
                "An `Adapter` names paths, and the checkpoint tensors. Give `names`, a "
                "table of (path, tensor name, layout); for the models of "
                "`lorax_jax.models` it is `model.names`."
            )
    else:
        with open_adapter(adapter) as files:
            adapter, names = _load(files, base, names)
    found = list(_of_adapter(adapter, base, names))
    for piece in found:
        shape = base.entry(piece.source).shape
        if (matrix_of(shape) if piece.kernel else shape) != piece.shape:
            raise CheckpointError(
                f"The adapter's change of {piece.tensor} has the shape {piece.shape}, "
                f"and {base.path} has {piece.source} with {shape}. Merge it into the "
                "base that it was trained on."
            )
    return found


def _of_adapter(adapter: Adapter, base: BaseFolder, names: NameMap) -> Iterator[Piece]:
    for name, fixed in adapter.fixed.items():
        train = adapter.train[name]
        more = {*train} - {"a", "b"} | {*fixed} - {"scale", "rank", "dropout"}
        if more:
            raise AdapterError(
                f"The adapter of {name!r} keeps {sorted(more)} beside A and B. Merge "
                "it in memory: `lj.merge(params, adapter)`."
            )
        slot = _slot(train, fixed)
        if slot.experts:
            raise AdapterError(
                f"{name!r} has factors for each of {math.prod(slot.experts)} experts, "
                "whose tensors a name table cannot list. Merge it in memory: "
                "`lj.merge(params, adapter)`."
            )
        if slot.role.groups > 1:
            raise AdapterError(
                f"{name!r} is the kernel of a convolution in {slot.role.groups} "
                "groups, which an export has no word for. Merge it in memory: "
                "`lj.merge(params, adapter)`."
            )
        count, width = max(1, math.prod(slot.layers)), train["a"].shape[-1]
        a = host(train["a"]).reshape(count, -1, width)
        b = host(train["b"]).reshape(count, width, -1)
        ranks = host(fixed["rank"]).reshape(-1)
        scales = host(fixed["scale"]).reshape(-1)
        head = slot.role.use == "head"
        for i in range(count):
            if ranks[i] == 0:
                continue
            path = _virtual(slot, i, names)
            source = _existing(names.tensor(path) or "", base)
            tensor = f"{names.head}{_WEIGHT}" if head else source
            part = part_of(slot)
            order = order_of(names.layout(path), part, path)
            layout = tensor_layout(names.layout(path) or "linear", part)
            if layout is None:
                raise AdapterError(
                    f"The inputs {slot.role.inputs} and outputs {slot.role.outputs} of "
                    f"{name!r} alternate, so its change is no matrix of {tensor}. "
                    "Merge it in memory: `lj.merge(params, adapter)`."
                )
            down, up = a[i, :, : ranks[i]], b[i, : ranks[i]]
            if order is not None:  # the inputs as the tensor has them
                down = down.reshape(*slot.inputs, -1).transpose(*order, len(order))
                down, layout = down.reshape(-1, ranks[i]), "linear"
            yield Piece(
                tensor=tensor,
                source=tensor if tensor in base and not base.tied else source,
                a=down,
                b=up,
                scale=scales[i],
                layout=layout,
                use=slot.role.use,
                kernel=order is not None,
            )


def matrix_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of a kernel with everything but its outputs flattened."""
    return shape[0], math.prod(shape[1:])


def _slot(train: Mapping[str, Any], fixed: Fixed) -> Slot:
    """A leaf as its arrays describe it."""
    role = fixed.role
    a, b = train["a"].shape, train["b"].shape
    held = (*role.batch, *role.inputs)
    shape = dict(zip(held, a[: len(held)], strict=True))
    shape |= dict(zip(role.outputs, b[len(role.batch) + 1 :], strict=True))
    return Slot(role, tuple(shape[axis] for axis in range(len(shape))), None, ())


def _virtual(slot: Slot, i: int, names: NameMap) -> str:
    """The path of one layer of a leaf: the one that the name table knows."""
    index = [str(n) for n in np.unravel_index(i, slot.layers)] if slot.layers else []
    parts = slot.role.path.split("/")
    depths = itertools.combinations_with_replacement(range(len(parts)), len(index))
    found = []
    for where in depths:
        whole = list(parts)
        for depth, number in reversed(list(zip(where, index, strict=True))):
            whole.insert(depth, number)
        if names.tensor("/".join(whole)) is not None:
            found.append("/".join(whole))
    if len(found) != 1:
        near = closest(slot.role.path, [entry[0] for entry in names.entries], 3)
        layer = f", layer {index[0]}" if index else ""
        raise CheckpointError(
            f"`names` has {'no' if not found else 'more than one'} tensor for "
            f"{slot.role.path!r}{layer}. Closest: {shorten(near)}."
        )
    return found[0]


def _existing(tensor: str, base: BaseFolder) -> str:
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


def _load(
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
        names = _own_names(files, base)
        if record is not None:
            sites = tuple(s for site in record.sites for s in _renamed(site, names))
            files = files._replace(record=dataclasses.replace(record, sites=sites))
    params: dict[str, Any] = {}
    for tensor in base:
        path = names.path(tensor) or _with_prefix(tensor, names)
        if path is not None and base.entry(tensor).dtype is not None:
            _put(params, path, _leaf(base, tensor, path, names, files))
    # In a table of our own making, "same" means what Conv1D stores.
    loading = Loading(files, params, None, names, conv1d=own)
    return loading.run(strict=True)[0], names


def _renamed(site: FileSite, names: NameMap) -> list[FileSite]:
    """A site under its tensor's name, its weight flattened to `(d_in, d_out)`."""
    replace = dataclasses.replace
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
    if names.layout(path) == "linear" and leaf.ndim == 2:
        leaf = leaf.T
    if names.layout(path) == "conv" and leaf.ndim > 2:
        leaf = leaf.transpose(*range(2, leaf.ndim), 1, 0)
    sites = files.record.sites if files.record is not None else ()
    shape = next((s.part.shape for s in sites if s.path == path and s.part), leaf.shape)
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


def _own_names(files: AdapterFiles, base: BaseFolder) -> NameMap:
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
    fits: dict[str, set[Layout]] = {}
    for tensor in base:
        if tensor == HEAD and base.tied:
            continue  # a copy of the table, which nobody reads
        shape = base.entry(tensor).shape
        if not tensor.endswith(_WEIGHT) or len(shape) < 2:
            continue
        module = first + tensor.removesuffix(_WEIGHT)
        if len(shape) > 2:  # a kernel of a convolution, as it lies
            fits |= {tensor: {"same"}} if module in shapes else {}
        else:
            fits[tensor] = _fits(shapes.get(module, {}), shape)
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
