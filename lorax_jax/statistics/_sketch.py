"""A sketch of the covariance, for rows too wide for a square."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._base import Principal
from ._eigen import random_columns, upright
from ._rows import at_least_one, between, counted, product


class SketchSums(NamedTuple):
    """Sums of rows about the mean of those before.

    Attributes:
        count: number of rows, shape `()`.
        total: their sum, shape `(d_in,)`.
        squares: the sum of their squares, shape `(d_in,)`.
        products: their products times the sketch's directions, shape `(d_in, m)`.
    """

    count: Float[Array, ""]
    total: Float[Array, " d_in"]
    squares: Float[Array, " d_in"]
    products: Float[Array, "d_in m"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SketchState:
    r"""The covariance, seen along `m` directions.

    Attributes:
        count: $n$, shape `()`.
        mean: $\mu$, shape `(d_in,)`.
        squares: $\sum_i (x_i - \mu)^2$, entry by entry, shape `(d_in,)`.
        sketch: $S \Omega$ with the scatter $S = \sum_i (x_i - \mu)(x_i - \mu)^\top$,
            shape `(d_in, m)`.
        directions: $\Omega$, orthonormal columns, shape `(d_in, m)`.

    All are float32, behind the same leading axes: those of a stack.
    """

    count: Any
    mean: Any
    squares: Any
    sketch: Any
    directions: Any

    def principal(self, k: int) -> Principal:
        r"""The `k` leading directions of Nyström's approximation of the covariance.

        With $Y = S \Omega$ it is $Y (\Omega^\top Y)^{+} Y^\top = F F^\top$ with
        $F = Y Q D^{-1/2}$ and $\Omega^\top Y = Q D Q^\top$. What $D$ has below the
        precision of float32 is left out: it is zero where there are fewer rows than
        columns.

        Raises:
            ValueError: if the sketch has fewer than `k` columns.
        """
        m = self.sketch.shape[-1]
        if k > m:
            raise ValueError(
                f"{k} principal directions were asked for, and the sketch has {m} "
                f"columns. Gather it with `Sketch({k})`."
            )
        core = product(self.directions.T, self.sketch)  # (m, m)
        values, vectors = jnp.linalg.eigh((core + core.T) / 2, symmetrize_input=False)
        least = m * jnp.finfo(jnp.float32).eps * values[-1]
        # A NaN is not below it, and stays.
        dropped = values <= least
        root = jnp.where(dropped, 0, jax.lax.rsqrt(jnp.where(dropped, 1, values)))
        factor = product(self.sketch, vectors * root[None])  # (d_in, m)
        left, singular, _ = jnp.linalg.svd(factor, full_matrices=False)
        count = at_least_one(self.count)
        return Principal(
            upright(left[:, :k]),
            singular[:k] ** 2 / count,
            self.squares.sum() / count,
            self.count,
        )


@dataclasses.dataclass(frozen=True)
class Sketch:
    r"""A Nyström sketch of the covariance: `2 * columns * d_in` numbers a weight.

    What is kept of the scatter $S$ of the rows is $S \Omega$, with `columns` random
    orthonormal directions $\Omega$. As with `Moments`, nothing depends on the order
    of the rows or on what was merged with what. With $m$ columns, of the approximation
    $\hat S$ is known that for every $k < m - 1$

    $$E \| S - \hat S \|_* \le \left(1 + \frac{k}{m - k - 1}\right)
    \sum_{j > k} \lambda_j ,$$

    so with twice as many columns as directions the variance that is missed is at most
    about twice what the best ones miss.

    Attributes:
        components: how many directions are wanted.
        columns: of the sketch; `None` takes `2 * components + 8`. There are never more
            than `d_in`.
        seed: of the directions. States of one seed can be merged.

    Example:
        >>> stat, rows = Sketch(1), jnp.array([[1.0, 2.0], [3.0, 2.0]])
        >>> state = stat.init(2)
        >>> state = stat.update(state, stat.observe(rows, None, stat.context(state)))
        >>> abs(state.principal(1).vectors[:, 0]).round(3).tolist()
        [1.0, 0.0]

    References:
        Tropp, Yurtsever, Udell and Cevher, "Fixed-Rank Approximation of a
        Positive-Semidefinite Matrix from Streaming Data", 2017.
        https://arxiv.org/abs/1706.05736
    """

    components: int
    columns: int | None = None
    seed: int = 0

    def __post_init__(self):
        columns = self.components if self.columns is None else self.columns
        if not 1 <= self.components <= columns:
            raise ValueError(
                f"`Sketch(components={self.components}, columns={self.columns})` needs "
                "at least one component, and as many columns as components."
            )

    def init(self, size: int) -> SketchState:
        """The state before any row."""
        wanted = self.columns or 2 * self.components + 8
        directions = random_columns(size, min(wanted, size), seed=self.seed)
        return SketchState(
            count=jnp.zeros((), jnp.float32),
            mean=jnp.zeros(size, jnp.float32),
            squares=jnp.zeros(size, jnp.float32),
            sketch=jnp.zeros_like(directions),
            directions=directions,
        )

    def context(self, state: SketchState) -> tuple[Array, Array]:
        """The mean, which rows are shifted by, and the directions."""
        return state.mean, state.directions

    def observe(
        self,
        rows: Float[Array, "n d_in"],
        weights: Float[Array, " n"] | None,
        context: tuple[Array, Array],
    ) -> SketchSums:
        """Sums of the rows less the mean of those before, `(d_in, m)` at most."""
        mean, directions = context
        rows, weights = counted(rows, weights)
        moved = rows - mean[None]  # (n, d_in)
        weighted = weights[:, None] * moved
        return SketchSums(
            weights.sum(),
            weighted.sum(0),
            (weighted * moved).sum(0),
            product(weighted.T, product(moved, directions)),
        )

    def update(self, state: SketchState, sums: SketchSums) -> SketchState:
        """The state with one batch taken in; `sums` are about the state's mean."""
        mean = sums.total / at_least_one(sums.count)
        seen = product(mean, state.directions)
        return _joined(
            state,
            sums.count,
            mean,
            sums.squares - sums.count * mean**2,
            sums.products - sums.count * jnp.outer(mean, seen),
        )

    def merge(self, state: SketchState, other: SketchState) -> SketchState:
        """The state of both."""
        gap = other.mean - state.mean
        return _joined(state, other.count, gap, other.squares, other.sketch)


def _joined(
    state: SketchState,
    count: Float[Array, ""],
    gap: Float[Array, " d_in"],
    squares: Float[Array, " d_in"],
    sketch: Float[Array, "d_in m"],
) -> SketchState:
    """With other rows, whose mean is `gap` away."""
    total = state.count + count
    correction = between(state.count, count)
    turned = product(gap, state.directions)
    return SketchState(
        count=total,
        mean=state.mean + gap * (count / at_least_one(total)),
        squares=state.squares + squares + correction * gap**2,
        sketch=state.sketch + sketch + correction * jnp.outer(gap, turned),
        directions=state.directions,
    )
