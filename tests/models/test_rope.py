"""Rotary frequencies, tables and rotation against their definitions."""

import jax.numpy as jnp
import numpy as np
import pytest

from lorax_jax.models import ConfigError
from lorax_jax.models._rope import (
    Rope,
    frequencies,
    rope_from_hf,
    rope_tables,
    rotate,
)


def test_linear_divides_every_frequency():
    plain = frequencies(Rope(10000.0), 16)
    np.testing.assert_allclose(
        frequencies(Rope(10000.0, "linear", factor=4.0), 16), plain / 4
    )


def test_llama3_keeps_fast_divides_slow_and_blends_between():
    rope = Rope(
        500.0,
        "llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_length=64,
    )
    ratio = frequencies(rope, 32) / frequencies(Rope(500.0), 32)
    assert ratio[0] == 1.0
    assert ratio[-1] == 1 / 8
    assert ((ratio > 1 / 8) & (ratio < 1)).any()
    assert (np.diff(ratio) <= 0).all()


def test_rotation_is_complex_multiplication():
    rope, positions = Rope(100.0), jnp.array([[0, 1, 7]])
    x = np.random.default_rng(0).normal(size=(1, 3, 2, 8)).astype(np.float32)
    angle = np.asarray(positions)[:, :, None, None] * frequencies(rope, 8)
    wanted = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)
    tables = rope_tables(rope, positions, 8, jnp.dtype("float32"))
    turned = rotate(jnp.asarray(x), tables)
    np.testing.assert_allclose(
        turned, np.concatenate([wanted.real, wanted.imag], axis=-1), atol=1e-6
    )


def test_tables_are_computed_in_float32_whatever_their_dtype():
    rope, positions = Rope(10000.0), jnp.array([[4097]])  # bf16 has no 4097
    low = rope_tables(rope, positions, 8, jnp.dtype("bfloat16"))
    high = rope_tables(rope, positions, 8, jnp.dtype("float32"))
    assert low[0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(low[0], high[0].astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0},
            "rope_type = 'yarn'; the types here are default, linear, llama3",
        ),
        (
            {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            "holds {'partial_rotary_factor': 0.5}, which is not implemented",
        ),
        (
            {"rope_type": "linear", "rope_theta": 1e4},
            r"of type 'linear' lacks \['factor'\]",
        ),
    ],
)
def test_other_ropes_are_refused(parameters, message):
    with pytest.raises(ConfigError, match=message):
        rope_from_hf(parameters)
