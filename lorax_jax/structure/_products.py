"""Products of labelled arrays: what a low-rank term computes instead of a dense one."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._axes import Label

# Axes of the operand that the weight does not share are labelled ("x", position).
OperandLabel = Label | tuple[str, int]


@dataclasses.dataclass(frozen=True)
class Dot:
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
        """Labels of the operand: the weight's axis where shared, its own elsewhere."""
        shared = dict(self.contract + self.batch)
        return tuple(shared.get(i, ("x", i)) for i in range(self.x_ndim))

    @property
    def out_labels(self) -> tuple[OperandLabel, ...]:
        """Labels of the product: batch axes, then the free axes left and right."""
        shared = dict(self.contract + self.batch)
        x_free = tuple(("x", i) for i in range(self.x_ndim) if i not in shared)
        taken = set(shared.values())
        w_free = tuple(i for i in range(self.weight_ndim) if i not in taken)
        batch = tuple(w for _, w in self.batch)
        return batch + (w_free + x_free if self.weight_first else x_free + w_free)


@dataclasses.dataclass(frozen=True)
class Take:
    """A lookup of rows: a `gather` with indices along one axis of the weight.

    Attributes:
        axis: the weight's axis that the indices run over.
        indices: integers, shape `(*ids, 1)`; `None` where only types are known.
        out_labels: labels of the gathered array: `("x", i)` for the axes of the
            indices, integers for the weight's other axes.
        mode: what happens to an index out of range, as in `jax.lax.gather`.
        sorted, unique: promises about the indices, as in `jax.lax.gather`.
    """

    axis: int
    indices: Any
    out_labels: tuple[OperandLabel, ...]
    mode: Any = None
    sorted: bool = False
    unique: bool = False

    def rows(self, array: jax.Array, axis: int) -> jax.Array:
        """Rows of `array`, looked up along its `axis`: shape `(*ids, *rest)`.

        An index out of range gives zeros where the model's own gather would fill: what
        is added to the filled base must not change it.
        """
        ids = self.indices.ndim - 1
        numbers = lax.GatherDimensionNumbers(
            offset_dims=tuple(range(ids, ids + array.ndim - 1)),
            collapsed_slice_dims=(axis,),
            start_index_map=(axis,),
        )
        sizes = tuple(1 if i == axis else n for i, n in enumerate(array.shape))
        return lax.gather(
            array,
            self.indices,
            numbers,
            sizes,
            mode=self.mode,
            fill_value=0,
            indices_are_sorted=self.sorted,
            unique_indices=self.unique,
        )

    def row_labels(self, labels: tuple[Label, ...]) -> tuple[OperandLabel, ...]:
        """Labels of `rows(array, axis)` for an array labelled `labels`."""
        ids = tuple(("x", i) for i in range(self.indices.ndim - 1))
        return ids + tuple(label for label in labels if label != self.axis)


def wide(dtype: Any) -> Any:
    """The dtype that sums and scales are taken in: float32, or float64 for float64."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def product(
    x: jax.Array,
    x_labels: Sequence[OperandLabel],
    factor: jax.Array,
    labels: Sequence[OperandLabel],
    keep: set[OperandLabel],
    *,
    factor_first: bool = False,
    precision: Any = None,
    output_dtype: Any = None,
    out_sharding: Any = None,
) -> tuple[jax.Array, tuple[OperandLabel, ...]]:
    """One `dot_general` over the labels that `x` and `factor` share.

    Shared labels outside `keep` are summed over, shared labels in `keep` run in
    parallel, all others stay free. `factor_first` keeps the factor on the side that
    the weight has in the model, so that no transpose is needed afterwards.

    Returns:
        The product and the labels of its axes.
    """
    shared = [label for label in x_labels if label in labels]
    contract = [label for label in shared if label not in keep]
    batch = [label for label in shared if label in keep]
    left, left_labels, right, right_labels = x, x_labels, factor, labels
    if factor_first:
        left, left_labels, right, right_labels = factor, labels, x, x_labels

    def positions(names, where):
        return tuple(where.index(name) for name in names)

    numbers = (
        (positions(contract, left_labels), positions(contract, right_labels)),
        (positions(batch, left_labels), positions(batch, right_labels)),
    )
    out = lax.dot_general(
        left,
        right,
        numbers,
        precision=precision,
        preferred_element_type=output_dtype,
        out_sharding=out_sharding,
    )
    free = [x for x in (*left_labels, *right_labels) if x not in shared]
    return out, (*batch, *free)


def arrange(
    y: jax.Array,
    labels: Sequence[OperandLabel],
    wanted: Sequence[OperandLabel],
    shape: tuple[int, ...],
) -> jax.Array:
    """Sums, transposes and broadcasts `y` to the axes `wanted` of size `shape`."""
    extra = tuple(i for i, label in enumerate(labels) if label not in wanted)
    if extra:
        y = jnp.sum(y, axis=extra)
        labels = [label for label in labels if label in wanted]
    present = [label for label in wanted if label in labels]
    if list(labels) != present:
        y = jnp.transpose(y, [list(labels).index(label) for label in present])
    if y.shape != shape:
        dims = [wanted.index(label) for label in present]
        y = lax.broadcast_in_dim(y, shape, dims)
    return y


def cost(
    sizes: dict[OperandLabel, int],
    x_labels: Sequence[OperandLabel],
    first: Sequence[OperandLabel],
    second: Sequence[OperandLabel],
    wanted: Sequence[OperandLabel],
) -> int:
    """Multiply-adds of `(x . first) . second`."""
    step = set(x_labels) | set(first)
    # An axis of `x` that neither factor holds stays until `arrange` sums it.
    summed = set(x_labels) & set(first) - set(second) - set(wanted)
    return math.prod(sizes[x] for x in step) + math.prod(
        sizes[x] for x in step - summed | set(second)
    )
