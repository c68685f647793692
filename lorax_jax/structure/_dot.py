"""`Dot`: matrix products, in every layout of `dot_general`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from ._axes import RANK
from ._bilinear import AxisRole, Bilinear
from ._factor import Factor
from ._products import OperandLabel, arrange, cost, product, product_labels


@dataclasses.dataclass(frozen=True)
class Dot(Bilinear):
    """A `dot_general` of an operand `x` with a weight, read from the weight's side.

    Attributes:
        contract: pairs (axis of x, axis of the weight) that are summed over.
        batch: pairs that run in parallel.
        weight_first: whether the weight is the left operand.
        x_ndim: number of axes of `x`.
        weight_ndim: number of axes of the weight.
        precision: as in `jax.lax.dot_general`, for (left, right).
        output_dtype: `preferred_element_type` of the dense product.
        out_sharding: of the dense product, where the model declared one.
    """

    contract: tuple[tuple[int, int], ...]
    batch: tuple[tuple[int, int], ...]
    weight_first: bool
    x_ndim: int
    weight_ndim: int
    precision: Any = None
    output_dtype: Any = None
    out_sharding: Any = None

    @property
    def x_labels(self) -> tuple[OperandLabel, ...]:
        shared = dict(self.contract + self.batch)
        return tuple(shared.get(i, ("x", i)) for i in range(self.x_ndim))

    @property
    def out_labels(self) -> tuple[OperandLabel, ...]:
        shared = dict(self.contract + self.batch)
        x_free = tuple(("x", i) for i in range(self.x_ndim) if i not in shared)
        taken = set(shared.values())
        w_free = tuple(i for i in range(self.weight_ndim) if i not in taken)
        batch = tuple(w for _, w in self.batch)
        return batch + (w_free + x_free if self.weight_first else x_free + w_free)

    @property
    def roles(self) -> dict[int, AxisRole]:
        found: dict[int, AxisRole] = {w: "in" for _, w in self.contract}
        found.update({w: "batch" for _, w in self.batch})
        return found

    def dense(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        operands, side = (x, weight), 0
        if self.weight_first:
            operands, side = (weight, x), 1

        def axes(pairs, which):
            return tuple(pair[which] for pair in pairs)

        numbers = tuple(
            (axes(pairs, side), axes(pairs, 1 - side))
            for pairs in (self.contract, self.batch)
        )
        return lax.dot_general(
            *operands,
            (numbers[0], numbers[1]),
            precision=self.precision,
            preferred_element_type=self.output_dtype,
            out_sharding=self.out_sharding,
        )

    def low_rank(self, x: jax.Array, a: Factor, b: Factor, like: Any) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(like.dtype)  # integers times a floating weight
        labels, out = self.x_labels, self.out_labels
        first, second = a.astype(x.dtype), b.astype(x.dtype)
        sizes = dict(zip(labels, x.shape, strict=True))
        for factor in (first, second):
            sizes |= dict(zip(factor.axes, factor.array.shape, strict=True))
        there = cost(sizes, labels, first.axes, second.axes, out)
        if cost(sizes, labels, second.axes, first.axes, out) < there:
            first, second = second, first
        shards = self._shards(x) if self.out_sharding is not None else None
        side = {"factor_first": self.weight_first, "precision": self.precision}
        keep = {*second.axes, *out}
        with jax.named_scope("lora_down"):
            t, t_labels = product(
                x,
                labels,
                first.array,
                first.axes,
                keep=keep,
                out_sharding=shards and shards(labels, first.axes, keep),
                **side,
            )
        with jax.named_scope("lora_up"):
            t, t_labels = product(
                t,
                t_labels,
                second.array,
                second.axes,
                keep=set(out),
                output_dtype=self.output_dtype,
                out_sharding=shards and shards(t_labels, second.axes, set(out)),
                **side,
            )
            return arrange(t, t_labels, out, like.shape).astype(like.dtype)

    def _shards(self, x: jax.Array) -> Callable[..., Any]:
        """How the products are laid out over an explicit mesh.

        A model that declares `out_sharding` does so because a contracted axis is
        sharded, and then both thin products need one too: each kept axis stays where
        `x` or the dense product has it, and the rank axis is replicated.
        """
        declared: Any = self.out_sharding
        mesh, spec = None, declared
        if isinstance(declared, NamedSharding):
            mesh, spec = declared.mesh, declared.spec
        where = dict(zip(self.x_labels, jax.typeof(x).sharding.spec, strict=True))
        where |= dict(zip(self.out_labels, spec, strict=False))
        where[RANK] = None

        def place(t_labels, factor_labels, keep):
            made = product_labels(
                t_labels, factor_labels, keep, factor_first=self.weight_first
            )
            out = PartitionSpec(*(where.get(label) for label in made))
            return out if mesh is None else NamedSharding(mesh, out)

        return place
