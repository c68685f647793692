"""`Base`: a frozen weight that is kept in another form than a dense array."""

import abc
from typing import Any

import jax

from ..structure import AxisOp, Dot, Scale, Take, Unstructured, is_factor


class Base(abc.ABC):
    """A weight that answers for itself: quantized, compressed or otherwise packed.

    A dense array is the usual base and needs no wrapper. Any other form is one
    subclass, registered as a pytree whose arrays are all `Factor`s: transposing,
    slicing and scanning the weight then reach its pieces as they reach an adapter's.
    Nothing about shape is stored beside the arrays, for a scan takes an axis away.

    To add a form of base: subclass `Base` as a frozen dataclass registered as a
    pytree; implement `shape`, `dtype`, `dot`, `take` and `dense`; override `rescale` if
    it commutes with a product; list it in `tests/exam/bases.py`.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""

    @property
    @abc.abstractmethod
    def dtype(self) -> Any:
        """Floating dtype of the dense weight, as the model sees it."""

    @abc.abstractmethod
    def dot(self, x: jax.Array, dims: Dot) -> jax.Array:
        """`x . W` with axes `dims.out_labels` and the dense product's dtype."""

    @abc.abstractmethod
    def take(self, rows: Take) -> jax.Array:
        """The looked-up rows of W with axes `rows.out_labels`."""

    @abc.abstractmethod
    def dense(self) -> jax.Array:
        """W as a dense array: for merging, and on request."""

    def rescale(self, op: Scale) -> "Base":
        """The base multiplied by a scalar or vector."""
        raise Unstructured(f"{type(self).__name__} does not commute with a product")

    def cast(self, dtype: Any) -> "Base":
        """The base, seen by the model in another floating dtype."""
        raise Unstructured(f"{type(self).__name__} cannot change its dtype to {dtype}")

    def apply(self, op: AxisOp) -> "Base":
        """The base that a structure-only operation makes of this one."""
        if isinstance(op, Scale):
            return self.rescale(op)
        return jax.tree.map(lambda f: f.apply(op), self, is_leaf=is_factor)
