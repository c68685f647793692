"""The matrices that a leaf holds, as decompositions want them."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from ..adapters import is_weight
from ..structure import Factor
from ._sites import Slot


def weight_matrices(slot: Slot, leaf: Any) -> jax.Array:
    """The weights of a slot's sites as kernels used as `x @ W`.

    Args:
        slot: whose sites.
        leaf: the leaf that holds them: an array or a `Base`.

    Returns:
        An array `(sites, *apart, d_in, d_out)` of the leaf's dtype, where `apart` are
        experts and groups.
    """
    dense = leaf.dense() if is_weight(leaf) else jnp.asarray(leaf)
    role = slot.role
    if role.part is not None:
        whole = Factor(dense, tuple(range(dense.ndim)))
        dense = role.part.take(whole, dense.shape).aligned(
            tuple(range(len(role.part.owners)))
        )
    dense = dense.transpose((*role.batch, *role.inputs, *role.outputs))
    d_in, d_out = slot.sides
    lead = len(slot.sites), *slot.experts
    if not role.grouped:
        return dense.reshape(*lead, d_in, math.prod(slot.outputs))
    return dense.reshape(*lead, d_in, role.groups, d_out).swapaxes(-2, -3)
