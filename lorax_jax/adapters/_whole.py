"""Leaves trained whole: a copy that takes the place of the base's."""

import jax.numpy as jnp

from .._errors import AdapterError
from ..quant import Base
from ..structure import Unstructured
from ._adapted import Adapted
from ._kind import Site, kind


@kind("whole", train=("whole",), optional=("layers",))
def bind_whole(site: Site):
    """The trained copy, in the dtype of the base.

    The copy is kept in its own dtype (float32 by default), so that small steps are not
    lost, and cast where the model reads it. `layers` says which entries of a stack it
    holds, where that is not all of them.
    """
    site.refuse_weight("a leaf trained whole")
    role, base, whole = site.role, site.base, site.train["whole"]
    if isinstance(base, Adapted):
        raise AdapterError(
            f"{role.path!r} is trained whole, and adapted by another adapter too. "
            "Leave it out of one of the two."
        )
    layers = site.fixed.get("layers")
    held = jnp.shape(whole)
    wanted = tuple(base.shape)
    if layers is not None:
        axis = role.stacked[0]
        wanted = (*wanted[:axis], jnp.shape(layers)[0], *wanted[axis + 1 :])
    if held != wanted:
        raise AdapterError(
            f"The adapter holds {role.path!r} whole, with the shape {held}; the "
            f"parameters need {wanted}. Bind it to the parameters that it was planned "
            "on."
        )
    whole = whole.astype(base.dtype)
    if layers is None:
        return whole
    if isinstance(base, Base):
        try:
            return base.overwritten(role.stacked[0], layers, whole)
        except Unstructured as error:
            raise AdapterError(
                f"Some layers of {role.path!r} are trained whole, and {error}. Train "
                "all of them, or none."
            ) from None
    index = (slice(None),) * role.stacked[0] + (layers,)
    return base.at[index].set(whole)
