"""What XLA lays out by itself, on whatever mesh the model declares."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec


def automatic(fn: Callable[..., Any], x: jax.Array, *more: Any) -> Any:
    """`fn(x, *more)`, replicated; on `x`'s explicit mesh, if any, without its types.

    An explicit mesh asks of every sum over a sharded axis where its result shall be.
    Statistics are small, and are everywhere.
    """
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty or not mesh.explicit_axes:
        return fn(x, *more)
    axes = mesh.explicit_axes
    free = jax.sharding.auto_axes(fn, axes=axes, out_sharding=PartitionSpec())
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return free(x, *more)
