"""Values for each token, in the order of another array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from followed import (
    BATCH,
    SEQ,
    TOKENS,
    B,
    D,
    S,
    X,
    results,
    said,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from lorax_jax._errors import FollowError
from lorax_jax.transform import Lost, Stretch, lay_out
from lorax_jax.transform._stretches import entire


def test_values_are_laid_out():
    def fn(x):
        y = x.transpose(1, 0, 2).reshape(-1, D)  # (seq batch, width)
        return y, jnp.repeat(x[:, ::-1], 2, 2), x[:, 1:], x.reshape(B, 3, 2, D)

    merged, turned, cut, chunks = results(fn, X)
    tokens = np.asarray(TOKENS)
    found = jax.jit(lambda t: lay_out(t, merged[:1], (S * B,)))(TOKENS)
    np.testing.assert_array_equal(found, tokens.T.ravel())
    found = lay_out(TOKENS, turned, (B, S, 2 * D))
    expected = np.repeat(tokens[:, ::-1, None], 2 * D, 2)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(lay_out(TOKENS, cut[:2], (B, 5)), tokens[:, 1:])
    found = lay_out(TOKENS, chunks[:3], (B, 3, 2))
    np.testing.assert_array_equal(found, tokens.reshape(B, 3, 2))
    mask = lay_out(TOKENS > 3, (cut[1], cut[0]), (5, B))
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, (tokens > 3)[:, 1:].T)


def test_padding_gets_a_value_of_its_own():
    fn = lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0))).reshape(B, 3, 3, D)  # noqa: E731
    [axes] = results(fn, X)
    assert said(axes) == [BATCH, SEQ, SEQ, ()]
    found = lay_out(TOKENS, axes[:3], (B, 3, 3), padding=-1)
    expected = np.pad(np.asarray(TOKENS), ((0, 0), (1, 2)), constant_values=-1)
    np.testing.assert_array_equal(found, expected.reshape(B, 3, 3))
    assert not lay_out(TOKENS > 0, axes[:3], (B, 3, 3))[:, 0, 0].any()


def test_one_row_needs_no_axis():
    """A batch of one may come and go: all tokens are of that text."""
    [axes] = results(lambda x: x[0], jnp.ones((1, S, D)))
    found = lay_out(TOKENS[:1], axes[:1], (S,))
    np.testing.assert_array_equal(found, TOKENS[0])


def test_values_that_do_not_fit_are_refused():
    full, merged, scores = entire(0, B), entire(0, B) + entire(1, S), entire(1, S)
    both = (full, scores)
    with pytest.raises(FollowError, match="7 entries along axis 1, which has 6 where"):
        lay_out(jnp.ones((B, 7)), both, (B, S))
    with pytest.raises(FollowError, match="1 entries along axis 1, which has 6 where"):
        lay_out(jnp.ones((B, 1)), both, (B, S))
    with pytest.raises(
        FollowError, match=r"pieces of sizes \[6, 6\].*stands there twice"
    ):
        lay_out(TOKENS, (full, scores, scores), (B, S, S))
    with pytest.raises(FollowError, match="no axis of the array runs along axis 0"):
        lay_out(TOKENS, (scores,), (S,))
    with pytest.raises(FollowError, match="12 entries run along one of 13"):
        lay_out(TOKENS, (merged,), (13,))
    with pytest.raises(
        FollowError, match=r"run along 1, and the values of shape \(2,\)"
    ):
        lay_out(jnp.ones(B), (merged,), (12,))
    with pytest.raises(FollowError, match="got 1 `labels` for values of shape"):
        lay_out(TOKENS, (merged,), (12,), labels=["tokens"])
    with pytest.raises(FollowError, match=r"they are sorted\n  at  model.py:3"):
        lay_out(TOKENS, (Lost("they are sorted", "model.py:3"),), (12,))
    halves = Stretch(1, 3, 2, whole=6, extent=6), Stretch(1, 2, 2, whole=6, extent=6)
    with pytest.raises(FollowError, match="stands there twice"):
        lay_out(jnp.ones(6), (halves[:1], halves[1:]), (3, 2), labels=[1])


# What the axes say must be true of an array that holds a number for each token.

STEPS = [
    "transpose", "reshape", "expand", "squeeze", "repeat", "slice", "reverse", "pad",
    "halves", "scan", "reduce", "max", "sort",
]  # fmt: skip


def draw_step(draw, shape):
    """One operation on an array of this shape, and whether it keeps the order known."""
    ndim = len(shape)
    kind = draw(st.sampled_from(STEPS))
    axis = draw(st.integers(0, ndim - 1))
    n = shape[axis]
    if kind == "transpose":
        order = draw(st.permutations(range(ndim)))
        return kind, lambda x: x.transpose(order)
    if kind == "reshape":
        sizes, left = [], int(np.prod(shape))
        while left > 1 and len(sizes) < 4:
            divisors = [d for d in range(2, left + 1) if left % d == 0]
            sizes.append(draw(st.sampled_from(divisors)))
            left //= sizes[-1]
        if left > 1:
            sizes.append(left)
        sizes.insert(draw(st.integers(0, len(sizes))), 1)
        return kind, lambda x: x.reshape(sizes)
    if kind == "expand":
        return kind, lambda x: jnp.expand_dims(x, axis)
    if kind == "squeeze":
        return kind, lambda x: jnp.squeeze(
            x, [i for i, m in enumerate(shape) if m == 1]
        )
    if kind == "repeat":
        times = draw(st.integers(2, 3))
        return kind, lambda x: jnp.repeat(jnp.expand_dims(x, axis), times, axis)
    if kind == "slice":
        start = draw(st.integers(0, n - 1))
        stop = draw(st.integers(start + 1, n))
        stride = draw(st.integers(1, 2))
        return kind, lambda x: lax.slice_in_dim(x, start, stop, stride, axis)
    if kind == "reverse":
        return kind, lambda x: jnp.flip(x, axis)
    if kind == "pad":
        low, high = draw(st.integers(0, 2)), draw(st.integers(-1 if n > 1 else 0, 2))
        config = [(low, high, 0) if i == axis else (0, 0, 0) for i in range(ndim)]
        return kind, lambda x: lax.pad(x, jnp.float32(0), config)
    if kind == "halves":
        at = draw(st.integers(0, n))
        flip = draw(st.booleans())

        def halves(x):
            parts = jnp.split(x, [at], axis)
            return jnp.concatenate(parts[::-1] if flip else parts, axis)

        return kind, halves
    if kind == "scan":

        def scanned(x):
            body = lambda carry, x: (carry, jnp.flip(x, 0) if x.ndim else x)  # noqa: E731
            return lax.scan(body, 0.0, x, reverse=True)[1]

        return kind, scanned
    if kind == "reduce":
        return kind, lambda x: x.max(axis)
    if kind == "max":
        return kind, lambda x: jnp.maximum(x, jnp.swapaxes(x, 0, -1).reshape(x.shape))
    return kind, lambda x: -jnp.sort(-x, axis)


@st.composite
def chains(draw):
    """A tracked array of shape (batch, seq), or both beside features, and steps."""
    batch, seq = draw(st.sampled_from([(2, 3), (3, 4), (2, 2), (1, 4), (4, 6)]))
    width = draw(st.sampled_from([None, 1, 2, 3]))
    shape = (batch, seq) if width is None else (batch, seq, width)
    steps, x = [], jax.ShapeDtypeStruct(shape, jnp.float32)
    for _ in range(draw(st.integers(1, 6))):
        # Pairs of tokens, as in attention, are no token's number once they are reduced.
        if not x.shape or (steps and steps[-1][0] == "max"):
            break
        kind, step = draw_step(draw, x.shape)
        after = jax.eval_shape(step, x)
        if np.prod(after.shape) > 300 or len(after.shape) > 6:
            continue
        steps.append((kind, step))
        x = after
    return shape, steps


KEPT = {"transpose", "expand", "squeeze", "repeat", "reverse", "scan"}


@settings(max_examples=60, deadline=None)
@given(chains())
def test_axes_say_which_token_is_where(chain):
    """Every entry of the result is the number of the token that its axes say.

    Where the order is lost, or tokens are gone, nothing is said; what only moves
    entries about never loses it.
    """
    shape, steps = chain
    tokens = np.arange(1, 1 + shape[0] * shape[1], dtype=np.float32).reshape(shape[:2])
    x = np.broadcast_to(tokens.reshape(shape[:2] + (1,) * (len(shape) - 2)), shape)

    def fn(x):
        for _, step in steps:
            x = step(x)
        return x

    [axes] = results(fn, x)
    kinds = {kind for kind, _ in steps}
    if kinds <= KEPT:
        assert not any(isinstance(axis, Lost) for axis in axes)
    after = jax.eval_shape(fn, x).shape
    run = jax.jit(lambda tokens, x: (lay_out(tokens, axes, after), fn(x)))
    try:
        expected, found = jax.device_get(run(tokens, x))
    except FollowError:
        assert not kinds <= KEPT
        return
    # Padding along features is a zero beside a token, not another token.
    np.testing.assert_array_equal(found, np.where(found == 0, 0, expected))
