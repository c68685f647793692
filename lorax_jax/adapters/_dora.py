"""DoRA: the low-rank term with a trained magnitude for every output."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._errors import AdapterError
from ..structure import (
    RANK,
    Along,
    AxisOp,
    Bilinear,
    Dot,
    Factor,
    Scale,
    Unstructured,
    Use,
    product,
    wide,
)
from ._adapted import Adapted, is_weight
from ._base import Inner, Term
from ._kind import Site, kind
from ._lora import LowRank, factors, low_rank
from ._memory import on_device
from ._role import Role
from ._shapes import laid_out_like


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dora(Term):
    r"""Gives $W + s A B$ columns of trained length.

    $$W' = g \odot (W + s A B), \qquad g = m / \lVert W + s A B \rVert,$$

    with one norm and one magnitude for every output, the norm over all inputs. So
    `y' = g (y + s (x A) B)`: the gain is one multiplication of the result.

    The norm is that of the base weight and this adapter alone, and no gradient goes
    through it, as in section 4.3 of the paper. It is taken when the adapter is bound,
    on the whole weight: whatever part of the weight a model uses, the gain is the same.
    Of an adapted part of a leaf, norms and magnitudes are those of the part's columns,
    and outputs outside of it have a gain of 1.

    With dropout, `x` is dropped in the low-rank part and in the correction of the base
    alike: `y' = x W + (g - 1) (x~ W) + g s (x~ A) B`.

    Attributes:
        low: the low-rank term.
        gain: $g$, along the batch and `out` axes, float32.

    References:
        Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024.
        https://arxiv.org/abs/2402.09353
    """

    low: LowRank
    gain: Factor

    @property
    def use(self) -> Use | None:  # pyright: ignore  (a field in the other terms)
        """The low-rank term's."""
        return self.low.use

    def act(self, x: jax.Array, op: Bilinear, inner: Inner) -> jax.Array:
        gain = op.per_output(self.gain)
        if gain is not None:
            y = inner(x)
            dropped = self.low.dropped(x, op)
            if dropped is x:
                return _times(y + self.low.delta(x, op, y), gain)
            moved = inner(dropped) + self.low.delta(dropped, op, y)
            return y + _times(moved, gain) - inner(dropped)
        # A transposed use sums over the outputs: W'^T x = (W + s A B)^T (g x).
        if set(self.gain.axes) <= set(op.x_labels):
            x = _times(x, self.gain.aligned(op.x_labels))
            y = inner(x)
            return y + self.low.delta(self.low.dropped(x, op), op, y)
        raise Unstructured("some outputs of a weight with magnitudes are summed over")

    def dense(self, weight: jax.Array) -> jax.Array:
        gain = self.gain.aligned(tuple(range(weight.ndim)))
        return self.low.dense(weight) * gain.astype(weight.dtype)

    def looks_up(self, axis: int) -> bool:
        return self.low.looks_up(axis)

    def apply(self, op: AxisOp) -> "Dora":
        if isinstance(op, Scale):
            # g (c W + s A (c B)): only the low-rank part follows the weight.
            return dataclasses.replace(self, low=self.low.rescale(op))
        gain = self.gain
        if isinstance(op, Along) and op.fills and gain.holds(op.axis):
            # What is filled in is zero, or another weight's: its gain is 1.
            filled = op.map(gain.array - 1, gain.axes.index(op.axis)) + 1
            return Dora(self.low.apply(op), Factor(filled, gain.axes))
        if isinstance(op, Along) and op.among:
            raise Unstructured("a weight with magnitudes stands beside others' inputs")
        return Dora(self.low.apply(op), gain.apply(op))


# Backwards the gain's gradient needs `x`. Without the checkpoint that would be kept in
# float32, twice as large as `x` itself in a model of 16 bits.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _times(x: jax.Array, gain: jax.Array) -> jax.Array:
    return (x.astype(wide(x.dtype)) * gain).astype(x.dtype)


@kind(
    "dora",
    train=("a", "b", "magnitude"),
    fixed=("scale", "rank", "norm"),
    optional=("dropout", "a0", "b0"),
    freezable=("a", "b"),
)
def bind_dora(site: Site):
    """`m (W + s A B) / ||W + s A B||`."""
    site.refuse_weight("DoRA")
    role, base = site.role, site.base
    if role.groups > 1:
        raise AdapterError(
            f"{role.path!r} is the kernel of a grouped convolution, for which DoRA is "
            "not defined here. Adapt it without `dora`."
        )
    if role.part is not None and takes_inputs(role):
        raise AdapterError(
            f"{role.name!r} takes some of the inputs, and DoRA's magnitudes are of "
            "whole columns. Adapt it without `dora`."
        )
    low = low_rank(site)
    weight = base.base if isinstance(base, Adapted) else base
    # No gradient reaches the norm, so nothing is kept for it.
    both = low.a.array, low.b.array
    if role.part is not None:
        both = factors(site)
    a, b, scale = jax.tree.map(lax.stop_gradient, (*both, site.fixed["scale"]))
    norm = column_norm(weight, a, b, scale, site.fixed["norm"], role)
    # A column of zeros has no direction, and stays zero whatever the gain. Layers of a
    # stack that are not adapted have magnitudes too, which mean nothing.
    axes = (*role.batch, *role.outputs)
    adapted = Factor(site.fixed["rank"], role.stacked).aligned(axes) > 0
    acts = (norm > 0) & adapted
    gain = jnp.where(acts, site.train["magnitude"] / jnp.where(acts, norm, 1), 1)
    factor = Factor(gain, axes)
    if role.part is not None:  # what is not of the part keeps its length
        factor = role.lay(factor, weight.shape)
        inside = role.lay(Factor(jnp.ones_like(gain), axes), weight.shape).array > 0
        factor = Factor(jnp.where(inside, factor.array, 1), factor.axes)
    return site.with_term(Dora(low, laid_out_like(weight, factor)))


def takes_inputs(role: Role) -> bool:
    """Whether a part of a leaf is one along its inputs."""
    runs = role.part.runs if role.part is not None else ()
    return any(
        run is not None and run.count < run.size
        for axis, run in enumerate(runs)
        if axis in role.inputs
    )


def base_norm(weight: Any, role: Role) -> jax.Array:
    """Norms of the outputs' columns of a base weight: what a site keeps as `norm`.

    Args:
        weight: the base, dense or packed.
        role: roles of its axes.

    Returns:
        The norms, float32, shape `(*batch, *out)`.
    """
    return _base_norm(on_device(weight), role)


@functools.partial(jax.jit, static_argnums=1)
def _base_norm(weight: Any, role: Role) -> jax.Array:
    if is_weight(weight) and role.part is None:
        squares = weight.squares(role.inputs)
    else:
        dense = weight.dense() if is_weight(weight) else weight
        if role.part is not None:
            whole = Factor(dense, tuple(range(dense.ndim)))
            dense = role.part.take(whole, dense.shape).array
        wide_ = dense.astype(jnp.float32)
        squares = jnp.square(wide_).sum(role.inputs, keepdims=True)
    order = (*role.batch, *role.outputs, *role.inputs)
    squares = jnp.transpose(squares, order)
    return jnp.sqrt(jnp.squeeze(squares, tuple(range(-len(role.inputs), 0))))


def column_norm(weight, a, b, scale, base_norm, role: Role) -> jax.Array:
    r"""Norms of the outputs' columns of $W + s A B$, without building it.

    $$\lVert W + s A B \rVert^2 =
      \lVert W \rVert^2 + 2 s \langle W, A B \rangle + s^2 \lVert A B \rVert^2$$

    The middle part is a sum over the rank of $B$ times $A^T W$, the last one goes
    through $A^T A$: both are as small as B.

    Args:
        weight: the base, dense or packed.
        a, b: the factors, `(*batch, *in, rank)` and `(*batch, rank, *out)`.
        scale: the multiplier, over the stacked axes.
        base_norm: the norms of `weight` itself, `(*batch, *out)`.
        role: roles of the weight's axes.

    Returns:
        The norms, float32, shape `(*batch, *out)`.
    """
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    down = _down(weight, a, role)  # (*batch, rank, *out)
    labels = (*role.batch, RANK, *role.outputs)
    a_labels = (*role.batch, *role.inputs, RANK)
    gram, gram_labels = product(
        a,
        a_labels,
        a,
        tuple("other" if x == RANK else x for x in a_labels),
        keep={*role.batch, RANK, "other"},
        precision=lax.Precision.HIGHEST,
    )
    up, up_labels = product(
        gram,
        tuple(gram_labels),
        b,
        tuple("other" if x == RANK else x for x in labels),
        keep={*role.batch, RANK, *role.outputs},
        precision=lax.Precision.HIGHEST,
    )
    assert tuple(up_labels) == labels
    rank = len(role.batch)
    cross = jnp.sum(b * down, axis=rank)
    own = jnp.sum(b * up, axis=rank)
    scale = Factor(scale, role.stacked).aligned((*role.batch, *role.outputs))
    total = base_norm**2 + scale * (2 * cross + scale * own)
    # Where the parts cancel, what is left is noise of this size: never below it.
    largest = base_norm + jnp.abs(scale) * jnp.sqrt(jnp.maximum(own, 0))
    noise = jnp.finfo(jnp.float32).eps * largest
    return jnp.sqrt(jnp.maximum(total, noise**2))


def _down(weight, a: jax.Array, role: Role) -> jax.Array:
    """`A^T W` in float32: shape `(*batch, rank, *out)`.

    Of a part, through the whole leaf: a slice of the weight would be a copy of it.
    """
    if role.part is None:
        return _through_weight(weight, a, role)
    leaf, shape = role.leaf, weight.shape
    laid = role.lay(Factor(a, (*role.batch, *role.inputs, RANK)), shape)
    found = _through_weight(weight, laid.array, leaf)
    down = Factor(found, (*leaf.batch, RANK, *leaf.outputs))
    part = role.part.take(down, shape)
    assert part.axes == (*role.batch, RANK, *role.outputs)
    return part.array


def _through_weight(weight, a: jax.Array, role: Role) -> jax.Array:
    """`A^T W` of a leaf: shape `(*batch, rank, *out)`."""
    op = Dot(
        contract=tuple((len(role.batch) + i, w) for i, w in enumerate(role.inputs)),
        batch=tuple(enumerate(role.batch)),
        weight_first=False,
        x_ndim=a.ndim,
        weight_ndim=len(weight.shape),
        precision=lax.Precision.HIGHEST,
        output_dtype=jnp.float32,
    )
    weight = on_device(weight)
    # A product of A with a weight in bfloat16, exact in float32, needs A in three
    # parts of bfloat16: a copy of the weight in float32 would be twice as large.
    if weight.dtype.itemsize == 1:
        packed = is_weight(weight)
        weight = (weight.cast if packed else weight.astype)(jnp.bfloat16)
    parts = _parts(a, weight.dtype)
    whole = jnp.concatenate(parts, axis=-1)
    found = weight.consume(whole, op) if is_weight(weight) else op.dense(whole, weight)
    if len(parts) == 1:
        return found
    at = len(role.batch)
    shape = (*found.shape[:at], len(parts), a.shape[-1], *found.shape[at + 1 :])
    return found.reshape(shape).sum(axis=at)


def _parts(a: jax.Array, dtype) -> list[jax.Array]:
    """Arrays of `dtype` whose sum is `a`, as nearly as float32 tells."""
    if dtype.itemsize >= a.dtype.itemsize:
        return [a.astype(dtype)]
    parts = []
    for _ in range(3):
        part = a.astype(dtype)
        parts.append(part)
        a = a - part.astype(a.dtype)
    return parts
