"""EVA: start on the principal directions of what the weight is fed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._errors import CaptureError
from .._peft import Options, register_options
from .._rule import check_flag
from ..statistics import Moments
from ._base import Start, register
from ._stats import check_size, check_stats


@dataclasses.dataclass(frozen=True)
class Eva:
    """Options of `eva`, to be given as `init` in place of the name.

    Attributes:
        whiten: make directions along which inputs vary less longer.

    Example:
        >>> import lorax_jax as lj
        >>> lj.LoraConfig(".*/q_proj/kernel", init=Eva(whiten=True)).init
        Eva(whiten=True)
    """

    whiten: bool = False

    def __post_init__(self):
        check_flag(self.whiten, "Eva(whiten=)")


register_options(
    "eva",
    Options(
        Eva,
        read=lambda fields: Eva(whiten=fields["whiten"]),
        write=lambda options: {"whiten": options.whiten},
    ),
)


@register("eva", reads="stats", stat=Moments(), nested=True, options=Eva)
def eva(
    weight: Float[Array, "d_in d_out"] | jax.ShapeDtypeStruct,
    *,
    rank: int,
    scale: float | Float[Array, ""],
    key: PRNGKeyArray,
    stats: Any = None,
    options: Eva = Eva(),
) -> Start:
    r"""Starts A on the directions along which the weight's inputs vary most.

    With $v_j$ the principal directions of the inputs $x_1, \dots, x_n$, centred at
    their mean,

    $$A = [v_1, \dots, v_r], \qquad B = 0 .$$

    The adapter starts at zero, and `weight` is not looked at. The directions are those
    of any statistic with `principal`: `Moments` has them exactly, `Pca` as PEFT's
    incremental PCA finds them, `Sketch` nearly and for wide weights.
    `capturing.eva` gathers the statistic and gives sites whose inputs need more
    directions a larger rank.

    With `whiten`, $v_j$ is divided by $\sqrt{\sigma_j}$, where $\sigma_j$ is the
    singular value of the centred inputs, $\sigma_j^2 = n \lambda_j$ with the variance
    $\lambda_j$ along $v_j$. PEFT means the same, and divides in place: where $g$
    weights share an input, as queries, keys and values do, all of them end with
    $\sigma_j^{-g/2}$. Here each is divided once.

    PEFT stores the transpose: `a = lora_A.T`.

    Args:
        weight: the kernel or its type, shape `(d_in, d_out)`; only the shape counts.
        rank: columns of A; at most `d_in`.
        scale: unused; every initializer accepts it.
        key: unused; every initializer accepts one.
        stats: a state with `principal`, of the inputs of this weight.
        options: whether to whiten.

    Returns:
        `Start(a, b)`, shapes `(d_in, rank)` and `(rank, d_out)`, float32. Without
        `whiten` the columns of `a` are orthonormal.

    Raises:
        CaptureError: if there are no statistics, or none with directions, or they are
            those of rows of another size.

    Example:
        >>> stat, rows = Moments(), jnp.array([[1.0, 0.0], [-1.0, 0.0]])
        >>> state = stat.init(2)
        >>> state = stat.update(state, stat.observe(rows, None, stat.context(state)))
        >>> key, weight = jax.random.key(0), jnp.ones((2, 3))
        >>> eva(weight, rank=1, scale=1.0, key=key, stats=state).a.tolist()
        [[1.0], [0.0]]

    References:
        Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance
        Adaptation", 2024. https://arxiv.org/abs/2410.07170
    """
    del scale, key
    d_in, d_out = weight.shape
    check_stats("eva", stats, "principal", ("Moments()", f"Pca({rank})"))
    if rank > d_in:
        raise CaptureError(
            f"`init='eva'` starts {rank} columns on as many directions of rows of "
            f"{d_in} values. Lower `rank` for this site, e.g. with a rule of its own."
        )
    directions, variances, _, count = stats.principal(rank)
    check_size("eva", len(directions), d_in)
    if options.whiten:
        # The root of sigma = (n lambda)^(1/2).
        directions = directions / ((count * variances) ** 0.25)[None]
    return Start(directions, jnp.zeros((rank, d_out), jnp.float32))
