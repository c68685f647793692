"""Every form that a frozen base can take. All take the same exam."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers import on_device

from lorax_jax.quant import Base
from lorax_jax.replication import Replicated
from lorax_jax.replication._view import LAYER
from lorax_jax.structure import Broadcast, Factor, Scale, Unstructured


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ToyInt8(Base):
    """Codes with one scale for the whole weight: the least that a base can be."""

    codes: Factor
    scale: Factor
    as_dtype: Any = dataclasses.field(default="float32", metadata={"static": True})

    @classmethod
    def quantize(cls, weight):
        scale = jnp.abs(weight).max() / 127.0
        codes = jnp.round(weight / scale).astype(jnp.int8)
        return cls(Factor(codes, tuple(range(weight.ndim))), Factor(scale, ()))

    @property
    def shape(self):
        ordered = sorted(zip(self.codes.axes, self.codes.array.shape, strict=True))
        return tuple(size for _, size in ordered)

    @property
    def dtype(self):
        return jnp.dtype(self.as_dtype)

    def dense(self):
        axes = tuple(range(len(self.codes.axes)))
        codes = self.codes.aligned(axes).astype(jnp.float32)
        return (codes * self.scale.array).astype(self.dtype)

    def cast(self, dtype):
        return dataclasses.replace(self, as_dtype=jnp.dtype(dtype).name)

    def apply(self, op):
        if isinstance(op, Broadcast):
            raise Unstructured("the codes hold every axis, so none can be new")
        return super().apply(op)

    def rescale(self, op: Scale):
        if op.axes:
            return super().rescale(op)
        scale = Factor(op.map(self.scale.array, op.values), ())
        return dataclasses.replace(self, scale=scale)


def _one_layer(weight, role):
    """As inside a step of a scan: the second layer of a stack, already chosen."""
    weight = np.asarray(weight)
    stack = on_device(np.stack([weight + 1, weight, weight - 1]))
    return Replicated(
        Factor(stack, (LAYER, *range(weight.ndim))), Factor(jnp.int32(1), ())
    )


def _replicated(weight, role):
    """As many layers as the weight has, the last of them the first once more."""
    (axis,) = role.stacked
    count = weight.shape[axis]
    stack = jnp.take(weight, jnp.arange(count - 1), axis)
    index = jnp.arange(count, dtype=jnp.int32) % (count - 1)
    axes = tuple(LAYER if i == axis else i for i in range(weight.ndim))
    return Replicated(Factor(stack, axes), Factor(index, (axis,)))


@dataclasses.dataclass(frozen=True)
class Form:
    """A form of base: how to make one, and the dense weight that it stands for.

    Attributes:
        name: for the test's name.
        make: `make(weight, role)`, the base made of a dense weight.
        dense: `dense(base)`, the weight that it stands for.
        takes: which layouts make sense for it.
        refuses: layouts that it refuses, with a reason: none is left out in silence.
    """

    name: str
    make: Callable
    dense: Callable
    takes: Callable = lambda layout: True
    refuses: tuple[str, ...] = ()


FORMS = [
    Form("dense", lambda w, role: w, lambda w: w),
    Form(
        "toy_int8",
        lambda w, role: ToyInt8.quantize(w),
        lambda w: w.dense(),
        # A packed base cannot be put together with other arrays; this one cannot be
        # scaled by a vector, nor be constant along an axis.
        refuses=(
            "concatenated",
            "scaled",
            "broadcast",
            "conv_prepared",
            "stack_scan",
            "stack_batched",
            "stack_expanded",
            "concatenated_experts",
            "buffer",
            "overwritten",
            "swapped_experts",
        ),
    ),
    Form("one_layer", _one_layer, lambda w: w.dense()),
    Form(
        "replicated",
        _replicated,
        lambda w: w.dense(),
        takes=lambda layout: len(layout.role.stacked) == 1,
    ),
]
