"""LoRA-GA: start on the gradient's principal singular directions."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._errors import ConfigError, PlanError
from .._peft import Options, register_options
from ..statistics import GradientFactors
from ._base import Start, register

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "weight_svd", "gd", "unit")


@dataclasses.dataclass(frozen=True)
class LoraGa:
    """Options of `lora_ga`, to be given as `init` in place of the name.

    Attributes:
        direction: which of the gradient's directions A and B take: `"ArB2r"`,
            `"A2rBr"`, `"ArBr"` or `"random"`, see `lora_ga`.
        scale: how large B is made: `"stable"`, `"weight_svd"`, `"gd"` (A too) or
            `"unit"`.
        gamma: the constant of the scale `"stable"`, above 0.

    Raises:
        ConfigError: for a word or a number that is none of these.

    Example:
        >>> import lorax_jax as lj
        >>> init = LoraGa(direction="ArBr", scale="unit")
        >>> lj.LoraConfig({".*/q_proj/kernel": {"init": init}}).rules[0].init.direction
        'ArBr'
    """

    direction: str = "ArB2r"
    scale: str = "stable"
    gamma: float | int = 16

    def __post_init__(self):
        for name, known in (("direction", DIRECTIONS), ("scale", SCALES)):
            said = getattr(self, name)
            if said not in known:
                words = ", ".join(map(repr, known))
                raise ConfigError(
                    f"`LoraGa({name}={said!r:.60})`: one of {words} is meant."
                )
        if not 0 < self.gamma < math.inf:
            raise ConfigError(
                f"`LoraGa(gamma={self.gamma!r:.60})`: a positive number is meant."
            )

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any]) -> "LoraGa":
        """The options of PEFT's `lora_ga_config`.

        >>> LoraGa.from_peft({"scale": "gd_scale", "stable_gamma": 8})
        LoraGa(direction='ArB2r', scale='gd', gamma=8)
        """
        known = cls()
        scale = fields.get("scale", known.scale)
        return cls(
            fields.get("direction", known.direction),
            "gd" if scale == "gd_scale" else scale,
            fields.get("stable_gamma", known.gamma),
        )

    def to_peft(self) -> dict[str, Any]:
        """PEFT's fields for these options: undoes `from_peft`."""
        return {
            "direction": self.direction,
            "scale": "gd_scale" if self.scale == "gd" else self.scale,
            "stable_gamma": self.gamma,
        }


register_options("lora_ga", Options(LoraGa, LoraGa.from_peft, LoraGa.to_peft))


@register("lora_ga", reads="stats", stat=GradientFactors, directions=2, options=LoraGa)
def lora_ga(
    weight: Float[Array, "d_in d_out"] | jax.ShapeDtypeStruct,
    *,
    rank: int,
    scale: float | Float[Array, ""],
    key: PRNGKeyArray,
    stats: Any = None,
    options: LoraGa = LoraGa(),
) -> Start:
    r"""Starts on the leading singular directions of the weight's gradient.

    With $G \approx U \,\mathrm{diag}(S)\, V$ the mean gradient of the kernel as
    `capture_grad` finds it, $r$ = `rank` and $s$ = `scale`,

    $$A_0 = U_{:, I}, \qquad B_0 = c \,\mathrm{diag}(S_J)\, V_J ,$$

    | `direction` | $I$, for A | $J$, for B |
    |---|---|---|
    | `"ArB2r"` | $0, \dots, r - 1$ | $r, \dots, 2r - 1$ |
    | `"A2rBr"` | $r, \dots, 2r - 1$ | $0, \dots, r - 1$ |
    | `"ArBr"` | $1, 3, \dots, 2r - 1$ | $0, 2, \dots, 2r - 2$ |
    | `"random"` | $r$ of $0, \dots, 2r - 1$, drawn with `key` | the same |

    | `scale` | $c$ |
    |---|---|
    | `"stable"` | $d_{out}^{1/4} / \sqrt{\gamma}$ |
    | `"weight_svd"` | $\sigma_1(W) / S_{J_0}$; 1 where $S_{J_0} = 0$ |
    | `"gd"` | $1 / s$, and $A_0$ is divided by $s$ as well |
    | `"unit"` | 1 |

    The adapter starts at $A = A_0$, $B = B_0$ and contributes $s (A B - A_0 B_0)$, so
    the adapted function starts equal to the original and the weight is never changed.
    The first step of gradient descent then moves $A B$ as nearly as rank $2r$ allows
    along $-G$.

    $B_0$ holds the singular values of $G$, as PEFT's does and the paper's does not, so
    it is as small as gradients are, and scaling the loss scales it. Two differences
    from PEFT, whose weights are the transposes (`a = lora_A.T`, `b = lora_B.T`): it
    takes the number of *inputs* for $d_{out}$ where the module is a `Conv1D`, whose
    weight lies the other way, and its $\sigma_1(W)$ is a randomized estimate.

    Args:
        weight: the kernel, shape `(d_in, d_out)`; only `"weight_svd"` reads its values.
        rank: columns of A.
        scale: the adapter's multiplier, `alpha / rank`.
        key: PRNG key, used by the direction `"random"` alone.
        stats: `GradientFactors` of this kernel with at least `2 * rank` directions.
        options: direction, scale and gamma.

    Returns:
        `Start(a, b, a0, b0)`, shapes `(d_in, rank)` and `(rank, d_out)`, float32; here
        `a is a0` and `b is b0`.

    Raises:
        PlanError: if `stats` are no `GradientFactors` of this shape, or hold fewer than
            `2 * rank` directions.

    Example:
        >>> gradient = jnp.diag(jnp.array([4.0, 3.0, 2.0, 1.0]))
        >>> factors = GradientFactors(*jnp.linalg.svd(gradient))
        >>> start = lora_ga(
        ...     jnp.ones((4, 4)), rank=2, scale=1.0, key=jax.random.key(0),
        ...     stats=factors, options=LoraGa("ArB2r", "unit"),
        ... )
        >>> jnp.linalg.norm(start.b, axis=1).tolist()  # the third and the fourth
        [2.0, 1.0]

    References:
        Wang, Yu and Li, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation",
        2024. https://arxiv.org/abs/2407.05000
    """
    _check(stats, weight.shape, rank)
    for_a, for_b = _directions(options.direction, rank, key)
    a = stats.u[:, for_a]
    values = stats.s[for_b]  # (rank,)
    b = values[:, None] * stats.v[for_b]
    if options.scale == "stable":
        b *= weight.shape[1] ** 0.25 / math.sqrt(options.gamma)
    elif options.scale == "weight_svd":
        first = values[0]
        b *= jnp.where(first > 0, _norm(weight) / jnp.where(first > 0, first, 1), 1)
    elif options.scale == "gd":
        a, b = a / scale, b / scale
    return Start(a, b, a0=a, b0=b)


def _directions(direction: str, rank: int, key: PRNGKeyArray) -> Any:
    """Which of the triplets A and B take."""
    first, second = slice(0, rank), slice(rank, 2 * rank)
    if direction == "ArB2r":
        return first, second
    if direction == "A2rBr":
        return second, first
    if direction == "ArBr":
        return slice(1, 2 * rank, 2), slice(0, 2 * rank, 2)
    drawn = jax.random.permutation(key, 2 * rank)[:rank]
    return drawn, drawn


def _norm(weight: Any) -> jax.Array:
    r"""$\sigma_1$: the root of the largest eigenvalue of the smaller Gram matrix.

    Squares lose half the digits of small singular values, and none of the largest.
    """
    wide = weight.astype(jnp.float32)
    narrow = wide.T if wide.shape[0] < wide.shape[1] else wide
    gram = jnp.matmul(narrow.T, narrow, precision="highest")
    return jnp.sqrt(jnp.linalg.eigvalsh(gram)[-1])


def _check(stats: Any, shape: tuple[int, ...], rank: int) -> None:
    if not isinstance(stats, GradientFactors):
        raise PlanError(
            f"The initializer 'lora_ga' starts from gradients, and got {stats!r:.60}. "
            "Give `stats=capture_grad(loss, plan).run(params, batches)`, or let "
            "`prepare(..., loss=loss)` find them."
        )
    d_in, d_out = shape
    found = stats.u.shape, stats.v.shape
    if found != ((d_in, stats.size), (stats.size, d_out)):
        raise PlanError(
            f"Gradients of a kernel of shape ({stats.u.shape[0]}, {stats.v.shape[1]}) "
            f"were given for one of shape {shape}. Take those of the same plan."
        )
    if stats.size < 2 * rank:
        most = min(shape)
        raise PlanError(
            f"The initializer 'lora_ga' needs {2 * rank} directions of the gradient "
            f"for the rank {rank}, twice as many, and got {stats.size}. "
            + (
                f"Gather more: `capture_grad(loss, plan, size={4 * rank})`."
                if most >= 2 * rank
                else f"A kernel of shape {shape} has {most} at most: "
                + (
                    f"lower `rank` to {most // 2}"
                    if most > 1
                    else "choose another `init`"
                )
                + " for this site, e.g. with a rule of its own."
            )
        )
