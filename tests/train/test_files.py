"""What a run leaves behind for people: the history and the curve."""

import json

import numpy as np
import pytest
from PIL import Image

from lorax_jax.train import plot_history, write_history
from lorax_jax.train._plot import smoothed

HISTORY = [
    {"step": 0, "heldout_loss": 3.0, "bits_per_byte": 2.0},
    *({"step": i, "loss": 3.0 - i / 10, "grad_norm": 1.0} for i in range(1, 11)),
    {"step": 10, "heldout_loss": 2.2, "bits_per_byte": 1.5},
]


def test_the_history_is_json_lines(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text("something older\n" * 100)
    write_history(path, HISTORY)
    assert [json.loads(line) for line in path.read_text().splitlines()] == HISTORY
    assert [p.name for p in tmp_path.iterdir()] == ["history.jsonl"]


@pytest.mark.parametrize("history", [HISTORY, HISTORY[:1], HISTORY[1:3], []])
def test_the_curve_is_a_picture(tmp_path, history):
    plot_history(history, tmp_path / "loss.png", title="a run")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.format == "PNG" and image.size == (960, 540)


def test_smoothing_averages_and_does_not_lag():
    line = np.linspace(3.0, 1.0, 1000)
    noise = np.random.default_rng(0).normal(size=1000)
    np.testing.assert_allclose(smoothed(line)[50:-50], line[50:-50])
    assert np.abs(smoothed(line + noise) - line).max() < 0.6
