"""The matrices of a weight, one layer at a time: what initializers read."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..adapters import Role, is_weight
from ..quant import Base
from ..structure import Along, Factor, Unstructured


def layer_matrices(leaf: Any, layer: Any, role: Role) -> jax.Array:
    """The matrices of one layer, kernels that are used as `x @ W`.

    Only that layer of a stack is taken, and of a packed base only it is unpacked.

    Args:
        leaf: the weight, dense or packed.
        layer: the layer's number in row-major order of the stacked axes; may be traced.
        role: roles of the weight's axes.

    Returns:
        Shape `(*experts, *groups, d_in, d_out)`, in the weight's dtype: each matrix is
        that of which A and B are the factors that `Slot.matrices` gives.

    Example:
        >>> role = Role("w", inputs=(1,), outputs=(2,), batch=(0,), stack=1)
        >>> layer_matrices(jnp.arange(12.0).reshape(3, 2, 2), 1, role).tolist()
        [[4.0, 5.0], [6.0, 7.0]]
    """
    dense = _layer(leaf, layer, role.leaf.stacked)
    shape = dense.shape
    whole = Factor(dense, tuple(range(dense.ndim)))
    own = whole.array if role.part is None else role.part.take(whole, shape).array
    own = jnp.transpose(own, (*role.batch, *role.inputs, *role.outputs))
    experts = role.sizes(shape, role.batch[role.stack :])
    d_in = math.prod(role.sizes(shape, role.inputs))
    d_out = math.prod(role.sizes(shape, role.outputs)) // role.groups
    if role.groups == 1:
        return own.reshape(*experts, d_in, d_out)
    return own.reshape(*experts, d_in, role.groups, d_out).swapaxes(-2, -3)


def _layer(leaf: Any, layer: Any, stacked: Sequence[int]) -> jax.Array:
    """One layer of a weight as a dense array, whose stacked axes are of size 1."""
    sizes = [leaf.shape[axis] for axis in stacked]
    at = jnp.unravel_index(jnp.asarray(layer, jnp.int32), sizes) if stacked else ()
    taken = leaf
    try:
        for axis, index in zip(stacked, at, strict=True):
            taken = _taken(taken, axis, index)
    except Unstructured:
        # A packed base that cannot be cut along its layers: all are unpacked.
        taken = leaf.dense()
        for axis, index in zip(stacked, at, strict=True):
            taken = _taken(taken, axis, index)
    return taken.dense() if isinstance(taken, Base) else taken


def _taken(leaf: Any, axis: int, index: Any) -> Any:
    def cut(array: jax.Array, at: int) -> jax.Array:
        return lax.dynamic_slice_in_dim(array, index, 1, at)

    if is_weight(leaf):
        return leaf.apply(Along(axis, cut))
    return cut(leaf, axis)
