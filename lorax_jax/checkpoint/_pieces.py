"""Adapters as the changes that they make to a checkpoint's tensors."""

import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._errors import AdapterError, CheckpointError, closest, shorten
from .._names import Layout, NameMap
from ..adapters import Adapter, Fixed, Role, check_parts
from ..conversion import to_lora
from ..planning import Slot
from ..structure import RANK, Factor
from ._arrays import host
from ._base_folder import BaseFolder
from ._files import open_adapter
from ._kernels import is_turned, order_of, turned
from ._layouts import tensor_layout
from ._onto_base import existing, load_onto
from ._piece import Piece
from ._sites import part_of

_WEIGHT = ".weight"


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
        for name, fixed in adapter.fixed.items():
            check_parts(adapter.train[name], fixed)
    else:
        with open_adapter(adapter) as files:
            adapter, names = load_onto(files, base, names)
    found = list(_of_adapter(to_lora(adapter), base, names))
    for piece in found:
        shape = base.entry(piece.source).shape
        if not piece.fits(shape):
            raise CheckpointError(
                f"The adapter's change of {piece.tensor} has the shape {piece.shape}, "
                f"and {base.path} has {piece.source} with {shape}. Merge it into the "
                "base that it was trained on."
            )
    return found


def _of_adapter(adapter: Adapter, base: BaseFolder, names: NameMap) -> Iterator[Piece]:
    for name, fixed in adapter.fixed.items():
        _check_matrices(name, adapter.train[name], fixed)
        train = {key: host(array) for key, array in adapter.train[name].items()}
        for index, arrays in _layers(train, fixed):
            role, arrays = _of_leaf(fixed.role, arrays)
            site = Fixed(role, fixed)
            for path, expert, held in _experts(role, index, arrays, names):
                source = existing(names.tensor(path) or "", base)
                if role.kind == "whole":
                    yield _copy(held["whole"], source, names.layout(path))
                elif "a" not in held or held["a"].shape[-1]:
                    found = _change(name, site, index, held, path, source, base, names)
                    yield from (replace(piece, expert=expert) for piece in found)


def _of_leaf(
    role: Role, arrays: dict[str, np.ndarray]
) -> tuple[Role, dict[str, np.ndarray]]:
    """The arrays of one layer of a part, with zeros around them, as the leaf's."""
    part, leaf = role.part, role.leaf
    if part is None:
        return role, arrays
    for wrong, what in (
        (role.kind == "dora", "magnitudes for some of the leaf's outputs"),
        (len(role.batch) > role.stack, "factors for each expert"),
    ):
        if wrong:
            raise AdapterError(
                f"{role.name!r} is a part of a leaf and has {what}, which an export "
                "has no word for. Merge it in memory: `lj.merge(params, adapter)`."
            )
    shape = part.leaf_shape(_shape(arrays, role))
    axes = {
        "a": (*role.inputs, RANK),
        "b": (RANK, *role.outputs),
        "bias": role.outputs,
    }
    laid = {
        key: role.lay(Factor(jnp.asarray(array), axes[key]), shape)
        for key, array in arrays.items()
    }
    return leaf, {key: host(factor.array) for key, factor in laid.items()}


def _check_matrices(name: str, train: Mapping[str, Any], fixed: Fixed) -> None:
    role = fixed.role
    experts = role.batch[role.stack :]
    first = next(axis for axis in itertools.count() if axis not in role.stacked)
    if experts not in ((), (first,)):
        shape = next(iter(train.values())).shape[role.stack : len(role.batch)]
        raise AdapterError(
            f"{name!r} has factors for each of {shape} experts, at the axes {experts}: "
            "a checkpoint has one axis of them, in front, or a tensor for each. Merge "
            "it in memory: `lj.merge(params, adapter)`."
        )
    if fixed.role.groups > 1:
        raise AdapterError(
            f"{name!r} is the kernel of a convolution in {fixed.role.groups} groups, "
            "which an export has no word for. Merge it in memory: "
            "`lj.merge(params, adapter)`."
        )


def _layers(
    train: Mapping[str, np.ndarray], fixed: Fixed
) -> Iterator[tuple[tuple[int, ...], dict[str, np.ndarray]]]:
    """The arrays of each layer, at its true rank, with the layer's index."""
    role = fixed.role
    if role.kind == "whole":
        stacked = role.stacked
        whole = np.moveaxis(train["whole"], stacked, range(len(stacked)))
        held = host(fixed["layers"]).tolist() if "layers" in fixed else None
        for index in np.ndindex(whole.shape[: len(stacked)]):
            layer = index if held is None else (held[index[0]],)
            yield layer, {"whole": whole[index]}
        return
    first = next(iter(train.values()))
    for index in np.ndindex(first.shape[: role.stack]):
        found = {key: array[index] for key, array in train.items()}
        if "a" in found:
            rank = host(fixed["rank"])[index]
            found["a"] = found["a"][..., :rank]
            each = (slice(None),) * (len(role.batch) - role.stack)
            found["b"] = found["b"][(*each, slice(rank))]
        yield index, found


def _experts(
    role: Role,
    index: tuple[int, ...],
    arrays: dict[str, np.ndarray],
    names: NameMap,
) -> Iterator[tuple[str, int | None, dict[str, np.ndarray]]]:
    """The paths of a layer's tensors, and the arrays that are for each.

    Experts are in one tensor, of which each changes its part, or have one of their own:
    the name table has a path for the layer, or one for every expert in it.

    Yields:
        The path, which expert's part of its tensor it is (`None` for the whole), and
        the arrays.
    """
    if len(role.batch) == role.stack:
        yield _virtual(role.path, index, names), None, arrays
        return
    packed = _virtuals(role.path, index, names)
    for expert in range(len(next(iter(arrays.values())))):
        held = {key: array[expert] for key, array in arrays.items()}
        if packed:
            yield _virtual(role.path, index, names), expert, held
        else:
            yield _virtual(role.path, (*index, expert), names), None, held


def _copy(whole: np.ndarray, tensor: str, layout: Layout | None) -> Piece:
    if layout == "linear" and whole.ndim > 2:
        raise AdapterError(
            f"{tensor} is trained whole with the shape {whole.shape}, and how its axes "
            "make a matrix is not known where no factors act. Merge it in memory: "
            "`lj.merge(params, adapter)`."
        )
    whole = turned(whole) if is_turned(layout, whole.ndim) else whole
    return Piece(tensor, tensor, "whole", {"whole": whole})


def _change(
    name: str,
    fixed: Fixed,
    index: tuple[int, ...],
    arrays: dict[str, np.ndarray],
    path: str,
    source: str,
    base: BaseFolder,
    names: NameMap,
) -> Iterator[Piece]:
    """The changes of one site with factors, or with trained rows; of one expert's."""
    role = _without_experts(fixed.role)
    slot = Slot(role, _shape(arrays, role), None, ())
    tensor = f"{names.head}{_WEIGHT}" if role.use == "head" else source
    part = part_of(slot)
    order = None
    if role.kind != "rows":
        order = order_of(names.layout(path), part, path)
    layout = tensor_layout(names.layout(path) or "linear", part)
    if layout is None:
        raise AdapterError(
            f"The inputs {role.inputs} and outputs {role.outputs} of {name!r} "
            f"alternate, so its change is no matrix of {tensor}. Merge it in memory: "
            "`lj.merge(params, adapter)`."
        )
    source = tensor if tensor in base and not base.tied else source
    if role.kind == "rows":
        ids = tuple(host(fixed["ids"]).tolist())
        flat = {"rows": arrays["rows"].reshape(len(ids), -1)}
        yield Piece(tensor, source, "rows", flat, layout=layout, ids=ids)
        return
    rank = arrays["a"].shape[-1]
    shapes = {"a": (-1, rank), "b": (rank, -1), "magnitude": (-1,), "bias": (-1,)}
    if order is not None:  # the inputs as the tensor has them
        arrays = arrays | {"a": arrays["a"].transpose(*order, len(order))}
        layout = "linear"
    flat = {key: array.reshape(shapes[key]) for key, array in arrays.items()}
    scale = np.float32(host(fixed["scale"])[index])
    bias = flat.pop("bias", None)
    kernel = order is not None
    yield Piece(tensor, source, role.kind, flat, scale, layout, role.use, kernel=kernel)
    if bias is not None:
        shifted = f"{tensor.removesuffix(_WEIGHT)}.bias"
        if shifted not in base:
            raise AdapterError(
                f"The adapter of {name!r} has a bias of B, and {base.path} has no "
                f"{shifted} to merge it into. Train without `lora_bias`, or give the "
                "layer a bias."
            )
        yield Piece(shifted, shifted, "shift", {"bias": bias}, scale)


def _without_experts(role: Role) -> Role:
    """The roles in a leaf that lacks the axis of experts."""
    experts = role.batch[role.stack :]

    def left(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(axis - sum(e < axis for e in experts) for axis in axes)

    return replace(
        role,
        inputs=left(role.inputs),
        outputs=left(role.outputs),
        batch=left(role.stacked),
    )


def _shape(arrays: Mapping[str, np.ndarray], role: Role) -> tuple[int, ...]:
    """The shape of what is adapted, its stacks of one layer, by its arrays."""
    shape = dict.fromkeys(role.stacked, 1)
    if role.kind == "rows":
        sizes = (1, *arrays["rows"].shape[1:])
        shape |= dict(zip((*role.inputs, *role.outputs), sizes, strict=True))
    else:
        a, b = arrays["a"].shape, arrays["b"].shape
        shape |= dict(zip(role.inputs, a[:-1], strict=True))
        shape |= dict(zip(role.outputs, b[1:], strict=True))
    return tuple(shape[axis] for axis in range(len(shape)))


def _virtual(path: str, layer: tuple[int, ...], names: NameMap) -> str:
    """The path of one layer of a leaf: the one that the name table knows."""
    found = _virtuals(path, layer, names)
    if len(found) != 1:
        near = closest(path, [entry[0] for entry in names.entries], 3)
        where = f", layer {layer[0]}" if layer else ""
        raise CheckpointError(
            f"`names` has {'no' if not found else 'more than one'} tensor for "
            f"{path!r}{where}. Closest: {shorten(near)}."
        )
    return found[0]


def _virtuals(path: str, layer: tuple[int, ...], names: NameMap) -> list[str]:
    """The paths that a layer of a leaf may have, of those in the name table."""
    index = [str(n) for n in layer]
    parts = path.split("/")
    depths = itertools.combinations_with_replacement(range(len(parts)), len(index))
    found = []
    for where in depths:
        whole = list(parts)
        for depth, number in reversed(list(zip(where, index, strict=True))):
            whole.insert(depth, number)
        if names.tensor("/".join(whole)) is not None:
            found.append("/".join(whole))
    return found
