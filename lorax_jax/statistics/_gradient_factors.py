"""`GradientFactors`: the leading singular directions of a weight's gradient."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GradientFactors:
    r"""The `size` leading singular triplets of a mean gradient.

    $$G \approx U \,\mathrm{diag}(s)\, V ,$$

    where $G$ is the gradient of a kernel used as `x @ W`. All arrays have the same
    leading axes: those of a stack's layers, of experts and of groups, or none.

    Attributes:
        u: directions of the inputs, orthonormal columns, shape `(*, d_in, size)`. The
            largest entry of each is positive.
        s: singular values, descending, shape `(*, size)`, in units of the loss by a
            unit of the weight.
        v: directions of the outputs, orthonormal rows, shape `(*, size, d_out)`.

    Example:
        >>> import jax.numpy as jnp
        >>> u, s, v = jnp.linalg.svd(jnp.diag(jnp.array([3.0, 2.0, 1.0])))
        >>> GradientFactors(u, s, v).size
        3
    """

    u: Any
    s: Any
    v: Any

    @property
    def size(self) -> int:
        """How many triplets there are."""
        return self.s.shape[-1]
