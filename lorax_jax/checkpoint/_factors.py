"""An adapted leaf's arrays, and the two matrices of each of its sites.

Files hold, for each site, PEFT's two matrices

    A  (*experts, rank, d_in)     the transpose of our `a`, input axes flattened
    B  (*experts, d_out, rank)    the transpose of our `b`, output axes flattened

at the site's true rank. An adapter holds, for each leaf, all layers of a stack in one
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
from ..adapters import Fixed
from ..planning import Site, Slot

Matrices = tuple[np.ndarray, np.ndarray]


def split(
    slot: Slot, train: Mapping[str, Any], fixed: Fixed
) -> Iterator[tuple[int, Site, Matrices]]:
    """The sites of a leaf with their matrices.

    Args:
        slot: the leaf.
        train: its `a` and `b`.
        fixed: its true ranks.

    Yields:
        The site's position in the slot, the site, and `(A, B)` on the host.

    Raises:
        AdapterError: if the arrays are not those of the slot, or hold values beyond a
            site's rank.
    """
    ranks = host(fixed["rank"]).reshape(-1)
    a, b = host(train["a"]), host(train["b"])
    _check(slot, a, b, ranks)
    count, rank = len(slot.sites), a.shape[-1]
    a = a.reshape(count, *slot.experts, math.prod(slot.inputs), rank)
    b = b.reshape(count, *slot.experts, rank, math.prod(slot.outputs))
    for i, site in enumerate(slot.sites):
        if site is None:
            continue
        if a[i, ..., site.rank :].any() and b[i, ..., site.rank :, :].any():
            raise AdapterError(
                f"{site.path!r} has rank {site.rank}, and its arrays are not zero "
                "beyond it, so the file would hold another adapter. Take the arrays "
                "as `init` or `load_adapter` laid them out."
            )
        # In float64: NumPy asks no question of a bfloat16.
        if not all(np.isfinite(x[i].astype(np.float64)).all() for x in (a, b)):
            raise AdapterError(
                f"The factors of {site.path!r} hold NaN or infinity, and no file of "
                "them could be loaded again. Save the state before training diverged."
            )
        yield (
            i,
            site,
            (
                np.ascontiguousarray(np.swapaxes(a[i, ..., : site.rank], -1, -2)),
                np.ascontiguousarray(np.swapaxes(b[i, ..., : site.rank, :], -1, -2)),
            ),
        )


def join(slot: Slot, matrices: Mapping[int, Matrices]) -> dict[str, jax.Array]:
    """A leaf's arrays from the matrices of its sites.

    Args:
        slot: the leaf.
        matrices: `(A, B)` by position in the slot; positions without are zero.

    Returns:
        `{"a": ..., "b": ...}`.
    """
    count, rank = len(slot.sites), slot.rank
    dtypes = [matrix.dtype for matrix in next(iter(matrices.values()))]
    shape_a = (count, *slot.experts, math.prod(slot.inputs), rank)
    shape_b = (count, *slot.experts, rank, math.prod(slot.outputs))
    a, b = np.zeros(shape_a, dtypes[0]), np.zeros(shape_b, dtypes[1])
    for i, (down, up) in matrices.items():
        a[i, ..., : down.shape[-2]] = np.swapaxes(down, -1, -2)
        b[i, ..., : up.shape[-1], :] = np.swapaxes(up, -1, -2)
    return {
        "a": jnp.asarray(a.reshape(slot.shape_a())),
        "b": jnp.asarray(b.reshape(slot.shape_b())),
    }


def shapes(slot: Slot, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B of a site of this rank."""
    d_in, d_out = math.prod(slot.inputs), math.prod(slot.outputs)
    return (*slot.experts, rank, d_in), (*slot.experts, d_out, rank)


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


def _check(slot: Slot, a: np.ndarray, b: np.ndarray, ranks: np.ndarray) -> None:
    rank = a.shape[-1] if a.ndim else 0
    wanted_a = (*slot.layers, *slot.experts, *slot.inputs, rank)
    wanted_b = (*slot.layers, *slot.experts, rank, *slot.outputs)
    true = [0 if site is None else site.rank for site in slot.sites]
    found = ranks.tolist()
    if a.shape != wanted_a or b.shape != wanted_b or found != true:
        raise AdapterError(
            f"The adapter's arrays of {slot.name!r} are not those of the plan.\n"
            f"  plan     a {slot.shape_a()}, b {slot.shape_b()}, ranks { {*true} }\n"
            f"  adapter  a {a.shape}, b {b.shape}, ranks { {*found} }\n"
            "Give `save_adapter` the plan that the adapter was made with; for a "
            "loaded adapter it is `receipt.plan`."
        )
