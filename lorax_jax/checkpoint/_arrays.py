"""An adapted leaf's arrays, and the tensors of each of its sites.

Files hold, for each site, PEFT's tensors

    a          (*apart, rank, d_in)      the transpose of our `a`, input axes flattened
    b          (*apart, d_out, rank)     the transpose of our `b`, output axes flattened
    bias       (*experts, d_out)         of B
    magnitude  (*experts, d_out)         DoRA's
    whole      that of a layer           a leaf that was trained whole
    rows       (rows, width)             chosen rows of a table

for what has factors of its own within it, experts and groups of a convolution, at the
site's true rank. An adapter holds, for each leaf, all layers of a stack in one
array, padded with zeros to the largest rank.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._errors import AdapterError, CheckpointError
from ..adapters import KINDS, Fixed
from ..planning import Site, Slot

Tensors = dict[str, np.ndarray]

_PAIRS = (("a", "b"), ("a0", "b0"))
FACTORS = ("a", "b", "a0", "b0")


def split(
    slot: Slot, train: Mapping[str, Any], fixed: Fixed
) -> Iterator[tuple[int, Site, Tensors]]:
    """The sites of a leaf with their tensors.

    Args:
        slot: the leaf.
        train: the arrays that an adapter trains there.
        fixed: what it keeps beside them.

    Yields:
        The site's position in the slot, the site, and its tensors on the host.

    Raises:
        AdapterError: if the arrays are not those of the slot, or hold values beyond a
            site's rank.
    """
    kept = {name: fixed[name] for name in FACTORS if name in fixed}
    arrays = {name: host(array) for name, array in {**train, **kept}.items()}
    _check(slot, arrays, fixed)
    held = _rows_of(slot)
    for name, array in arrays.items():
        arrays[name] = _layers_first(slot, name, array)
    for down, up in _PAIRS:
        if down in arrays:
            arrays[down], arrays[up] = slot.matrices(arrays[down], arrays[up])
    for i, site in enumerate(slot.sites):
        if site is not None:
            found = {name: array[held[i]] for name, array in arrays.items()}
            # In float64: NumPy asks no question of a bfloat16.
            if not all(np.isfinite(x.astype(np.float64)).all() for x in found.values()):
                raise AdapterError(
                    f"The arrays of {site.path!r} hold NaN or infinity, and no file of "
                    "them could be loaded again. Save the state before training "
                    "diverged."
                )
            yield i, site, _as_file(slot, site, found)


def join(slot: Slot, tensors: Mapping[int, Tensors]) -> dict[str, jax.Array]:
    """A leaf's arrays from the tensors of its sites.

    Args:
        slot: the leaf.
        tensors: those of each site, by position in the slot; where a site is missing,
            low-rank arrays are zero, and so are starting factors that it lacks.

    Returns:
        The arrays of the adapter: what it trains, and starting factors if any has them.
    """
    held, found = _rows_of(slot), {}
    if "a" in KINDS[slot.role.kind].train:
        for down, up in _PAIRS:
            if any(down in held for held in tensors.values()):
                found |= _join_factors(slot, tensors, down, up)
    for name, shape in slot.shapes().items():
        if name in found:
            continue
        dtype = next(iter(tensors.values()))[name].dtype
        axes = _stacked_axes(slot, name)
        layers = [shape[axis] for axis in axes]
        rest = [n for axis, n in enumerate(shape) if axis not in axes]
        whole = np.zeros((math.prod(layers), *rest), dtype)
        for i, site in tensors.items():
            whole[held[i]] = site[name].reshape(rest)
        whole = np.moveaxis(whole.reshape(*layers, *rest), range(len(axes)), axes)
        found[name] = jnp.asarray(whole)
    return found


def shapes(slot: Slot, rank: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a site of this rank."""
    found = {}
    d_in, d_out = slot.sides
    for name in (*KINDS[slot.role.kind].train, *["bias"] * slot.bias):
        match name:
            case "a":
                found[name] = (*slot.apart, rank, d_in)
            case "b":
                found[name] = (*slot.apart, d_out, rank)
            case "bias" | "magnitude":
                found[name] = (*slot.experts, math.prod(slot.outputs))
            case "rows":
                found[name] = (len(slot.ids), math.prod(slot.outputs))
            case "whole":
                found[name] = slot.outputs
    return found


def host(array: Any) -> np.ndarray:
    """An array on the host.

    Raises:
        CheckpointError: if parts of it are on devices of other processes, or if it has
            no value yet.
    """
    if isinstance(array, Tracer):
        raise CheckpointError(
            "The adapter is being traced, and has no values that could be written. "
            "Save it outside of `jit`."
        )
    if not getattr(array, "is_fully_addressable", True):
        raise CheckpointError(
            "The adapter is spread over several processes, and each sees a part of it. "
            "Gather it first, e.g. with "
            "`jax.experimental.multihost_utils.process_allgather`."
        )
    return np.asarray(array)


def _stacked_axes(slot: Slot, name: str) -> tuple[int, ...]:
    """The axes of an array that count layers: those of the leaf in a copy of it."""
    role = slot.role
    return role.stacked if name == "whole" else tuple(range(role.stack))


def _rows_of(slot: Slot) -> dict[int, int]:
    """Where each site is among the layers of its leaf's arrays.

    Low-rank arrays hold all layers, copies of the leaf those that are trained.
    """
    if slot.role.kind == "whole":
        return {i: row for row, i in enumerate(slot.adapted)}
    return {i: i for i in range(len(slot.sites))}


def _layers_first(slot: Slot, name: str, array: np.ndarray) -> np.ndarray:
    axes = _stacked_axes(slot, name)
    array = np.moveaxis(array, axes, range(len(axes)))
    return array.reshape(math.prod(array.shape[: len(axes)]), *array.shape[len(axes) :])


def _as_file(slot: Slot, site: Site, arrays: Tensors) -> Tensors:
    """One layer's arrays as its tensors."""
    if slot.role.kind == "whole":
        return {"whole": np.ascontiguousarray(arrays["whole"])}
    if slot.role.kind == "rows":
        return {"rows": arrays["rows"].reshape(len(slot.ids), -1)}
    found = {}
    for down, up in _PAIRS:
        if down not in arrays:
            continue
        a, b = arrays[down], arrays[up]
        if a[..., site.rank :].any() and b[..., site.rank :, :].any():
            raise AdapterError(
                f"{site.path!r} has rank {site.rank}, and its arrays are not zero "
                "beyond it, so the file would hold another adapter. Take the arrays as "
                "`init` or `load_adapter` laid them out."
            )
        found[down] = np.ascontiguousarray(np.swapaxes(a[..., : site.rank], -1, -2))
        found[up] = np.ascontiguousarray(np.swapaxes(b[..., : site.rank, :], -1, -2))
    for name in arrays.keys() - found.keys():
        found[name] = arrays[name].reshape(*slot.experts, -1)
    return found


def _join_factors(
    slot: Slot, tensors: Mapping[int, Tensors], down: str, up: str
) -> dict[str, jax.Array]:
    """A pair of arrays, padded to the slot's rank."""
    count, rank = len(slot.sites), slot.rank
    d_in, d_out = slot.sides
    some = next(held for held in tensors.values() if down in held)
    a = np.zeros((count, *slot.apart, d_in, rank), some[down].dtype)
    b = np.zeros((count, *slot.apart, rank, d_out), some[up].dtype)
    for i, held in tensors.items():
        if down in held:
            one, other = held[down], held[up]
            a[i, ..., : one.shape[-2]] = np.swapaxes(one, -1, -2)
            b[i, ..., : other.shape[-1], :] = np.swapaxes(other, -1, -2)
    a, b = slot.arrays(a, b)
    return {down: jnp.asarray(a), up: jnp.asarray(b)}


def _check(slot: Slot, arrays: Tensors, fixed: Fixed) -> None:
    wanted, true = slot.shapes(), [0 if s is None else s.rank for s in slot.sites]
    found = {name: array.shape for name, array in arrays.items()}
    if "a" in KINDS[slot.role.kind].train:  # frozen or not
        wanted |= {"a": slot.shape_a(), "b": slot.shape_b()}
    for down, up in _PAIRS[1:]:
        if down in found or up in found:
            wanted |= {down: found.get("a", ()), up: found.get("b", ())}
    for name in ("a", "b"):  # any padding serves, as long as the two agree
        if name in wanted and name in found and found["a"]:
            at = -1 if name == "a" else slot.role.stack + len(slot.experts)
            sizes = list(wanted[name])
            sizes[at] = found["a"][-1]
            wanted[name] = tuple(sizes)
    ranks = host(fixed["rank"]).reshape(-1).tolist() if "rank" in fixed else true
    ids = tuple(host(fixed["ids"]).tolist()) if "ids" in fixed else slot.ids
    held = tuple(host(fixed["layers"]).tolist()) if "layers" in fixed else slot.adapted
    if (found, ranks, ids, held) != (wanted, true, slot.ids, slot.adapted):
        # No sets of layers where arrays hold all of them.
        raise AdapterError(
            f"The adapter's arrays of {slot.name!r} are not those of the plan.\n"
            f"  plan     {_shown(slot.shapes())}, ranks { {*true} }\n"
            f"  adapter  {_shown(found)}, ranks { {*ranks} }\n"
            "Give `save_adapter` the plan that the adapter was made with; for a "
            "loaded adapter it is `receipt.plan`, and for one that `to_lora` made "
            "`planning.fitted(plan, adapter)`."
        )


def _shown(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())
