"""Structure-only operations: the weight stays symbolic."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from ...structure import (
    Along,
    Broadcast,
    Cast,
    Group,
    Place,
    Reshape,
    Scale,
    Transpose,
    Unstructured,
    reshape,
)
from .._registry import Operand, structural


@structural(
    "copy",
    "copy_p",
    "name",
    "pcast",
    "pvary",
    "reduce_precision",
    "sharding_constraint",
    note="the base alone; factors follow the activations",
)
def _keep(operand: Operand):
    return [()]


@structural("reshard", note="factors move with the axes that they run along")
def _reshard(operand: Operand):
    sharding = operand.params["dst_sharding"]

    def place(array, axes):
        # Past the end of a spec, and along the rank, arrays are replicated.
        spec = dict(enumerate(sharding.spec))
        spec = PartitionSpec(*(spec.get(axis) for axis in axes))
        return jax.sharding.reshard(array, NamedSharding(sharding.mesh, spec))

    return [(Place(place),)]


@structural("convert_element_type", note="between floating dtypes only")
def _convert(operand: Operand):
    dtype = operand.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        raise Unstructured(
            f"a cast to {jnp.dtype(dtype)} is quantization, and the adapter cannot "
            "follow through it"
        )
    return [(Cast(dtype),)]


@structural("transpose", note="relabels axes")
def _transpose(operand: Operand):
    return [(Transpose(tuple(operand.params["permutation"])),)]


@structural("reshape", note="within `in`, within `out` or within batch axes")
def _reshape(operand: Operand):
    order = operand.params["dimensions"]
    if order is None:
        return [(reshape(operand.shape, operand.out_shape),)]
    shape = tuple(operand.shape[axis] for axis in order)  # transposed, then reshaped
    return [(Transpose(tuple(order)), reshape(shape, operand.out_shape))]


@structural("squeeze", note="drops axes of size 1")
def _squeeze(operand: Operand):
    dropped = {d % len(operand.shape) for d in operand.params["dimensions"]}
    kept = [i for i in range(len(operand.shape)) if i not in dropped]
    groups = (
        Group((old,), (new,), (operand.shape[old],)) for new, old in enumerate(kept)
    )
    return [(Reshape(tuple(groups)),)]


@structural("broadcast_in_dim", note="new axes, along which the weight is constant")
def _broadcast(operand: Operand):
    # `vmap` counts positions in NumPy's integers.
    positions = tuple(map(int, operand.params["broadcast_dimensions"]))
    return [(Broadcast(positions, operand.out_shape),)]


@structural("slice", note="axis by axis")
def _slice(operand: Operand):
    start = operand.params["start_indices"]
    stop = operand.params["limit_indices"]
    strides = operand.params["strides"] or (1,) * len(start)
    return [
        tuple(
            Along(axis, functools.partial(_cut, start=i, stop=j, stride=k))
            for axis, (i, j, k) in enumerate(zip(start, stop, strides, strict=True))
            if (i, j, k) != (0, operand.shape[axis], 1)
        )
    ]


def _cut(array, axis, *, start, stop, stride=1):
    return lax.slice_in_dim(array, start, stop, stride, axis)


@structural("split", note="one weight for each part")
def _split(operand: Operand):
    axis, start, out = operand.params["axis"], 0, []
    for size in operand.params["sizes"]:
        cut = functools.partial(_cut, start=start, stop=start + size)
        out.append((Along(axis, cut),))
        start += size
    return out


@structural("unstack", note="one weight for each entry of the axis")
def _unstack(operand: Operand):
    axis, shape = operand.params["axis"], operand.shape
    kept = [i for i in range(len(shape)) if i != axis]
    drop = Reshape(tuple(Group((i,), (j,), (shape[i],)) for j, i in enumerate(kept)))
    return [
        (Along(axis, functools.partial(_cut, start=i, stop=i + 1)), drop)
        for i in range(shape[axis])
    ]


@structural("dynamic_slice", note="axis by axis, with the same start indices")
def _dynamic_slice(operand: Operand):
    if operand.at != 0:
        raise Unstructured("a weight is used as an index")
    sizes = operand.params["slice_sizes"]
    starts = operand.values[1:]
    return [
        tuple(
            Along(axis, functools.partial(_dynamic_cut, start=start, size=size))
            for axis, (start, size) in enumerate(zip(starts, sizes, strict=True))
            if size != operand.shape[axis]
        )
    ]


def _dynamic_cut(array, axis, *, start, size):
    return lax.dynamic_slice_in_dim(array, start, size, axis)


@structural("rev", note="axis by axis")
def _rev(operand: Operand):
    return [tuple(Along(axis, _flip) for axis in operand.params["dimensions"])]


def _flip(array, axis):
    return lax.rev(array, (axis,))


@structural("pad", note="factors are padded with zeros")
def _pad(operand: Operand):
    if operand.at != 0:
        raise Unstructured("a weight is used as the padding value")
    return [
        tuple(
            Along(axis, functools.partial(fill, config=config), fills=True)
            for axis, config in enumerate(operand.params["padding_config"])
            if config != (0, 0, 0)
        )
    ]


def fill(array, axis, *, config):
    """Pads one axis of `array` with zeros: `config` is (low, high, interior)."""
    padding = [config if i == axis else (0, 0, 0) for i in range(array.ndim)]
    return lax.pad(array, jnp.zeros((), array.dtype), padding)


@structural("neg", note="negates one factor")
def _neg(operand: Operand):
    return [(Scale(_spread(lax.mul), jnp.float32(-1.0)),)]


@structural("mul", "div", note="by a scalar, or by a vector along axes of one factor")
def _scale(operand: Operand):
    other = 1 - operand.at
    name = operand.eqn.primitive.name
    if name == "div" and operand.at == 1:
        raise Unstructured("something is divided by the weight")
    if operand.out_shape != operand.shape:
        raise Unstructured("the weight is stretched over a larger array")
    map = lax.mul if name == "mul" else lax.div
    atom = operand.eqn.invars[other]
    values = operand.values[other]
    axes = _varying(operand, atom)
    if values is not None:
        values = jnp.asarray(values)
        index = tuple(slice(None) if i in axes else 0 for i in range(values.ndim))
        values = values[index]
    return [(Scale(_spread(map), values, axes),)]


def _spread(map):
    return lambda array, values: map(array, jnp.broadcast_to(values, array.shape))


def _varying(operand: Operand, atom) -> tuple[int, ...]:
    """The axes along which the other operand of a product is not constant."""
    shape = atom.aval.shape
    if not shape:
        return ()
    maker = operand.producer(atom)
    if maker is not None and maker.primitive.name == "broadcast_in_dim":
        source = maker.invars[0].aval.shape
        dims = maker.params["broadcast_dimensions"]
        return tuple(d for d, n in zip(dims, source, strict=True) if n != 1)
    return tuple(i for i, n in enumerate(shape) if n != 1)
