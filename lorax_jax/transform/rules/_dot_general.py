"""`dot_general`: the product that adapters are for."""

from ...structure import Dot
from .._registry import Operand, consumer


@consumer("dot_general", note="`x W + s (x A) B`, in every layout")
def _dot_general(operand: Operand):
    eqn, at = operand.eqn, operand.at
    (lhs, rhs), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    ndims = [len(atom.aval.shape) for atom in eqn.invars]
    x, w, x_batch, w_batch = lhs, rhs, lhs_batch, rhs_batch
    if at == 0:
        x, w, x_batch, w_batch = rhs, lhs, rhs_batch, lhs_batch
    op = Dot(
        contract=tuple(zip(x, w, strict=True)),
        batch=tuple(zip(x_batch, w_batch, strict=True)),
        weight_first=at == 0,
        x_ndim=ndims[1 - at],
        weight_ndim=ndims[at],
        precision=eqn.params["precision"],
        output_dtype=eqn.params["preferred_element_type"],
        out_sharding=eqn.params.get("out_sharding"),
    )
    return op, 1 - at
