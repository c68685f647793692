"""CorDA: start on the weight's directions as its inputs weigh them."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from .._errors import CheckpointError, ConfigError
from .._peft import Options, register_options
from ..statistics import SecondMoment
from ._base import Start, register
from ._stats import check_size, check_stats

MODES = ("ipm", "kpm")


@dataclasses.dataclass(frozen=True)
class Corda:
    """Options of `corda`, to be given as `init` in place of the name.

    Attributes:
        mode: `"ipm"` (instruction-previewed: the directions that the inputs use most)
            or `"kpm"` (knowledge-preserved: those that they use least).
        damping: share of the mean diagonal that is first added to the diagonal.
        tolerance: how far the damped matrix times its inverse may be from the
            identity, in the Frobenius norm.

    Raises:
        ConfigError: for another mode, or numbers that are not positive.

    Example:
        >>> import lorax_jax as lj
        >>> lj.LoraConfig(".*/q_proj/kernel", init=Corda(mode="kpm")).init.mode
        'kpm'
    """

    mode: str = "ipm"
    damping: float = 0.01
    tolerance: float = 0.05

    def __post_init__(self):
        if self.mode not in MODES:
            raise ConfigError(
                f"`Corda(mode={self.mode!r:.60})`: one of 'ipm', 'kpm' is meant."
            )
        for name in ("damping", "tolerance"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and 0 < value < float("inf")):
                raise ConfigError(
                    f"`Corda({name}={value!r:.60})`: a positive number is meant."
                )


def _to_peft(options: Corda) -> dict[str, str]:
    if options != Corda(mode=options.mode):
        raise CheckpointError(
            f"{options} has a damping or a tolerance of its own, and PEFT's are fixed. "
            "Leave them at their defaults, or keep the `LoraConfig`."
        )
    return {"corda_method": options.mode}


register_options(
    "corda",
    Options(Corda, lambda fields: Corda(mode=fields["corda_method"]), _to_peft),
)


@register("corda", "corda_ipm", reads="stats", stat=SecondMoment(), options=Corda)
def corda(
    weight: Float[Array, "d_in d_out"],
    *,
    rank: int,
    scale: float | Float[Array, ""],
    key: PRNGKeyArray,
    stats: Any = None,
    options: Corda = Corda(),
) -> Start:
    r"""Trains the weight's directions that its inputs use most, or least.

    With $C$ the inputs' second moment, damped to $C' = C + \delta\,\overline{\mathrm{
    diag}\,C}\, I$, and $s$ = `scale`,

    $$C' W = V S U^\top, \qquad
    A_0 = C'^{-1} V_{sel} \sqrt{S_{sel} / s}, \qquad
    B_0 = \sqrt{S_{sel} / s}\; U_{sel}^\top ,$$

    where *sel* is the first `rank` directions (`"ipm"`) or the last (`"kpm"`) of the
    `min(d_in, d_out)` there are. So $s A_0 B_0 = C'^{-1} V_{sel} S_{sel}
    U_{sel}^\top = W U_{sel} U_{sel}^\top$: the weight, in some of its directions.

    The adapter starts at $A = A_0$, $B = B_0$ and contributes $s (A B - A_0 B_0)$, so
    the adapted function starts equal to the original and `weight` itself is never
    changed. PEFT subtracts $s A_0 B_0$ from the base instead; `fold` does the same
    here. PEFT stores the transposes: `a = lora_A.T`, `b = lora_B.T`.

    Which $C$ is a choice of the statistic. The default, `SecondMoment`, is PEFT's: the
    rows of each use of the weight, a batch's as a rule, are first divided by the size
    of their signed maximum, so that batches with large activations weigh no more than
    others; products are then summed over rows and averaged over uses. `Moments`, and
    `SecondMoment(normalize=False)`, divide by no maximum: rows weigh by the squares of
    their activations, and the two differ by the size of $C$ alone. A $C$ that is $c$
    times as large leaves $A_0 B_0$ as it is, with $A_0 / \sqrt c$ and
    $\sqrt c\, B_0$ for the factors.

    $\delta$ starts at `damping` and is doubled until $\lVert C' C'^{-1} - I \rVert_F$
    is below `tolerance` in float32.

    Args:
        weight: the kernel, shape `(d_in, d_out)`.
        rank: columns of A; at most `min(d_in, d_out)`.
        scale: the adapter's multiplier, `alpha / rank`.
        key: unused; every initializer accepts one.
        stats: a state with `second_moment`, of the inputs of this weight.
        options: mode and damping.

    Returns:
        `Start(a, b, a0, b0)`, shapes `(d_in, rank)` and `(rank, d_out)`, float32; here
        `a is a0` and `b is b0`. They are NaN where the statistics are NaN or zero.

    Raises:
        CaptureError: if there are no statistics, or none with a second moment, or they
            are those of rows of another size.
        ValueError: if `rank` exceeds `min(d_in, d_out)`.

    Example:
        >>> import jax
        >>> stat = SecondMoment()
        >>> state = stat.update(stat.init(2), stat.observe(jnp.eye(2), None, ()))
        >>> weight, key = jnp.diag(jnp.array([2.0, 1.0])), jax.random.key(0)
        >>> start = corda(weight, rank=1, scale=4.0, key=key, stats=state)
        >>> (4.0 * start.a @ start.b).round(3).tolist()  # the larger of the two
        [[2.0, 0.0], [0.0, 0.0]]

    References:
        Yang et al., "CorDA: Context-Oriented Decomposition Adaptation of Large Language
        Models", 2024. https://arxiv.org/abs/2406.05223
    """
    del key
    d_in, _ = weight.shape
    check_stats("corda", stats, "second_moment", ("SecondMoment()", "Moments()"))
    second = stats.second_moment()
    check_size("corda", len(second), d_in)
    if rank > min(weight.shape):
        raise ValueError(
            f"`rank` = {rank} exceeds the rank that a {weight.shape} kernel can have, "
            f"{min(weight.shape)}. Lower `rank` for this site, e.g. with a rule of its "
            "own."
        )
    weight = weight.astype(jnp.float32)
    weighed = _product(_damped(second, options), weight)  # (d_in, d_out)
    _, s, ut = jnp.linalg.svd(weighed, full_matrices=False)
    sel = slice(0, rank) if options.mode == "ipm" else slice(len(s) - rank, None)
    s, ut = s[sel], ut[sel]  # (rank,), (rank, d_out)
    # C'^-1 V S = W U, for C' W U = V S: without an inverse, whose digits C' has not.
    root = jnp.sqrt(s / scale)
    a = _product(weight, ut.T) * jnp.where(s == 0, 0, root / s)[None]
    b = root[:, None] * ut
    return Start(a, b, a0=a, b0=b)


@register("corda_kpm", reads="stats", stat=SecondMoment())
def corda_kpm(
    weight: Float[Array, "d_in d_out"],
    *,
    rank: int,
    scale: float | Float[Array, ""],
    key: PRNGKeyArray,
    stats: Any = None,
) -> Start:
    """`corda` in the mode `"kpm"`: the directions that the inputs use least."""
    options = Corda(mode="kpm")
    return corda(weight, rank=rank, scale=scale, key=key, stats=stats, options=options)


def _damped(second: Float[Array, "d d"], options: Corda) -> Float[Array, "d d"]:
    """The damped second moment.

    The search ends: with the diagonal in the majority the inverse is good, and where
    nothing can be inverted it is not begun. Of zeros there is nothing but NaN to give.
    """
    eye = jnp.eye(len(second), dtype=jnp.float32)
    mean = jnp.diagonal(second).mean()

    def tried(damping):
        damped = second + damping * mean * eye
        return damped, jnp.linalg.inv(damped)

    def going_on(state):
        damping, damped, inverse = state
        error = jnp.linalg.norm(_product(damped, inverse) - eye)
        fine = error < options.tolerance
        return ~fine & jnp.isfinite(damped).all() & (mean > 0) & (damping < _MOST)

    def doubled(state):
        damping = 2 * state[0]
        return damping, *tried(damping)

    damping = jnp.float32(options.damping)
    damped = lax.while_loop(going_on, doubled, (damping, *tried(damping)))[1]
    return jnp.where(mean > 0, damped, jnp.nan)


# With this share of its diagonal added, a matrix is its diagonal in float32.
_MOST = 2.0**24


def _product(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)
