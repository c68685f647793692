"""LoRA: the low-rank term `W + s A B`."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from ..structure import (
    RANK,
    Along,
    AxisOp,
    Dot,
    Factor,
    OperandLabel,
    Scale,
    Take,
    Unstructured,
    arrange,
    cost,
    product,
    wide,
)
from ._base import Term, Use


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank(Term):
    r"""Adds $s A B$ to a weight without building it.

    For `y = x W` the term computes $(x A)(s B)$: two thin products in `x`'s dtype. The
    scale is folded into B in float32 before the cast, so one rounding is all it costs.
    Whichever factor shares the contracted axes with `x` comes first, so a transposed
    use of the weight (`x W^T`) costs the same.

    Attributes:
        a: the factor along the weight's `in` axes, axes `(*batch, *in, RANK)`.
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

    def dot(self, y: jax.Array, x: jax.Array, dims: Dot) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(y.dtype)  # integers times a floating weight
        x = self._dropped(x)
        labels, out = dims.x_labels, dims.out_labels
        a = self.a.array.astype(x.dtype), self.a.axes
        b = self._scaled_b(x.dtype), self.b.axes
        sizes = dict(zip(labels, x.shape, strict=True))
        sizes |= dict(zip(a[1], a[0].shape, strict=True))
        sizes |= dict(zip(b[1], b[0].shape, strict=True))
        first, second = a, b
        if cost(sizes, labels, b[1], a[1], out) < cost(sizes, labels, a[1], b[1], out):
            first, second = b, a
        shards = _shards(x, labels, dims) if dims.out_sharding is not None else None
        side = {"factor_first": dims.weight_first, "precision": dims.precision}
        with jax.named_scope("lora_down"):
            t, t_labels = product(
                x,
                labels,
                *first,
                keep={*second[1], *out},
                out_sharding=shards and shards(first[1], {*second[1], *out}),
                **side,
            )
        with jax.named_scope("lora_up"):
            t, t_labels = product(
                t,
                t_labels,
                *second,
                keep=set(out),
                output_dtype=dims.output_dtype,
                out_sharding=shards and shards(second[1], set(out), t_labels),
                **side,
            )
            return y + arrange(t, t_labels, out, y.shape).astype(y.dtype)

    def take(self, y: jax.Array, rows: Take) -> jax.Array:
        # PEFT's embeddings ignore dropout, and so do these.
        with jax.named_scope("lora_down"):
            t = rows.rows(self.a.array, self.a.axes.index(rows.axis)).astype(y.dtype)
            t_labels = rows.row_labels(self.a.axes)
        with jax.named_scope("lora_up"):
            b = self._scaled_b(y.dtype)
            t, t_labels = product(
                t, t_labels, b, self.b.axes, keep=set(rows.out_labels)
            )
            return y + arrange(t, t_labels, rows.out_labels, y.shape).astype(y.dtype)

    def dense(self, weight: jax.Array) -> jax.Array:
        # HIGHEST: the default float32 product is TF32 or bfloat16 on accelerators.
        axes = tuple(range(weight.ndim))
        work = wide(weight.dtype)
        b = self.b.array.astype(work) * self.scale.aligned(self.b.axes).astype(work)
        delta, labels = product(
            self.a.array.astype(work),
            self.a.axes,
            b,
            self.b.axes,
            keep=set(axes),
            precision=lax.Precision.HIGHEST,
        )
        return weight + arrange(delta, labels, axes, weight.shape)

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

    def _scaled_b(self, dtype) -> jax.Array:
        b, scale = self.b.array, self.scale.aligned(self.b.axes)
        work = wide(b.dtype)
        return (b.astype(work) * scale.astype(work)).astype(dtype)

    def _dropped(self, x: jax.Array) -> jax.Array:
        if self.key is None or self.dropout is None:
            return x
        # A key for every layer of a stack; where a model reads a whole stack at once,
        # one mask serves all.
        key = self.key.array.reshape(-1)[0] if self.key.axes else self.key.array
        keep = 1.0 - self.dropout.array.reshape(-1)[0]
        mask = jax.random.bernoulli(key, keep, x.shape)
        return jnp.where(mask, x / keep.astype(x.dtype), jnp.zeros((), x.dtype))


def _shards(x: jax.Array, x_labels: tuple[OperandLabel, ...], dims: Dot):
    """How the products are laid out over an explicit mesh.

    A model that declares `out_sharding` does so because a contracted axis is sharded,
    and then both thin products need one too: each kept axis stays where `x` or the
    dense product has it, and the rank axis is replicated.
    """
    declared: Any = dims.out_sharding
    mesh, spec = None, declared
    if isinstance(declared, NamedSharding):
        mesh, spec = declared.mesh, declared.spec
    where = dict(zip(x_labels, jax.typeof(x).sharding.spec, strict=True))
    where |= dict(zip(dims.out_labels, spec, strict=False))
    where[RANK] = None

    def place(factor_labels, keep, t_labels=x_labels):
        shared = [label for label in t_labels if label in factor_labels]
        batch = [label for label in shared if label in keep]
        left, right = t_labels, factor_labels
        if dims.weight_first:
            left, right = right, left
        free = [label for label in (*left, *right) if label not in shared]
        out = PartitionSpec(*(where.get(label) for label in (*batch, *free)))
        return out if mesh is None else NamedSharding(mesh, out)

    return place
