"""`Take`: lookups of rows, such as an embedding's."""

import dataclasses
from typing import Any, ClassVar

import jax
from jax import lax

from ._axes import Label, Unstructured
from ._bilinear import AxisRole, Bilinear, Use
from ._factor import Factor
from ._products import OperandLabel, arrange, product
from ._rows import Rows


@dataclasses.dataclass(frozen=True)
class Take(Bilinear):
    """A lookup: a `gather` with indices along one axis of the weight.

    It is the product with the one-hot rows of the indices, so it is linear in the
    weight; the operand `x` holds the indices, integers of shape `(*ids, 1)`.

    Attributes:
        axis: the weight's axis that the indices run over.
        labels: of the gathered array: `("x", i)` for the axes of the indices, integers
            for the weight's other axes.
        mode: what happens to an index out of range, as in `jax.lax.gather`.
        sorted, unique: promises about the indices, as in `jax.lax.gather`.
    """

    use: ClassVar[Use] = "lookup"
    selects: ClassVar[bool] = True

    axis: int
    labels: tuple[OperandLabel, ...]
    mode: Any = None
    sorted: bool = False
    unique: bool = False

    @property
    def x_labels(self) -> tuple[OperandLabel, ...]:
        return tuple(label for label in self.labels if isinstance(label, tuple))

    @property
    def out_labels(self) -> tuple[OperandLabel, ...]:
        return self.labels

    @property
    def roles(self) -> dict[int, AxisRole]:
        return {self.axis: "in"}

    def dense(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        labels = self.row_labels(x, tuple(range(weight.ndim)))
        order = [labels.index(label) for label in self.out_labels]
        return lax.transpose(self.rows(x, weight, self.axis), order)

    def as_rows(self, x: jax.Array) -> Rows:
        raise Unstructured("it looks rows up by number, and numbers have no statistics")

    def low_rank(self, x: jax.Array, a: Factor, b: Factor, like: Any) -> jax.Array:
        first, second = (a, b) if a.holds(self.axis) else (b, a)
        with jax.named_scope("lora_down"):
            at = first.axes.index(self.axis)
            t = self.rows(x, first.array, at).astype(like.dtype)
            t_labels = self.row_labels(x, first.axes)
        with jax.named_scope("lora_up"):
            t, t_labels = product(
                t,
                t_labels,
                second.array.astype(like.dtype),
                second.axes,
                keep=set(self.out_labels),
            )
            t = arrange(t, t_labels, self.out_labels, like.shape)
            return t.astype(like.dtype)

    def rows(self, x: jax.Array, array: jax.Array, axis: int) -> jax.Array:
        """Rows of `array`, looked up along its `axis`: shape `(*ids, *rest)`.

        An index out of range gives zeros where the model's own gather would fill: what
        is added to the filled base must not change it.
        """
        ids = x.ndim - 1
        numbers = lax.GatherDimensionNumbers(
            offset_dims=tuple(range(ids, ids + array.ndim - 1)),
            collapsed_slice_dims=(axis,),
            start_index_map=(axis,),
        )
        sizes = tuple(1 if i == axis else n for i, n in enumerate(array.shape))
        return lax.gather(
            array,
            x,
            numbers,
            sizes,
            mode=self.mode,
            fill_value=0,
            indices_are_sorted=self.sorted,
            unique_indices=self.unique,
        )

    def row_labels(
        self, x: jax.Array, labels: tuple[Label, ...]
    ) -> tuple[OperandLabel, ...]:
        """Labels of `rows(x, array, axis)` for an array labelled `labels`."""
        ids = tuple(("x", i) for i in range(x.ndim - 1))
        return ids + tuple(label for label in labels if label != self.axis)
