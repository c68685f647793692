"""`shard_map` inside a model: the factors are split where the weight is."""

from typing import Any

import jax
from jax.sharding import PartitionSpec

from ...adapters import Adapted
from ...structure import Factor, Label, Unstructured
from .. import _jaxpr
from .._interpreter import interpret
from .._registry import rule


@_jaxpr.keyed_by_jaxpr
def _local(jaxpr, options):
    """What every device computes, on its shards of the weights."""

    def local(*operands):
        inner, consts = _jaxpr.closed(jaxpr())
        outs = interpret(inner, consts, operands, options)
        if any(isinstance(out, Adapted) for out in outs):
            raise Unstructured(
                "the mapped function hands back an adapted weight, and its "
                "`out_specs` say nothing of the factors"
            )
        return tuple(outs)

    return local


@rule("shard_map", policy="enters", note="factors are split where the weight is")
def _shard_map(run, eqn, operands):
    params = eqn.params
    mapped = jax.shard_map(
        _local(params["jaxpr"], run.options),
        mesh=params["mesh"],
        in_specs=tuple(map(_specs, operands, params["in_specs"])),
        out_specs=tuple(params["out_specs"]),
        axis_names=set(params["newly_manual_axes"]),
        check_vma=params["check_vma"],
    )
    return list(mapped(*operands))


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
