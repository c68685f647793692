"""`ragged_dot_general`: a weight for every group of rows, as experts have."""

from ...structure import Ragged, Unstructured
from .._registry import Operand, consumer


@consumer(
    "ragged_dot_general",
    note="rows in groups, a weight a group: `x W + s (x A) B`, both products ragged",
)
def _ragged(operand: Operand):
    params = operand.params
    numbers = params["ragged_dot_dimension_numbers"]
    (x, w), (x_batch, w_batch) = numbers.dot_dimension_numbers
    (ragged,) = numbers.lhs_ragged_dimensions
    if operand.at != 1:
        raise Unstructured(
            "the weight's own rows are in groups, and groups of unlike sizes have no "
            "factors in common"
        )
    if ragged in x:
        raise Unstructured(
            "the groups divide the axis that is summed over, so every group takes "
            "other rows of the weight and none has factors of its own"
        )
    if ragged in x_batch:
        raise Unstructured(
            "the groups divide an axis that runs in parallel, where the weight has an "
            "entry for every index and none for every group"
        )
    for name in ("group_offset", "out_sharding"):
        if params.get(name) is not None:
            raise Unstructured(f"`{name}` is not known to the factored form")
    (group,) = numbers.rhs_group_dimensions

    def pairs(left, right):  # JAX's own `vmap` counts axes in NumPy's integers
        return tuple((int(i), int(j)) for i, j in zip(left, right, strict=True))

    op = Ragged(
        contract=pairs(x, w),
        batch=pairs(x_batch, w_batch),
        group=int(group),
        ragged=int(ragged),
        shape=operand.shape,
        x_ndim=len(operand.eqn.invars[0].aval.shape),
        rows=operand.eqn.invars[0].aval.shape[ragged],
        group_sizes=operand.values[2],
        precision=params["precision"],
        output_dtype=params["preferred_element_type"],
    )
    return op, 0
