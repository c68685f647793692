"""`shard_map` inside a model: the factors are split where the weight is."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from ...adapters import Adapted
from ...structure import Factor, Label, Unstructured
from .. import _jaxpr
from .._interpreter import interpret
from .._notes import Note, noting, take
from .._registry import rule


@_jaxpr.keyed_by_jaxpr
def _local(jaxpr, options, axes: tuple[str, ...], checked: bool):
    """What every device computes, on its shards of the weights."""

    def local(*operands):
        inner, consts = _jaxpr.closed(jaxpr())
        with noting() as notes:
            outs = interpret(inner, consts, operands, options)
        if notes and not checked:
            raise Unstructured(
                "something is noted on every device, and without `check_vma` it is not "
                "known which of them note the same"
            )
        if any(isinstance(out, Adapted) for out in outs):
            raise Unstructured(
                "the mapped function hands back an adapted weight, and its "
                "`out_specs` say nothing of the factors"
            )
        return tuple(outs), [_own(note, axes) for note in notes]

    return local


def _own(note: Note, axes: tuple[str, ...]) -> Note:
    """A device's note, with a leading axis for the devices.

    Along mesh axes where all note the same, all but the first note about nothing.
    """
    varying = [jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(note)]
    index = note.index
    for axis in axes:
        if not any(axis in names for names in varying):
            first = lax.axis_index(axis) == 0
            index = jnp.where(first, index, jnp.iinfo(index.dtype).max)
    noted = dataclasses.replace(note, index=index)
    return jax.tree.map(lambda x: jnp.expand_dims(x, 0), noted)


@rule("shard_map", policy="enters", note="factors are split where the weight is")
def _shard_map(run, eqn, operands):
    params = eqn.params
    axes = tuple(sorted(params["newly_manual_axes"]))
    mapped = jax.shard_map(
        _local(params["jaxpr"], run.options, axes, params["check_vma"]),
        mesh=params["mesh"],
        in_specs=tuple(map(_specs, operands, params["in_specs"])),
        out_specs=(tuple(params["out_specs"]), PartitionSpec(axes)),
        axis_names=set(params["newly_manual_axes"]),
        check_vma=params["check_vma"],
    )
    outs, notes = mapped(*operands)
    take(*notes)
    return list(outs)


def _specs(operand, spec):
    """A spec for each array of an operand, in the operand's own form.

    A factor's axis is split as the weight's axis that it runs along; the rank axis is
    whole on every device. Sums over a split `in` axis are the model's own to complete:
    the low-rank part is one more term of the same partial sum.
    """
    if not isinstance(operand, Adapted):
        return spec
    split: dict[Label, Any] = dict(
        enumerate(spec)
    )  # past its end, a spec splits nothing
    parts = [
        Factor(PartitionSpec(*(split.get(axis) for axis in part.axes)), part.axes)
        for part in operand.parts()
    ]
    return operand.rebuild(parts)
