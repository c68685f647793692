"""Whether the arrays of an adapter fit the weight, in shape and in layout."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from .._errors import AdapterError
from ..structure import Factor
from ._role import Role


def check_weight(base: Any, role: Role) -> None:
    """Raises if what the parameters hold is no floating array."""
    if not hasattr(base, "shape"):
        raise AdapterError(
            f"The parameters hold {base!r:.60} at {role.path!r}, which is no array. "
            "Bind the adapter to the parameters that it was planned on."
        )
    if not jnp.issubdtype(base.dtype, jnp.floating):
        raise AdapterError(not_floating(role.path, base.dtype))


def check_factors(base: Any, a: Any, b: Any, role: Role) -> None:
    """Raises if the factors do not fit the weight."""
    check_weight(base, role)
    shape = tuple(base.shape)
    axes = max((*role.leaf.inputs, *role.leaf.outputs, *role.leaf.batch), default=-1)
    if axes >= len(shape) or not (role.part is None or role.part.fits(shape)):
        raise AdapterError(_misfit(role, shape, a, b))
    rank = jnp.shape(a)[-1] if jnp.ndim(a) else 0
    if (jnp.shape(a), jnp.shape(b)) != role.shapes(shape, rank):
        raise AdapterError(_misfit(role, shape, a, b))


def not_floating(path: str, dtype: Any) -> str:
    """Why a weight of this dtype cannot be adapted."""
    return (
        f"{path!r} has the dtype {dtype}, and A B cannot be added to it: a weight must "
        "be floating. A quantized base is a `lorax_jax.quant.Base`."
    )


def _misfit(role: Role, shape: tuple[int, ...], a: Any, b: Any) -> str:
    return (
        f"The adapter of {role.name!r} does not fit the weight there.\n"
        f"  weight  shape {shape}, in {role.inputs}, out {role.outputs}, "
        f"batch {role.batch}, groups {role.groups}\n"
        + _viewed(role)
        + f"  a, b    shapes {jnp.shape(a)} and {jnp.shape(b)}\n"
        "Bind it to the parameters that it was planned on."
    )


def _viewed(role: Role) -> str:
    if role.part is None:
        return ""
    axes = [
        "all" if run is None else f"{run.start}:{run.stop}:{run.step} of {run.size}"
        for run in role.part.runs
    ]
    return f"  part    {', '.join(axes)} of the axes, split as {role.part.owners}\n"


def laid_out_like(base: Any, factor: Factor) -> Factor:
    """Lays a factor out over an explicit mesh as the base's axes are laid out."""
    sharding: Any = getattr(getattr(base, "aval", None), "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or mesh.empty or not mesh.explicit_axes:
        return factor
    spec = [sharding.spec[x] if isinstance(x, int) else None for x in factor.axes]
    array = jax.sharding.reshard(factor.array, PartitionSpec(*spec))
    return Factor(array, factor.axes)
