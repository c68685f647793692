"""LoRA: the low-rank term `W + s A B`."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp

from .._errors import AdapterError
from ..structure import (
    GROUP,
    RANK,
    Along,
    AxisOp,
    Bilinear,
    Factor,
    Scale,
    Unstructured,
    Use,
    group_count,
    keep_groups,
    outer,
    wide,
)
from ._base import Inner, Term
from ._kind import Site, kind
from ._random import dropout_keys
from ._shapes import check_factors, laid_out_like


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank(Term):
    r"""Adds $s A B$ to a weight without building it.

    For `y = x W` the term computes $(x A)(s B)$: two thin products in `x`'s dtype. The
    scale is folded into B in float32 before the cast, so one rounding is all it costs.
    Whichever factor shares the contracted axes with `x` comes first, so a transposed
    use of the weight (`x W^T`) costs the same.

    Attributes:
        a: the factor along the weight's `in` axes, axes `(*batch, *in, RANK)`; of a
            grouped kernel, `(*batch, *in, GROUP, RANK)`.
        b: the factor along its `out` axes, axes `(*batch, RANK, *out)`.
        scale: the multiplier $s$, along no axis or along some batch axes.
        bias: a bias of B, along the `out` axes: the product gains $s$ times it.
        key: PRNG keys for dropout, along no axis or some batch axes; `None` is off.
        dropout: the probability of dropping an entry of `x` before A.
        lookup: whether the weight is an embedding table, looked up along A's axis.
        use: the only use of a tied weight that the term takes part in, or `None`.

    References:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
        https://arxiv.org/abs/2106.09685
    """

    a: Factor
    b: Factor
    scale: Factor
    bias: Factor | None = None
    key: Factor | None = None
    dropout: Factor | None = None
    lookup: bool = dataclasses.field(default=False, metadata={"static": True})
    use: Use | None = dataclasses.field(default=None, metadata={"static": True})

    def act(self, x: jax.Array, op: Bilinear, inner: Inner) -> jax.Array:
        y = inner(x)
        return y + self.delta(self.dropped(x, op), op, y)

    def delta(self, x: jax.Array, op: Bilinear, like: jax.Array) -> jax.Array:
        """`op(x, s A B)`, in the shape and dtype of `like`; with B's bias, if any."""
        groups = group_count(self.a)
        if groups not in (1, op.groups):
            raise Unstructured(
                f"the adapter has factors for {groups} groups of outputs, and here are "
                + (f"{op.groups}" if op.groups > 1 else "none")
            )
        delta = op.low_rank(x, self.a, self._scaled(self.b), like)
        if self.bias is None:
            return delta
        summed = {axis for axis in self.a.axes if isinstance(axis, int)}
        if not all(op.roles.get(axis) for axis in summed):
            raise Unstructured("B has a bias, and not all inputs are summed over")
        bias = self._scaled(self.bias)
        if not set(bias.axes) <= set(op.out_labels):
            raise Unstructured("B has a bias, and its axes are summed over")
        return delta + bias.aligned(op.out_labels).astype(like.dtype)

    def dense(self, weight: jax.Array) -> jax.Array:
        if self.bias is not None:
            raise Unstructured("B has a bias, which is no part of a matrix")
        work = wide(weight.dtype)
        a, b = self.a.astype(work), self._scaled(self.b).astype(work)
        return weight + outer(a, b, weight.shape)

    def without_bias(self) -> "LowRank":
        """The term without B's bias: what a matrix can hold of it."""
        return dataclasses.replace(self, bias=None)

    def shift(self) -> jax.Array | None:
        """What B's bias adds to every product, along `self.bias.axes`."""
        return None if self.bias is None else self._scaled(self.bias).array

    def looks_up(self, axis: int) -> bool:
        if self.lookup:
            return self.a.holds(axis) and not self.b.holds(axis)
        # The head of a tied table: what is looked up are its outputs.
        head = self.use == "head"
        return head and self.b.holds(axis) and not self.a.holds(axis)

    def apply(self, op: AxisOp) -> "LowRank":
        if isinstance(op, Along):
            if op.fills and self.key is not None and self.key.holds(op.axis):
                raise Unstructured("layers with dropout keys of their own are padded")
            if self.bias is not None and not self.bias.holds(op.axis):
                raise Unstructured("B has a bias, and a part of the inputs is taken")
        keep_groups(self.a, self.b, op)
        return cast(LowRank, super().apply(op))

    def rescale(self, op: Scale) -> "LowRank":
        if self.bias is not None:
            raise Unstructured("B has a bias, and the weight is rescaled")
        for name in ("b", "a"):
            factor: Factor = getattr(self, name)
            if all(factor.holds(axis) for axis in op.axes):
                values = Factor(op.values, op.axes).aligned(factor.axes)
                scaled = op.map(factor.array, values.astype(factor.array.dtype))
                return dataclasses.replace(self, **{name: Factor(scaled, factor.axes)})
        raise Unstructured(
            f"the multiplier runs along axes {op.axes}, which no single factor holds"
        )

    def dropped(self, x: jax.Array, op: Bilinear) -> jax.Array:
        """`x` with entries dropped, where dropout is on."""
        # PEFT's embeddings ignore dropout, and so do these.
        if self.key is None or self.dropout is None or op.selects:
            return x
        if not jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(wide(x.dtype))
        # A key for every layer of a stack; where a model reads a whole stack at once,
        # one mask serves all.
        key = self.key.array.reshape(-1)[0] if self.key.axes else self.key.array
        keep = 1.0 - self.dropout.array.reshape(-1)[0]
        mask = jax.random.bernoulli(key, keep, x.shape)
        return jnp.where(mask, x / keep.astype(x.dtype), jnp.zeros((), x.dtype))

    def _scaled(self, factor: Factor) -> Factor:
        values, scale = factor.array, self.scale.aligned(factor.axes)
        work = wide(values.dtype)
        return Factor(values.astype(work) * scale.astype(work), factor.axes)


@kind(
    "lora",
    train=("a", "b"),
    fixed=("scale", "rank"),
    optional=("bias", "dropout", "a0", "b0"),
    freezable=("a", "b"),
)
def bind_lora(site: Site):
    """`W + s A B`, or `W + s (A B - A0 B0)` where the site keeps starting factors."""
    return site.with_term(low_rank(site))


def factors(site: Site) -> tuple[jax.Array, jax.Array]:
    r"""The two factors of what a site adds to its weight.

    Of a site that started from factors of the weight, they are of twice the rank:

    $$A B - A_0 B_0 = A_0 (B - B_0) + (A - A_0) B
      = [A_0,\; A - A_0] \begin{bmatrix} B - B_0 \\ B \end{bmatrix}.$$

    The differences are taken in the dtype that the factors are stored in. Until the
    factors move both halves are exactly zero, and in bfloat16 the small change of a
    large product survives: `A B` and `A0 B0`, rounded apart, would cancel.

    Returns:
        Shapes `(*batch, *in, rank)` and `(*batch, rank, *out)`.

    Raises:
        AdapterError: if the factors do not fit the weight or one another.
    """
    role, fixed = site.role, site.fixed
    a, b = site.held("a"), site.held("b")
    check_factors(site.base, a, b, role)
    if "a0" not in fixed and "b0" not in fixed:
        return a, b
    a0: Any = fixed.get("a0")
    b0: Any = fixed.get("b0")
    if jnp.shape(a0) != jnp.shape(a) or jnp.shape(b0) != jnp.shape(b):
        raise AdapterError(
            f"The starting factors of {role.name!r} have the shapes {jnp.shape(a0)} "
            f"and {jnp.shape(b0)}, those that moved from them {jnp.shape(a)} and "
            f"{jnp.shape(b)}. `train` and `fixed` must come from one `init` or "
            "`load_adapter`, whole."
        )
    return (
        jnp.concatenate([a0, a - a0], axis=-1),
        jnp.concatenate([b - b0, b], axis=len(role.batch)),
    )


def low_rank(site: Site) -> LowRank:
    """The low-rank term of a site's factors and `scale`."""
    role, fixed = site.role, site.fixed
    a, b = factors(site)
    if jnp.shape(site.weight) not in ((), jnp.shape(fixed["scale"])):
        raise AdapterError(
            f"A multiplier in `weights` has the shape {jnp.shape(site.weight)}; for "
            f"{role.name!r} a number is meant, or one for each layer of its stack."
        )
    is_one = isinstance(site.weight, float) and site.weight == 1.0
    scale = fixed["scale"] if is_one else fixed["scale"] * site.weight
    key, dropout = site.key, fixed.get("dropout")
    if key is not None and dropout is not None:
        layers = role.leaf.stacked
        key = Factor(dropout_keys(key, role, jnp.shape(dropout)), layers)
        dropout = Factor(dropout, layers)
    else:
        key = dropout = None
    bias = site.train.get("bias")

    def laid(array, axes) -> Factor:
        factor = role.lay(Factor(array, axes), site.base.shape)
        return laid_out_like(site.base, factor)

    if bias is not None:
        bias = laid(bias, (*role.batch, *role.outputs))
    groups = (GROUP,) if role.groups > 1 else ()
    axes = (*role.batch, *role.inputs, *groups, RANK)
    return LowRank(
        a=laid(a, axes),
        b=laid(b, (*role.batch, RANK, *role.outputs)),
        scale=Factor(scale, role.leaf.stacked),
        bias=bias,
        key=key,
        dropout=dropout,
        lookup=role.lookup,
        use=role.use,
    )
