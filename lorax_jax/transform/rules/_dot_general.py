"""`dot_general`: the product that adapters are for."""

from ...adapters import Adapted
from ...structure import Dot, Unstructured
from .. import _jaxpr
from .._registry import rule


def read(eqn, at: int) -> Dot:
    """The product, read from the side of the weight at operand `at`."""
    (lhs, rhs), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    ndims = [len(atom.aval.shape) for atom in eqn.invars]
    x, w, x_batch, w_batch = lhs, rhs, lhs_batch, rhs_batch
    if at == 0:
        x, w, x_batch, w_batch = rhs, lhs, rhs_batch, lhs_batch
    return Dot(
        contract=tuple(zip(x, w, strict=True)),
        batch=tuple(zip(x_batch, w_batch, strict=True)),
        weight_first=at == 0,
        x_ndim=ndims[1 - at],
        weight_ndim=ndims[at],
        precision=eqn.params["precision"],
        output_dtype=eqn.params["preferred_element_type"],
        out_sharding=eqn.params.get("out_sharding"),
    )


@rule("dot_general", policy="native", note="`x W + s (x A) B`, in every layout")
def _dot_general(run, eqn, values):
    at = [i for i, value in enumerate(values) if isinstance(value, Adapted)]
    if len(at) > 1:
        raise Unstructured("both operands of a product are adapted weights")
    weight, x = values[at[0]], values[1 - at[0]]
    y = None
    if not weight.is_packed:
        y = _jaxpr.bind(eqn, [v.base if v is weight else v for v in values])[0]
    return [weight.dot(y, x, read(eqn, at[0]))]
