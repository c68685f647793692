"""`conv_general_dilated`: kernels of convolutions."""

from ...structure import Conv, Unstructured
from .._registry import Operand, consumer


@consumer(
    "conv_general_dilated",
    note="`x * W + s (x * A) B`: any rank, layout and stride; an A a feature group",
)
def _conv(operand: Operand):
    params = operand.params
    if operand.at == 0:
        raise Unstructured(
            "the weight is the image of the convolution, and factors are known for its "
            "kernel alone"
        )
    if params["batch_group_count"] > 1:
        raise Unstructured(
            f"`batch_group_count` = {params['batch_group_count']} gives every part of "
            "the batch outputs of its own, for which factors have no form"
        )
    op = Conv(
        numbers=params["dimension_numbers"],
        shape=operand.shape,
        strides=tuple(params["window_strides"]),
        padding=tuple(params["padding"]),
        lhs_dilation=tuple(params["lhs_dilation"]),
        rhs_dilation=tuple(params["rhs_dilation"]),
        groups=params["feature_group_count"],
        precision=params["precision"],
        output_dtype=params["preferred_element_type"],
        out_sharding=params.get("out_sharding"),
    )
    return op, 0
