"""Products of labelled arrays: what a low-rank term computes instead of a dense one."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._axes import Label

# Axes of the operand that the weight does not share are labelled ("x", position).
OperandLabel = Label | tuple[str, int]


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
    made = product_labels(x_labels, labels, keep, factor_first=factor_first)
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
    return out, made


def product_labels(
    x_labels: Sequence[OperandLabel],
    labels: Sequence[OperandLabel],
    keep: set[OperandLabel],
    *,
    factor_first: bool = False,
) -> tuple[OperandLabel, ...]:
    """The labels of a `product`: those that run in parallel, then those left free.

    >>> product_labels(("n", "i"), ("n", "i", "r"), keep={"n", "r"})
    ('n', 'r')
    """
    shared = [label for label in x_labels if label in labels]
    both = (*labels, *x_labels) if factor_first else (*x_labels, *labels)
    batch = [label for label in shared if label in keep]
    return (*batch, *(label for label in both if label not in shared))


def arrange(
    y: jax.Array,
    labels: Sequence[OperandLabel],
    wanted: Sequence[OperandLabel],
    shape: Sequence[int],
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
