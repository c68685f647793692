"""`scan`: adapters of stacked layers are scanned with their weights."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ...adapters import Adapted
from ...structure import Factor, Unstructured, is_factor
from .. import _jaxpr
from .._interpreter import interpret, traced
from .._notes import noting
from .._registry import rule


@dataclasses.dataclass(frozen=True)
class _Skeleton:
    """What a stacked weight is, less its arrays: enough to put a slice together."""

    structure: Any  # treedef with a leaf for each part
    axes: tuple[tuple[Any, ...], ...]  # of each part, in one slice
    moves: tuple[bool, ...]  # whether the part is scanned
    dense: bool  # whether the first part is a dense base


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["skeleton"]
)
@dataclasses.dataclass(frozen=True)
class _Stacked:
    """The scanned arrays of a stacked weight, with its skeleton."""

    arrays: list[Any]
    skeleton: _Skeleton

    def join(self, fixed: list[Any]) -> Adapted:
        """The weight of one step, from its slices and from what does not move."""
        skeleton = self.skeleton
        still, moving = iter(fixed), iter(self.arrays)
        parts: list[Any] = [
            Factor(next(moving if moves else still), axes)
            for moves, axes in zip(skeleton.moves, skeleton.axes, strict=True)
        ]
        if skeleton.dense:
            parts[0] = parts[0].array
        return jax.tree.unflatten(skeleton.structure, parts)


def _unstack(weight: Adapted) -> tuple[_Stacked, list[Any]]:
    """Takes a stacked weight apart for a scan over its leading axis.

    Factors that run along the axis are scanned; the others are the same in every step.
    """
    parts = weight.parts()
    skeleton = _Skeleton(
        jax.tree.structure(weight, is_leaf=is_factor),
        tuple(tuple(x for x in p.shift(-1).axes if x != -1) for p in parts),
        tuple(part.holds(0) for part in parts),
        not weight.is_packed,
    )
    moving = [
        part.array
        if part.axes[0] == 0
        else jnp.moveaxis(part.array, part.axes.index(0), 0)
        for part in parts
        if part.holds(0)
    ]
    return _Stacked(moving, skeleton), [p.array for p in parts if not p.holds(0)]


def invariants(body: Any, first: int, carry: Sequence[Any]) -> tuple[int, ...]:
    """Where in a loop's carry weights stand, which every step must hand on as they are.

    Args:
        body: the jaxpr of one step.
        first: the position of the carry among its inputs.
        carry: the values that the loop starts with.

    Raises:
        Unstructured: if a step changes one of them.
    """
    found = tuple(i for i, v in enumerate(carry) if isinstance(v, Adapted))
    for i in found:
        if body.outvars[i] is not body.invars[first + i]:
            raise Unstructured("a weight in the carry of the loop changes step by step")
    return found


def check_no_weight(kinds: Sequence[Any]) -> None:
    """What was an array when the loop began must be one after a step."""
    if any(isinstance(kind, Adapted) for kind in kinds):
        raise Unstructured("an array in the carry of the loop becomes a weight")


def woven(
    kept: Sequence[Any], moving: Sequence[Any], invariant: tuple[int, ...], size: int
) -> list[Any]:
    """A loop's carry, from what stays at the positions `invariant` and what moves."""
    still, rest = iter(kept), iter(moving)
    return [next(still if i in invariant else rest) for i in range(size)]


@_jaxpr.keyed_by_jaxpr
def _body(jaxpr: Any, options: Any, n_carry: int, invariant: tuple[int, ...]):
    """The traced body of a scan on weights, its constants in front."""

    def body(consts, kept, fixed, carry, xs):
        inner, constants = _jaxpr.closed(jaxpr())
        fixed = iter(fixed)
        operands = [
            *consts,
            *woven(kept, carry, invariant, n_carry),
            *[x.join(next(fixed)) if isinstance(x, _Stacked) else x for x in xs],
        ]
        with noting() as notes:
            outs = interpret(inner, constants, operands, options)
        return [out for i, out in enumerate(outs) if i not in invariant], notes

    return _jaxpr.trace(body)


@rule(
    "scan",
    policy="enters",
    note="factors are scanned, or ride as constants; of repeated layers the index is "
    "scanned",
)
def _scan(run, eqn, operands):
    n_consts, n_carry = _jaxpr.scan_counts(eqn)
    inner, _ = _jaxpr.closed(eqn.params["jaxpr"])
    consts = operands[:n_consts]
    carry = operands[n_consts : n_consts + n_carry]
    invariant = invariants(inner, n_consts, carry)
    kept = [carry[i] for i in invariant]
    moving = [v for i, v in enumerate(carry) if i not in invariant]
    xs, fixed = [], []
    for x in operands[n_consts + n_carry :]:
        if isinstance(x, Adapted):
            x, still = _unstack(x)
            fixed.append(still)
        xs.append(x)

    slices = jax.tree.map(_jaxpr.unstacked, xs)
    body = _body(eqn.params["jaxpr"], run.options, n_carry, invariant)
    step = traced(body, consts, kept, fixed, moving, slices)
    check_no_weight(step.kinds[: len(moving)])
    if any(isinstance(kind, Adapted) for kind in step.kinds):
        raise Unstructured("a scan stacks an adapted weight as a result")
    flat_consts = jax.tree.leaves((consts, kept, fixed))
    flat_xs = jax.tree.leaves(xs)
    more = len(jax.tree.leaves(step.notes))  # stacked, step by step
    counts = _jaxpr.scan_params(eqn, len(flat_consts), len(moving), len(flat_xs), more)
    flat = [*flat_consts, *moving, *flat_xs]
    results = step.results(_jaxpr.bind(eqn, flat, jaxpr=step.jaxpr, **counts))
    return woven(kept, results, invariant, len(eqn.outvars))
