"""A checkpoint's tensor with rows for new tokens."""

import math
from typing import NamedTuple

import jax
import numpy as np

from .._growth import Growth, Table, new_rows
from ._host import on_host
from ._safetensors import Entry


class GrownTensor(NamedTuple):
    """How a tensor grows.

    Attributes:
        table: the leaf that it is, with the axis that counts tokens there.
        growth: how that grows.
        turned: whether the tensor is the leaf's transpose.
    """

    table: Table
    growth: Growth
    turned: bool

    @property
    def axis(self) -> int:
        """The tensor's axis that counts tokens."""
        return 1 - self.table.axis if self.turned else self.table.axis

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The new shape."""
        return (*shape[: self.axis], self.growth.after, *shape[self.axis + 1 :])

    def entry(self, entry: Entry) -> Entry:
        """What the file would say of the tensor if it had grown there."""
        shape = self.shape(entry.shape)
        size = entry.size // math.prod(entry.shape) * math.prod(shape)
        return entry._replace(shape=shape, size=size)

    def values(self, tensor: np.ndarray) -> np.ndarray:
        """The tensor with its new rows, which are those that `grow` gives the leaf."""

        def rows(tensor: jax.Array) -> jax.Array:
            found = new_rows(tensor.T if self.turned else tensor, *self[:2])
            return found.T if self.turned else found

        out = np.empty(self.shape(tensor.shape), tensor.dtype)
        old, new = np.split(out, [self.growth.before], self.axis)  # views
        old[...] = tensor
        with on_host():
            new[...] = np.asarray(jax.jit(rows)(tensor)).astype(tensor.dtype)
        return out
