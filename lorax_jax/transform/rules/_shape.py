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
from .._registry import Site, structural


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
def _keep(site: Site):
    return [()]


@structural("reshard", note="factors move with the axes that they run along")
def _reshard(site: Site):
    sharding = site.params["dst_sharding"]

    def place(array, axes):
        # Past the end of a spec, and along the rank, arrays are replicated.
        spec = dict(enumerate(sharding.spec))
        spec = PartitionSpec(*(spec.get(axis) for axis in axes))
        return jax.sharding.reshard(array, NamedSharding(sharding.mesh, spec))

    return [(Place(place),)]


@structural("convert_element_type", note="between floating dtypes only")
def _convert(site: Site):
    dtype = site.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        raise Unstructured(
            f"a cast to {jnp.dtype(dtype)} is quantization, and the adapter cannot "
            "follow through it"
        )
    return [(Cast(dtype),)]


@structural("transpose", note="relabels axes")
def _transpose(site: Site):
    return [(Transpose(tuple(site.params["permutation"])),)]


@structural("reshape", note="within `in`, within `out` or within batch axes")
def _reshape(site: Site):
    return [(reshape(site.shape, site.out_shape),)]


@structural("squeeze", note="drops axes of size 1")
def _squeeze(site: Site):
    dropped = {d % len(site.shape) for d in site.params["dimensions"]}
    kept = [i for i in range(len(site.shape)) if i not in dropped]
    groups = (Group((old,), (new,), (site.shape[old],)) for new, old in enumerate(kept))
    return [(Reshape(tuple(groups)),)]


@structural("broadcast_in_dim", note="new axes, along which the weight is constant")
def _broadcast(site: Site):
    return [(Broadcast(tuple(site.params["broadcast_dimensions"]), site.out_shape),)]


@structural("slice", note="axis by axis")
def _slice(site: Site):
    start = site.params["start_indices"]
    stop = site.params["limit_indices"]
    strides = site.params["strides"] or (1,) * len(start)
    return [
        tuple(
            Along(axis, functools.partial(_cut, start=i, stop=j, stride=k))
            for axis, (i, j, k) in enumerate(zip(start, stop, strides, strict=True))
            if (i, j, k) != (0, site.shape[axis], 1)
        )
    ]


def _cut(array, axis, *, start, stop, stride=1):
    return lax.slice_in_dim(array, start, stop, stride, axis)


@structural("split", note="one weight for each part")
def _split(site: Site):
    axis, start, out = site.params["axis"], 0, []
    for size in site.params["sizes"]:
        cut = functools.partial(_cut, start=start, stop=start + size)
        out.append((Along(axis, cut),))
        start += size
    return out


@structural("dynamic_slice", note="axis by axis, with the same start indices")
def _dynamic_slice(site: Site):
    if site.at != 0:
        raise Unstructured("a weight is used as an index")
    sizes = site.params["slice_sizes"]
    starts = site.operands[1:]
    return [
        tuple(
            Along(axis, functools.partial(_dynamic_cut, start=start, size=size))
            for axis, (start, size) in enumerate(zip(starts, sizes, strict=True))
            if size != site.shape[axis]
        )
    ]


def _dynamic_cut(array, axis, *, start, size):
    return lax.dynamic_slice_in_dim(array, start, size, axis)


@structural("rev", note="axis by axis")
def _rev(site: Site):
    return [tuple(Along(axis, _flip) for axis in site.params["dimensions"])]


def _flip(array, axis):
    return lax.rev(array, (axis,))


@structural("pad", note="factors are padded with zeros")
def _pad(site: Site):
    if site.at != 0:
        raise Unstructured("a weight is used as the padding value")
    return [
        tuple(
            Along(axis, functools.partial(fill, config=config), fills=True)
            for axis, config in enumerate(site.params["padding_config"])
            if config != (0, 0, 0)
        )
    ]


def fill(array, axis, *, config):
    """Pads one axis of `array` with zeros: `config` is (low, high, interior)."""
    padding = [config if i == axis else (0, 0, 0) for i in range(array.ndim)]
    return lax.pad(array, jnp.zeros((), array.dtype), padding)


@structural("neg", note="negates one factor")
def _neg(site: Site):
    return [(Scale(_spread(lax.mul), jnp.float32(-1.0)),)]


@structural("mul", "div", note="by a scalar, or by a vector along axes of one factor")
def _scale(site: Site):
    other = 1 - site.at
    name = site.eqn.primitive.name
    if name == "div" and site.at == 1:
        raise Unstructured("something is divided by the weight")
    if site.out_shape != site.shape:
        raise Unstructured("the weight is stretched over a larger array")
    map = lax.mul if name == "mul" else lax.div
    atom = site.eqn.invars[other]
    values = site.operands[other]
    axes = _varying(site, atom)
    if values is not None:
        values = jnp.asarray(values)
        index = tuple(slice(None) if i in axes else 0 for i in range(values.ndim))
        values = values[index]
    return [(Scale(_spread(map), values, axes),)]


def _spread(map):
    return lambda array, values: map(array, jnp.broadcast_to(values, array.shape))


def _varying(site: Site, atom) -> tuple[int, ...]:
    """The axes along which the other operand of a product is not constant."""
    shape = atom.aval.shape
    if not shape:
        return ()
    maker = site.producer(atom)
    if maker is not None and maker.primitive.name == "broadcast_in_dim":
        source = maker.invars[0].aval.shape
        dims = maker.params["broadcast_dimensions"]
        return tuple(d for d, n in zip(dims, source, strict=True) if n != 1)
    return tuple(i for i, n in enumerate(shape) if n != 1)
