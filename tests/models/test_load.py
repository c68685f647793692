"""Checkpoints: what loads, what is refused, and what comes back out."""

import json

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorax_jax import models
from lorax_jax.models import CheckpointError


@pytest.fixture
def checkpoint(tmp_path, tiny, config_of):
    """`checkpoint(name, change)`: a saved tiny model, after `change(tensors)`."""

    def make(name, change=None, shards=1, **attributes):
        tensors = models.to_hf(*tiny(name))
        if change is not None:
            tensors = change(tensors) or tensors
        config = config_of(name) | attributes
        (tmp_path / "config.json").write_text(json.dumps(config))
        if shards == 1:
            save_file(tensors, tmp_path / "model.safetensors")
            return tmp_path
        names, where = sorted(tensors), {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: tensors[name] for name in names[i::shards]}
            where |= dict.fromkeys(part, file)
            save_file(part, tmp_path / file)
        index = {"metadata": {}, "weight_map": where}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        return tmp_path

    return make


def _same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_round_trip(checkpoint, tiny, family, scan):
    folder = checkpoint(family)
    model, params = models.load(folder, scan_layers=scan)
    wanted_model, wanted = tiny(family, scan_layers=scan)
    assert model == wanted_model
    _same(params, wanted)


def test_shards(checkpoint, tiny):
    _same(models.load(checkpoint("llama3", shards=3))[1], tiny("llama3")[1])


def test_linear_kernels_are_transposed_and_gpt2s_are_not(checkpoint):
    folder = checkpoint("qwen3")
    stored = load_file(folder / "model.safetensors")
    _, params = models.load(folder)
    kernel = params["layers"]["1"]["self_attn"]["k_proj"]["kernel"]
    np.testing.assert_array_equal(
        kernel, stored["model.layers.1.self_attn.k_proj.weight"].T
    )
    folder = checkpoint("gpt2")
    stored = load_file(folder / "model.safetensors")
    _, params = models.load(folder)
    np.testing.assert_array_equal(
        params["h"]["1"]["mlp"]["c_fc"]["kernel"],
        stored["transformer.h.1.mlp.c_fc.weight"],
    )


@pytest.mark.parametrize("name", ["gpt2", "smollm2"])
def test_names_without_their_prefix(checkpoint, tiny, name):
    def strip(tensors):
        return {key.partition(".")[2]: value for key, value in tensors.items()}

    _same(models.load(checkpoint(name, strip))[1], tiny(name)[1])


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_dtype_is_the_files_unless_said_otherwise(checkpoint, stored):
    folder = checkpoint(
        "llama2", lambda t: {name: value.astype(stored) for name, value in t.items()}
    )
    model, params = models.load(folder)
    assert model.dtype == np.dtype(stored)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(stored)}
    model, params = models.load(folder, dtype="float32")
    assert model.dtype == np.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}


def test_buffers_and_a_copy_of_the_tied_head_are_ignored(checkpoint, tiny):
    def add(tensors):
        tensors["transformer.h.0.attn.bias"] = np.ones((1, 1, 8, 8), np.uint8)
        tensors["transformer.h.1.attn.masked_bias"] = np.array(-1e4, np.float32)
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()

    _same(models.load(checkpoint("gpt2", add))[1], tiny("gpt2")[1])


def test_a_hub_id_is_downloaded(checkpoint, tiny, monkeypatch):
    folder, asked = checkpoint("llama2"), {}

    def download(name, **kwargs):
        asked[name] = kwargs
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    _same(models.load("some-owner/some-model")[1], tiny("llama2")[1])
    assert "*.safetensors" in asked["some-owner/some-model"]["allow_patterns"]


def test_a_failed_download_is_one_clear_error(monkeypatch):
    def download(name, **kwargs):
        raise OSError("no route to host\nlong story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(
        CheckpointError, match="downloading it from the hub failed: OSError: no route"
    ):
        models.load("some-owner/some-model")


@pytest.mark.parametrize("where", ["nowhere", "/nowhere/at/all", "a/b/c", ""])
def test_neither_a_folder_nor_a_hub_id(where, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if where == "":
        with pytest.raises(CheckpointError, match="has no config.json"):
            models.load(where)
        return
    with pytest.raises(CheckpointError, match="neither a folder nor a hub id"):
        models.load(where)


def test_a_file_is_not_a_checkpoint(checkpoint):
    file = checkpoint("llama2") / "model.safetensors"
    with pytest.raises(CheckpointError, match="is a file; a checkpoint is a folder"):
        models.load(file)


def test_a_folder_without_a_config(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"no config.json. It holds \['notes.txt"):
        models.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{not json", "cannot be read as JSON"), ("[1]", "holds a list, not a JSON obj")],
)
def test_a_damaged_config(checkpoint, text, message):
    folder = checkpoint("llama2")
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        models.load(folder)


def test_no_safetensors(checkpoint):
    folder = checkpoint("llama2")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds neither .*pytorch_model.bin"):
        models.load(folder)


def test_a_damaged_file(checkpoint):
    folder = checkpoint("llama2")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="is not a readable safetensors file"):
        models.load(folder)


def _edited_index(folder, edit):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    edit(content)
    index.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "file", ["../evil.safetensors", "/etc/passwd", "a/b", "a\\b", "..", "C:x", "", 3]
)
def test_an_index_that_leads_elsewhere_is_refused(checkpoint, file):
    folder = _edited_index(
        checkpoint("llama2", shards=2),
        lambda index: index["weight_map"].update({"model.norm.weight": file}),
    )
    with pytest.raises(CheckpointError, match="Shards must be plain file names"):
        models.load(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda index: index.clear(), "has no `weight_map`"),
        (
            lambda index: index["weight_map"].update({"more": "gone.safetensors"}),
            "gone.safetensors does not exist",
        ),
        (
            lambda index: index["weight_map"].update(
                {"more": "model-00001-of-00002.safetensors"}
            ),
            "more lies in model-00001-of-00002.safetensors, which does not hold it",
        ),
    ],
)
def test_an_index_that_is_wrong(checkpoint, edit, message):
    folder = _edited_index(checkpoint("llama2", shards=2), edit)
    with pytest.raises(CheckpointError, match=message):
        models.load(folder)


def test_missing_unexpected_and_misshapen_tensors_are_named_together(checkpoint):
    def spoil(tensors):
        del tensors["model.layers.1.self_attn.q_proj.weight"]
        tensors["model.layers.9.extra"] = np.ones(2, np.float32)
        tensors["model.norm.weight"] = np.ones(31, np.float32)

    with pytest.raises(CheckpointError) as error:
        models.load(checkpoint("llama2", spoil))
    for line in (
        "missing     model.layers.1.self_attn.q_proj.weight",
        "unexpected  model.layers.9.extra",
        "shape       model.norm.weight is (31,), not (32,)",
    ):
        assert line in str(error.value)


def test_a_long_list_of_problems_is_cut(checkpoint):
    def spoil(tensors):
        tensors |= {f"extra.{i}": np.ones(1, np.float32) for i in range(25)}
        return tensors

    with pytest.raises(CheckpointError, match=r"\.\.\. and 5 more"):
        models.load(checkpoint("llama2", spoil))


def test_a_tied_head_that_is_not_is_refused(checkpoint):
    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    with pytest.raises(CheckpointError, match="lm_head.weight differs from model.em"):
        models.load(checkpoint("smollm2", add))


def test_quantized_tensors_are_refused(checkpoint):
    def quantize(tensors):
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].astype(np.int8)

    with pytest.raises(CheckpointError, match="up_proj.weight is stored as I8"):
        models.load(checkpoint("llama2", quantize))


def test_config_errors_come_through(checkpoint):
    with pytest.raises(models.ConfigError, match="pretraining_tp = 2"):
        models.load(checkpoint("llama2", pretraining_tp=2))


def test_the_tokenizer_beside_a_checkpoint(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "?"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    batch = models.tokenizer(tmp_path)(
        ["b a", "b"], return_tensors="np", padding=True, padding_side="left"
    )
    assert batch["input_ids"].tolist() == [[1, 0], [2, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1], [0, 1]]
