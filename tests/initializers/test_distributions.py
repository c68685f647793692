"""What each method draws: the whole distribution, and its first two moments.

Draws are fixed by their key, so a test passes or fails the same way every time. Bounds
are those that a right sampler breaks for one key in a million.
"""

import functools

import jax
import numpy as np
import pytest
from scipy import stats

from lorax_jax.initializers import embedding, gaussian, kaiming, random

D_IN, D_OUT, KEYS = 48, 80, 64


def uniform(bound):
    return stats.uniform(-bound, 2 * bound)


def normal(deviation):
    return stats.norm(0, deviation)


def draw(start, rank, shape=(D_IN, D_OUT)):
    """Many independent starts, mapped over keys as the layers of a stack are."""
    weight = jax.ShapeDtypeStruct(shape, "float32")
    keys = jax.random.split(jax.random.key(7), KEYS)
    one = functools.partial(start, weight, rank=rank, scale=2.0)
    return jax.vmap(lambda key: one(key=key))(keys)


both_random = functools.partial(embedding, zero=False)

# The method, its factor, and the law that PEFT draws it from, given the rank.
DRAWN = {
    # Kaiming's rule with a = sqrt(5): a gain of sqrt(2 / (1 + 5)), and sqrt(3 / fan).
    "kaiming a": (kaiming, lambda r: uniform(np.sqrt(2 / (1 + 5)) * np.sqrt(3 / D_IN))),
    "gaussian a": (gaussian, lambda r: normal(1 / r)),
    "random a": (random, lambda r: uniform(1 / np.sqrt(D_IN))),
    "random b": (random, lambda r: uniform(1 / np.sqrt(r))),
    "embedding b": (embedding, lambda r: normal(1)),
    "embedding_random a": (both_random, lambda r: normal(1)),
    "embedding_random b": (both_random, lambda r: normal(1)),
}


@pytest.mark.parametrize("rank", [1, 6])
@pytest.mark.parametrize("name", DRAWN)
def test_law(name, rank):
    start, law = DRAWN[name]
    found, law = draw(start, rank), law(rank)
    values = np.asarray(getattr(found, name[-1]), np.float64).ravel()
    n, deviation = values.size, law.std()
    assert n >= 3000
    assert stats.kstest(values, law.cdf).pvalue > 1e-6
    # Five standard errors of the mean and of the variance.
    assert abs(values.mean()) < 5 * deviation / np.sqrt(n)
    kurtosis = law.stats("k") + 3
    error = np.sqrt((kurtosis - 1) / n)
    assert abs(values.var() / deviation**2 - 1) < 5 * error
    bound = law.support()[1]
    if np.isfinite(bound):
        # The n draws all stay a share of 14 / n below a bound once in a million keys.
        largest = np.abs(values).max()
        assert bound * (1 - 14 / n) < largest <= np.float32(bound)


def test_one_factor_is_zero_and_the_other_is_not():
    for start in (kaiming, gaussian):
        a, b, *_ = draw(start, 6)
        assert a.any() and not b.any()
    a, b, *_ = draw(embedding, 6)
    assert b.any() and not a.any()


@pytest.mark.parametrize("start", [random, both_random], ids=["random", "embedding"])
def test_two_random_factors_have_nothing_to_do_with_each_other(start):
    """As they would if both were drawn with one key."""
    rank = n = 32
    found = draw(start, rank, (n, n))
    a, b = np.asarray(found.a), np.asarray(found.b)
    for other in (b, b.transpose(0, 2, 1)):
        correlation = np.corrcoef(a.ravel(), other.ravel())[0, 1]
        assert abs(correlation) < 5 / np.sqrt(a.size)
