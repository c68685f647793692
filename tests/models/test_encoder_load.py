"""BERT's checkpoints: prefixes, old names, buffers, and heads that nobody asked for."""

import json

import jax
import numpy as np
import pytest
from berts import BERT, HEADS, tiny
from safetensors.numpy import save_file

from lorax_jax import models
from lorax_jax.models import CheckpointError


@pytest.fixture
def checkpoint(tmp_path):
    """`checkpoint(head, change, **attributes)`: a folder, its tensors changed."""

    def make(head, change=lambda tensors: None, **attributes):
        tensors = models.to_hf(*tiny(head))
        tensors = change(tensors) or tensors
        save_file(tensors, tmp_path / "model.safetensors")
        config = BERT | HEADS[head] | attributes
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return make


def _same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("head", HEADS)
def test_round_trip(checkpoint, head, scan):
    model, params = models.load(checkpoint(head), scan_layers=scan)
    wanted_model, wanted = tiny(head, scan)
    assert model == wanted_model
    _same(params, wanted)


def _renamed(tensors, old, new):
    return {name.replace(old, new): value for name, value in tensors.items()}


def test_layer_norms_by_their_old_names(checkpoint):
    def old(tensors):
        tensors = _renamed(tensors, "LayerNorm.weight", "LayerNorm.gamma")
        return _renamed(tensors, "LayerNorm.bias", "LayerNorm.beta")

    _same(models.load(checkpoint("masked_lm", old))[1], tiny("masked_lm")[1])


def test_a_bare_encoder_with_a_prefix(checkpoint):
    def prefixed(tensors):
        return {f"bert.{name}": value for name, value in tensors.items()}

    _same(models.load(checkpoint("bare", prefixed))[1], tiny("bare")[1])


def test_a_head_on_an_encoder_without_a_prefix(checkpoint):
    def bare(tensors):
        return _renamed(tensors, "bert.", "")

    _same(models.load(checkpoint("classifier", bare))[1], tiny("classifier")[1])


def test_buffers_copies_and_other_heads_are_ignored(checkpoint):
    """As `bert-base-uncased` has them: pooler and next-sentence head, unused."""

    def add(tensors):
        table = tensors["bert.embeddings.word_embeddings.weight"]
        return tensors | {
            "bert.embeddings.position_ids": np.arange(16)[None],
            "cls.predictions.decoder.weight": table.copy(),
            "cls.predictions.decoder.bias": tensors["cls.predictions.bias"].copy(),
            "bert.pooler.dense.weight": np.ones((32, 32), np.float32),
            "bert.pooler.dense.bias": np.ones(32, np.float32),
            "cls.seq_relationship.weight": np.ones((2, 32), np.float32),
            "cls.seq_relationship.bias": np.ones(2, np.float32),
        }

    model, params = models.load(checkpoint("masked_lm", add))
    assert model == tiny("masked_lm")[0]
    _same(params, tiny("masked_lm")[1])


def test_the_encoder_of_a_masked_lm(checkpoint):
    folder = checkpoint("masked_lm", architectures=["BertModel"])
    model, params = models.load(folder)
    assert model.config.head is None and not model.config.pooler
    whole = tiny("masked_lm")[1]
    _same(params, {key: whole[key] for key in ("embeddings", "encoder")})


def test_half_a_pooler_is_noticed(checkpoint):
    def halve(tensors):
        del tensors["pooler.dense.bias"]

    with pytest.raises(CheckpointError, match="missing     pooler.dense.bias"):
        models.load(checkpoint("bare", halve))


@pytest.mark.parametrize("copy", ["decoder.weight", "decoder.bias"])
def test_a_tied_head_that_is_not_is_refused(checkpoint, copy):
    original = {
        "decoder.weight": "bert.embeddings.word_embeddings.weight",
        "decoder.bias": "cls.predictions.bias",
    }[copy]

    def add(tensors):
        tensors[f"cls.predictions.{copy}"] = tensors[original] + 1

    with pytest.raises(CheckpointError, match=f"{copy} differs from {original}"):
        models.load(checkpoint("masked_lm", add))


def test_missing_and_unexpected_tensors_are_named(checkpoint):
    def spoil(tensors):
        del tensors["bert.encoder.layer.1.attention.self.query.weight"]
        tensors["bert.encoder.layer.2.extra"] = np.ones(2, np.float32)

    with pytest.raises(CheckpointError) as error:
        models.load(checkpoint("classifier", spoil))
    for line in (
        "missing     bert.encoder.layer.1.attention.self.query.weight",
        "unexpected  bert.encoder.layer.2.extra",
    ):
        assert line in str(error.value)
