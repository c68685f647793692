"""`Ragged`: products of rows that belong to groups, such as tokens sorted by expert."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._axes import RANK, Label, Unstructured
from ._bilinear import AxisRole, Bilinear, down_and_up
from ._factor import Factor, align
from ._products import OperandLabel, arrange, product
from ._rows import Rows


@dataclasses.dataclass(frozen=True)
class Ragged(Bilinear):
    r"""A `ragged_dot_general` of rows with a weight for every group of rows.

    The rows of `x` come group by group, `group_sizes[g]` of them with the weight of
    group g. Through the rank this is two ragged products over the same groups,

    $$x_i W_{g(i)} + s\,(x_i A_{g(i)})\,B_{g(i)} .$$

    Attributes:
        contract: (axis of x, axis of the weight) that are summed over.
        batch: pairs that run in parallel.
        group: the weight's axis of groups.
        ragged: the axis of x that the groups divide.
        shape: the weight's shape.
        x_ndim: number of axes of `x`.
        rows: size of the axis that the groups divide.
        group_sizes: rows of each group; `None` where only types are known.
        precision: as in `jax.lax.ragged_dot_general`.
        output_dtype: `preferred_element_type` of the dense product.
    """

    contract: tuple[tuple[int, int], ...]
    batch: tuple[tuple[int, int], ...]
    group: int
    ragged: int
    shape: tuple[int, ...]
    x_ndim: int
    rows: int
    group_sizes: Any = dataclasses.field(default=None, compare=False)
    precision: Any = None
    output_dtype: Any = None

    @property
    def x_labels(self) -> tuple[OperandLabel, ...]:
        shared = dict(self.contract + self.batch)
        return tuple(shared.get(i, ("x", i)) for i in range(self.x_ndim))

    @property
    def out_labels(self) -> tuple[OperandLabel, ...]:
        return self._result(self.x_labels, tuple(range(len(self.shape))))

    @property
    def roles(self) -> dict[int, AxisRole]:
        found: dict[int, AxisRole] = {w: "in" for _, w in self.contract}
        found.update({w: "batch" for _, w in self.batch})
        found[self.group] = "batch"
        return found

    def dense(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        axes = tuple(range(weight.ndim))
        return self._ragged(x, self.x_labels, weight, axes, self.output_dtype)[0]

    def per_output(self, factor: Factor) -> jax.Array | None:
        if not factor.holds(self.group):
            return super().per_output(factor)
        if self.group_sizes.ndim > 1:
            raise Unstructured("values by group where groups differ by batch")
        # Each row of the result has the values of its group.
        at = factor.axes.index(self.group)
        values = jnp.repeat(
            factor.array, self.group_sizes, axis=at, total_repeat_length=self.rows
        )
        labels = [
            ("x", self.ragged) if i == at else x for i, x in enumerate(factor.axes)
        ]
        if not set(labels) <= set(self.out_labels):
            return None
        return align(values, labels, self.out_labels)

    def as_rows(self, x: jax.Array) -> Rows:
        if self.group_sizes.ndim > 1:
            raise Unstructured("groups differ by batch")
        ends = jnp.cumsum(self.group_sizes)
        member = jnp.searchsorted(ends, jnp.arange(self.rows), side="right")
        row = ("x", self.ragged)
        return Rows(x, self.x_labels, member, row, self.group, plain=False)

    def low_rank(self, x: jax.Array, a: Factor, b: Factor, like: Any) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(like.dtype)  # integers times a floating weight
        summed = {w for _, w in self.contract}
        first, second = down_and_up(a.astype(x.dtype), b.astype(x.dtype), summed)
        with jax.named_scope("lora_down"):
            t, labels = self._product(x, self.x_labels, first, {RANK, *self.out_labels})
        with jax.named_scope("lora_up"):
            keep = set(self.out_labels)
            t, labels = self._product(t, labels, second, keep, self.output_dtype)
            return arrange(t, labels, self.out_labels, like.shape).astype(like.dtype)

    def _product(
        self,
        x: jax.Array,
        labels: tuple[OperandLabel, ...],
        factor: Factor,
        keep: set[OperandLabel],
        output_dtype: Any = None,
    ) -> tuple[jax.Array, tuple[OperandLabel, ...]]:
        """A product with a factor: a ragged one if the factor differs by group."""
        if factor.holds(self.group):
            # A ragged product shares its batch axes, and sums over all else it shares.
            sizes = dict(enumerate(self.shape))
            shared = [label for label in labels if isinstance(label, int)]
            axes = (*factor.axes, *(x for x in shared if not factor.holds(x)))
            return self._ragged(
                x, labels, factor.filled(axes, sizes), axes, output_dtype
            )
        return product(
            x,
            labels,
            factor.array,
            factor.axes,
            keep=keep,
            precision=self.precision,
            output_dtype=output_dtype,
        )

    def _ragged(
        self,
        x: jax.Array,
        labels: tuple[OperandLabel, ...],
        weight: jax.Array,
        axes: tuple[Label, ...],
        output_dtype: Any,
    ) -> tuple[jax.Array, tuple[OperandLabel, ...]]:
        """The ragged product with an array whose axes are labelled `axes`."""
        batch = [w for _, w in self.batch]
        summed = [label for label in labels if label in axes and label not in batch]
        numbers = lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=tuple(
                (
                    [labels.index(label) for label in names],
                    [axes.index(label) for label in names],
                )
                for names in (summed, batch)
            ),
            lhs_ragged_dimensions=[labels.index(("x", self.ragged))],
            rhs_group_dimensions=[axes.index(self.group)],
        )
        out = lax.ragged_dot_general(
            x,
            weight,
            self.group_sizes,
            numbers,
            precision=self.precision,
            preferred_element_type=output_dtype,
        )
        return out, self._result(labels, axes)

    def _result(
        self, labels: tuple[OperandLabel, ...], axes: tuple[Label, ...]
    ) -> tuple[OperandLabel, ...]:
        """Labels of the product of two labelled arrays: batch, then what is free."""
        batch = tuple(w for _, w in self.batch)
        free = tuple(label for label in labels if label not in axes)
        own = tuple(x for x in axes if x not in labels and x != self.group)
        return batch + free + own
