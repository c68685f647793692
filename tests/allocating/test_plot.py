"""Spectra and ranks as a picture."""

import jax.numpy as jnp
import pytest

import lorax_jax as lj
from lorax_jax.errors import PlanError


@pytest.fixture
def plan():
    params = {str(i): {"w": jnp.ones((5, 4))} for i in range(2)}
    roles = {f"{i}/w": {"inputs": (0,), "outputs": (1,)} for i in range(2)}
    return lj.plan(lj.LoraConfig(r"\d/w", rank=2), params, roles=roles)


def test_a_png(plan, tmp_path, relaxed):
    spectra = {"0/w": [4.0, 2.0, 1.0], "1/w": [9.0, 0.0]}
    given = tmp_path / "given.png"
    lj.plot_spectra(plan, given, spectra=spectra, title="two layers")
    kept = tmp_path / "kept.png"
    lj.plot_spectra(lj.allocate(plan, spectra, ranks=3), kept)
    for path in (given, kept):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    assert given.read_bytes() != kept.read_bytes()


def test_refuses_without_spectra(plan, tmp_path):
    with pytest.raises(PlanError, match="no spectra to draw. Give `spectra="):
        lj.plot_spectra(plan, tmp_path / "x.png")
    with pytest.raises(PlanError, match="given for 'w', which is no site"):
        lj.plot_spectra(plan, tmp_path / "x.png", spectra={"w": [1.0]})
