"""`Piece`: what an adapter makes of one tensor of a checkpoint."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from .. import _paths
from .._errors import AdapterError
from .._names import Layout
from ..adapters import Adapter, Fixed, Role, base_norm
from ..structure import Use

HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """What an adapter makes of one tensor, laid out as the tensor is.

    Attributes:
        tensor: the tensor's name; the head's even where it is tied and has none.
        source: the tensor that it starts from; the table for a tied head.
        kind: the kind of adapter, or `"shift"`: `scale` times a bias of B is added.
        arrays: of a site of this kind whose weight is `(d_in, d_out)`; for a shift, the
            `bias`; for a copy, `whole` as the tensor is.
        scale: the multiplier, a float32.
        layout: `"linear"` if the tensor is `(d_out, d_in)`, else `"same"`.
        use: the only use of a tied weight that it acts in, or `None`.
        ids: which rows of a table are replaced.
        axis: where `(d_in, d_out)` counts those rows.
        kernel: whether the tensor is a convolution's, `(d_out, ...)`, whose other axes
            are flattened to `d_in` here.
        expert: which part of a tensor of experts it changes, or `None` for all of it.
    """

    tensor: str
    source: str
    kind: str
    arrays: Mapping[str, np.ndarray]
    scale: np.float32 = np.float32(1)
    layout: Layout = "same"
    use: Use | None = None
    ids: tuple[int, ...] = ()
    axis: int = 0
    kernel: bool = False
    expert: int | None = None

    @property
    def is_copy(self) -> bool:
        """Whether it takes the place of the tensor, or is added to a vector."""
        return self.kind in ("whole", "shift")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor that it fits, less the window of a kernel; of trained
        rows, their own."""
        if "a" not in self.arrays:
            return next(iter(self.arrays.values())).shape
        shape = self.arrays["a"].shape[0], self.arrays["b"].shape[1]
        return shape if self.layout == "same" else shape[::-1]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the tensor may have this shape."""
        if self.expert is not None:
            return self.expert < shape[0] and shape[1:] == self.shape
        if self.kind != "rows":
            return (matrix_of(shape) if self.kernel else shape) == self.shape
        ours = shape if self.layout == "same" else shape[::-1]
        width = ours[1 - self.axis] if len(ours) == 2 else None
        return self.shape[1] == width and self.ids[-1] < ours[self.axis]

    def on_head(self, tensor: str) -> "Piece":
        """The same change where the head has a tensor of its own."""
        own = dataclasses.replace(self, tensor=tensor, source=tensor)
        if self.is_copy:
            return own
        own = dataclasses.replace(own, layout="linear")
        if self.kind == "rows":
            return dataclasses.replace(own, axis=1 - self.axis)
        if self.kind == "dora":
            raise AdapterError(
                f"{self.tensor} is adapted by DoRA for the lookup and the head, and by "
                "another adapter in one of the two, so the head needs a tensor of its "
                "own, whose magnitudes would be those of its inputs. Merge them one "
                "after the other."
            )
        a, b = self.arrays["a"], self.arrays["b"]
        return dataclasses.replace(own, arrays={"a": b.T, "b": a.T})

    def adapter(self, weight: jax.Array | jax.ShapeDtypeStruct) -> Adapter:
        """An adapter of a parameter tree that holds `weight` under `path`.

        Args:
            weight: the tensor as `(d_in, d_out)`; types suffice, but for DoRA.
        """
        table = self.kind == "rows"
        role = Role(
            self.path,
            inputs=(self.axis,),
            outputs=(1 - self.axis,),
            lookup=table,
            kind=self.kind,
        )
        if table:
            fixed = {"ids": jnp.asarray(self.ids, jnp.int32)}
        else:
            rank = jnp.asarray(self.arrays["a"].shape[-1], jnp.int32)
            fixed = {"scale": jnp.asarray(self.scale), "rank": rank}
        if self.kind == "dora":
            fixed["norm"] = base_norm(weight, role)
        train = {name: jnp.asarray(array) for name, array in self.arrays.items()}
        return Adapter({role.name: train}, {role.name: Fixed(role, fixed)})

    @property
    def path(self) -> str:
        """The tensor's name as a path."""
        return _paths.escape(self.tensor)


def matrix_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of a kernel with everything but its outputs flattened.

    >>> matrix_of((8, 4, 3, 3))
    (8, 36)
    """
    return shape[0], math.prod(shape[1:])
