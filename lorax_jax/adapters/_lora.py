"""LoRA: the low-rank term `W + s A B`."""

import dataclasses
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp

from ..structure import (
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
from ._base import Term


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
    key: Factor | None = None
    dropout: Factor | None = None
    lookup: bool = dataclasses.field(default=False, metadata={"static": True})
    use: Use | None = dataclasses.field(default=None, metadata={"static": True})

    def act(
        self,
        y: jax.Array,
        x: jax.Array,
        op: Bilinear,
        base: Callable[[jax.Array], jax.Array],
    ) -> jax.Array:
        del base
        return y + self.delta(self.dropped(x, op), op, y)

    def delta(self, x: jax.Array, op: Bilinear, like: jax.Array) -> jax.Array:
        """`op(x, s A B)`, in the shape and dtype of `like`."""
        groups = group_count(self.a)
        if groups not in (1, op.groups):
            raise Unstructured(
                f"the adapter has factors for {groups} groups of outputs, and here are "
                + (f"{op.groups}" if op.groups > 1 else "none")
            )
        return op.low_rank(x, self.a, self._scaled_b(), like)

    def dense(self, weight: jax.Array) -> jax.Array:
        work = wide(weight.dtype)
        a, b = self.a.astype(work), self._scaled_b().astype(work)
        return weight + outer(a, b, weight.shape)

    def looks_up(self, axis: int) -> bool:
        if self.lookup:
            return self.a.holds(axis) and not self.b.holds(axis)
        # The head of a tied table: what is looked up are its outputs.
        head = self.use == "head"
        return head and self.b.holds(axis) and not self.a.holds(axis)

    def apply(self, op: AxisOp) -> "LowRank":
        if isinstance(op, Along) and op.fills:
            if self.key is not None and self.key.holds(op.axis):
                raise Unstructured("layers with dropout keys of their own are padded")
        keep_groups(self.a, self.b, op)
        return cast(LowRank, super().apply(op))

    def rescale(self, op: Scale) -> "LowRank":
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

    def _scaled_b(self) -> Factor:
        b, scale = self.b.array, self.scale.aligned(self.b.axes)
        work = wide(b.dtype)
        return Factor(b.astype(work) * scale.astype(work), self.b.axes)
