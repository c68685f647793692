"""`GradientState`: where a sketch of gradients stands."""

import dataclasses

import jax
from jaxtyping import Array, Bool, Float, Int

Factors = dict[str, dict[str, jax.Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GradientState:
    """What `GradientCapture` keeps between batches: a pytree of small arrays.

    Its structure and its shapes never change, so it can be saved and restored as any
    tree of arrays, in the middle of a pass too.

    Attributes:
        held: name -> the factors `a` and `b` bound in this pass; one of them is zero.
        sums: name -> the weighted sums of their gradients so far in this pass.
        weight: what the batches of this pass count for.
        count: number of batches in this pass.
        done: number of complete passes.
        first: `weight` and `count` of the first pass.
        bad: the first batch of this pass with a gradient or a loss that is not finite;
            -1 where there is none.
        witness: some entries of each weight, to tell one model from another.
        mixed: whether several models were seen.
    """

    held: Factors
    sums: Factors
    weight: Float[Array, ""]
    count: Int[Array, ""]
    done: Int[Array, ""]
    first: tuple[Float[Array, ""], Int[Array, ""]]
    bad: Int[Array, ""]
    witness: dict[str, jax.Array]
    mixed: Bool[Array, ""]
