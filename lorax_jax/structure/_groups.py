r"""Groups: weights whose outputs each see a part of the inputs.

The outputs of a grouped kernel come in as many runs of one length as there are groups,
and the kernel's input axes are those of a single group. A change of such a weight has
an A for every group,

$$\Delta_{i o} = \sum_r A_{i\,g(o)\,r} B_{r o}, \qquad g(o) = \text{the run of } o ,$$

so A has an axis `GROUP` beside `RANK`, and B says by its outputs which group it is in.
Where there are several output axes, runs are counted in row-major order.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from ._axes import GROUP, Along, AxisOp, Label, Transpose, Unstructured
from ._factor import Factor
from ._products import arrange, product

# The place of an output in its run.
MEMBER = "member"


def outputs_of(a: Factor, b: Factor) -> tuple[int, ...]:
    """The weight's axes along which B alone runs, ascending."""
    return tuple(sorted(x for x in b.axes if isinstance(x, int) and not a.holds(x)))


def apart(b: Factor, outputs: tuple[int, ...], groups: int) -> Factor:
    """B with its outputs split into runs: its axes end in `GROUP` and `MEMBER`.

    >>> import jax.numpy as jnp
    >>> split = apart(Factor(jnp.ones((2, 12)), ("rank", 3)), (3,), groups=4)
    >>> split.array.shape, split.axes
    ((2, 4, 3), ('rank', 'group', 'member'))
    """
    rest = tuple(axis for axis in b.axes if axis not in outputs)
    array = b.aligned((*rest, *outputs))
    return Factor(
        array.reshape(*array.shape[: len(rest)], groups, -1), (*rest, GROUP, MEMBER)
    )


def together(y: jax.Array, at: int, *sizes: int) -> jax.Array:
    """Undoes the split in a result: its axes `at` and `at + 1` become axes of `sizes`.

    >>> import jax.numpy as jnp
    >>> together(jnp.ones((5, 4, 3, 2)), 1, 12).shape
    (5, 12, 2)
    """
    return y.reshape(*y.shape[:at], *sizes, *y.shape[at + 2 :])


def group_count(factor: Factor) -> int:
    """The number of groups that a factor has values for."""
    return factor.array.shape[factor.axes.index(GROUP)] if factor.holds(GROUP) else 1


def keep_groups(a: Factor, b: Factor, op: AxisOp) -> None:
    """Checks that an operation on the weight leaves every output in its group.

    Splitting and merging output axes is fine: it keeps their row-major order.

    Raises:
        Unstructured: if `op` takes some of the outputs, or changes their order.
    """
    if not a.holds(GROUP):
        return
    outputs = outputs_of(a, b)
    if isinstance(op, Along) and op.axis in outputs:
        raise Unstructured(
            "some outputs of a grouped kernel are taken, and their groups with them"
        )
    if isinstance(op, Transpose):
        order = [op.permutation.index(axis) for axis in outputs]
        if order != sorted(order):
            raise Unstructured("the outputs of a grouped kernel change their order")


def outer(a: Factor, b: Factor, shape: tuple[int, ...]) -> jax.Array:
    """`A B` as one array of the weight's shape, at the device's highest precision."""
    kept, outputs = tuple(range(len(shape))), ()
    wanted: tuple[Label, ...] = kept
    sizes = shape
    if a.holds(GROUP):
        outputs, groups = outputs_of(a, b), group_count(a)
        kept = tuple(axis for axis in kept if axis not in outputs)
        count = math.prod(shape[axis] for axis in outputs)
        b = apart(b, outputs, groups)
        wanted = (*kept, GROUP, MEMBER)
        sizes = (*(shape[axis] for axis in kept), groups, count // groups)
    # HIGHEST: the default float32 product is TF32 or bfloat16 on accelerators.
    delta, labels = product(
        a.array,
        a.axes,
        b.array,
        b.axes,
        keep=set(wanted),
        precision=lax.Precision.HIGHEST,
    )
    delta = arrange(delta, labels, wanted, sizes)
    if outputs:
        delta = together(delta, len(kept), *(shape[axis] for axis in outputs))
        order = (*kept, *outputs)
        delta = jnp.transpose(delta, [order.index(axis) for axis in range(len(shape))])
    return delta
