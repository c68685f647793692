"""Which keys a query sees, where positions start, and which kernel runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_jax.models import _attention
from lorax_jax.models._attention import (
    Sight,
    attend,
    new_positions,
    sight_into_cache,
    sight_without_cache,
)
from lorax_jax.models._cache import empty_cache


def _cache(length, slots=6):
    cache = empty_cache(
        layers=1,
        batch=1,
        slots=slots,
        kv_heads=1,
        head_dim=2,
        dtype=jnp.dtype("float32"),
        stacked=False,
    )
    return cache._replace(length=jnp.asarray(length, jnp.int32))


def test_nothing_is_materialized_without_a_mask():
    assert sight_without_cache(None, 8, None) == Sight(None, True, None)
    assert sight_without_cache(None, 8, 4) == Sight(None, True, 4)
    # A window that reaches over the whole sequence hides nothing.
    assert sight_without_cache(None, 8, 8) == Sight(None, True, None)


def test_new_tokens_see_the_cache_and_each_other():
    valid = jnp.array([[False, True, True, True, False, False]])
    sight = sight_into_cache(_cache(2), valid, 2, None)
    assert not sight.causal and sight.mask is not None
    np.testing.assert_array_equal(
        sight.mask[0, 0].astype(int), [[0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0]]
    )


def test_a_window_reaches_back_over_the_cache():
    sight = sight_into_cache(_cache(3), jnp.ones((1, 6), bool), 2, 2)
    assert sight.mask is not None
    np.testing.assert_array_equal(
        sight.mask[0, 0].astype(int), [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0]]
    )


def test_positions_count_real_tokens_from_where_the_cache_ends():
    mask = jnp.array([[False, True, True], [True, True, True]])
    start = jnp.array([0, 4], jnp.int32)
    assert new_positions(mask, start, 3).tolist() == [[0, 0, 1], [4, 5, 6]]
    assert new_positions(None, start, 2).tolist() == [[0, 1], [4, 5]]
    assert new_positions(None, None, 2).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("dtype", "head_dim", "masked", "flash"),
    [
        ("bfloat16", 64, False, True),
        ("float16", 128, False, True),
        ("float32", 64, False, False),
        ("bfloat16", 60, False, False),
        ("bfloat16", 256, False, False),
        ("bfloat16", 64, True, False),
    ],
)
def test_flash_attention_is_chosen_where_it_applies(
    monkeypatch, dtype, head_dim, masked, flash
):
    monkeypatch.setattr(_attention, "_has_cudnn", lambda: True)
    mask = jnp.ones((1, 1, 1, 4), bool) if masked else None
    query = jnp.zeros((1, 4, 2, head_dim), dtype)
    assert _attention._flash_applies(query, Sight(mask, True, None)) is flash


@pytest.mark.parametrize(("seq", "flash"), [(6, True), (7, False)])
def test_flash_attention_without_causality_needs_even_lengths(monkeypatch, seq, flash):
    monkeypatch.setattr(_attention, "_has_cudnn", lambda: True)
    query = jnp.zeros((1, seq, 2, 64), "bfloat16")
    assert _attention._flash_applies(query, Sight(None, False, None)) is flash


@pytest.mark.parametrize("seq", [6, 7])
def test_flash_attention_is_given_even_lengths(monkeypatch, seq):
    plain, given = jax.nn.dot_product_attention, []

    def even_only(query, key, value, *, implementation, **kwargs):
        given.append((query.shape[1], key.shape[1], implementation))
        return plain(query, key, value, implementation="xla", **kwargs)

    draw = np.random.default_rng(0)
    q, k, v = (jnp.asarray(draw.normal(size=(1, seq, 2, 8)), "f4") for _ in range(3))
    sight = Sight(None, True, 3)
    wanted = attend(q, k, v, sight, scale=0.5, backend="xla")
    monkeypatch.setattr(jax.nn, "dot_product_attention", even_only)
    padded = attend(q, k, v, sight, scale=0.5, backend="cudnn")
    assert given == [(seq + seq % 2, seq + seq % 2, "cudnn")]
    np.testing.assert_allclose(padded, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("backend", "capability", "found"),
    [
        ("cpu", "9.0", False),
        ("gpu", "9.0", True),
        ("gpu", "7.5", False),
        ("gpu", "gfx942", False),
    ],
)
def test_cudnn_needs_an_ampere_or_later(monkeypatch, backend, capability, found):
    class Device:
        compute_capability = capability

    monkeypatch.setattr(_attention.jax, "default_backend", lambda: backend)
    monkeypatch.setattr(_attention.jax, "devices", lambda: [Device()])
    assert _attention._has_cudnn() is found
