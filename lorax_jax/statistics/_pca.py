"""Incremental principal components, as EVA takes them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._base import Principal
from ._eigen import leading
from ._rows import Shifted, at_least_one, between, product


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PcaState:
    r"""Principal components so far, and how far the last batch turned them.

    Attributes:
        count: rows seen, shape `()`.
        mean: shape `(d_in,)`.
        variance: of each entry of the rows, shape `(d_in,)`.
        components: $V$, orthonormal rows, shape `(k, d_in)`.
        singular: $\sigma$, the singular values of the centred rows, shape `(k,)`.
        similarity: cosine between each component and itself before the last batch,
            shape `(k,)`; -1 before the second batch.
        keep: how many components are kept, shape `()`; the others are zero, and a
            batch with fewer rows is skipped.

    All are float32, behind the same leading axes: those of a stack.
    """

    count: Any
    mean: Any
    variance: Any
    components: Any
    singular: Any
    similarity: Any
    keep: Any

    def principal(self, k: int) -> Principal:
        """The first `k` components.

        Raises:
            ValueError: if the state has fewer.
        """
        if k > len(self.components):
            raise ValueError(
                f"{k} principal directions were asked for, and {len(self.components)} "
                f"were gathered. Gather them with `Pca({k})`."
            )
        return Principal(
            self.components[:k].T,
            self.singular[:k] ** 2 / at_least_one(self.count),
            self.variance.sum(),
            self.count,
        )


@dataclasses.dataclass(frozen=True)
class Pca:
    r"""PEFT's incremental PCA: `components * d_in` numbers for each weight.

    A batch of $n$ rows $X$ with mean $\bar x$, after $N$ rows with mean $\mu$, turns
    the components into the leading right singular vectors of

    $$Y = \begin{bmatrix} \mathrm{diag}(\sigma) V \\ X - \bar x \\
    \sqrt{N n / (N + n)}\, (\mu - \bar x)^\top \end{bmatrix} ,$$

    and its singular values are the new $\sigma$. They are the eigenvectors of

    $$Y^\top Y = V^\top \mathrm{diag}(\sigma^2) V + \sum_i (x_i - \bar x)(x_i - \bar
    x)^\top + \tfrac{N n}{N + n} (\mu - \bar x)(\mu - \bar x)^\top ,$$

    which takes from the batch only its count, mean and products: sums, which devices
    can add. What lies outside the kept components is forgotten with each batch, so the
    order of the batches counts; `Moments` forgets nothing.

    A batch with fewer rows than components is skipped, as in PEFT. In a stack, or to
    say it for each weight, lower the state's `keep`.

    PEFT decomposes $Y$, in float64 from the second batch on. Here it is $Y^\top Y$ in
    float32, which finds directions that carry less than $10^{-4}$ of the largest
    variance with few digits.

    Attributes:
        components: how many are kept; all `d_in` where that is less.

    Example:
        >>> stat, rows = Pca(1), jnp.array([[1.0, 2.0], [3.0, 2.0]])
        >>> state = stat.init(2)
        >>> state = stat.update(state, stat.observe(rows, None, stat.context(state)))
        >>> state.components.tolist(), round(float(state.principal(1).variances[0]), 4)
        ([[1.0, 0.0]], 1.0)

    References:
        Ross, Lim, Lin and Yang, "Incremental Learning for Robust Visual Tracking",
        2008. Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance
        Adaptation", 2024. https://arxiv.org/abs/2410.07170
    """

    components: int

    def __post_init__(self):
        if self.components < 1:
            raise ValueError(f"`Pca(components={self.components})` must be at least 1.")

    def init(self, size: int) -> PcaState:
        """The state before any row."""
        k = min(self.components, size)
        return PcaState(
            count=jnp.zeros((), jnp.float32),
            mean=jnp.zeros(size, jnp.float32),
            variance=jnp.zeros(size, jnp.float32),
            components=jnp.zeros((k, size), jnp.float32),
            singular=jnp.zeros(k, jnp.float32),
            similarity=jnp.full(k, -1.0, jnp.float32),
            keep=jnp.asarray(k, jnp.float32),
        )

    def context(self, state: PcaState) -> Float[Array, " d_in"]:
        """The mean: what rows are shifted by."""
        return state.mean

    def observe(
        self,
        rows: Float[Array, "n d_in"],
        weights: Float[Array, " n"] | None,
        context: Float[Array, " d_in"],
    ) -> Shifted:
        """Count, sum and products of the rows less the mean of those before."""
        return Shifted.of(rows, weights, context)

    def update(self, state: PcaState, sums: Shifted) -> PcaState:
        """The state with one batch taken in; `sums` are about the state's mean."""
        new = self._joined(state, sums.count, sums.mean, sums.scatter)
        return _where(sums.count >= state.keep, new, state)

    def merge(self, state: PcaState, other: PcaState) -> PcaState:
        """The state of both: `other` enters as a batch of which `keep` rows are known.

        Its variance outside its components is counted, but has no direction.
        """
        vectors = other.singular[:, None] * other.components  # (k, d_in)
        scatter = product(vectors.T, vectors)
        gap = other.mean - state.mean
        new = self._joined(state, other.count, gap, scatter)
        known = other.variance * other.count
        lost = known - jnp.diagonal(scatter)
        lost = lost / at_least_one(new.count)
        new = dataclasses.replace(new, variance=new.variance + lost)
        return _where(other.count > 0, new, state)

    def _joined(
        self,
        state: PcaState,
        count: Float[Array, ""],
        gap: Float[Array, " d_in"],
        scatter: Float[Array, "d_in d_in"],
    ) -> PcaState:
        """With other rows, whose mean is `gap` away."""
        total = state.count + count
        correction = between(state.count, count)
        before = state.singular[:, None] * state.components  # (k, d_in)
        gram = product(before.T, before) + scatter + correction * jnp.outer(gap, gap)
        k = len(state.singular)
        values, vectors = leading(gram, k)
        kept = jnp.arange(k, dtype=jnp.float32) < state.keep
        components = jnp.where(kept[:, None], vectors.T, 0)
        similarity = (components * state.components).sum(-1)
        spread = state.variance * state.count + jnp.diagonal(scatter)
        return PcaState(
            count=total,
            mean=state.mean + gap * (count / at_least_one(total)),
            variance=(spread + correction * gap**2) / at_least_one(total),
            components=components,
            singular=jnp.where(kept, jnp.sqrt(values), 0),
            similarity=jnp.where(state.count > 0, similarity, -1),
            keep=state.keep,
        )


def _where(condition: Array, new: PcaState, old: PcaState) -> PcaState:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), new, old)
