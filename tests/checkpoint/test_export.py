"""`export_merged`: the bytes of an in-memory merge, without the memory."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from folders import config_of, same_bytes, tensors_of
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lorax_jax as lj
from lorax_jax import models
from lorax_jax._errors import CheckpointError

FAMILIES = ["llama", "tied", "gpt2"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_the_bytes_of_an_in_memory_merge(
    make, base_folder, tmp_path, family, dtype, shards
):
    made = make(family, dtype=dtype)
    base = base_folder(made, shards)
    done = lj.export_merged(base, made.adapter, tmp_path / "out", names=made.names)
    wanted = models.to_hf(made.model, lj.merge(made.params, made.adapter))
    found = tensors_of(tmp_path / "out")
    assert same_bytes(found, wanted)
    assert set(done.merged) == {
        name
        for name in wanted
        if wanted[name].tobytes() != tensors_of(base)[name].tobytes()
    }
    assert len(done.merged) == len(made.plan) and not done.untied
    assert done.copied == len(wanted) - len(done.merged)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_of_an_adapter_gives_the_same(
    make, base_folder, peft_made, table_rule, tmp_path, family
):
    tie = {} if family == "llama" else {"tie": "shared"}
    rules = {r"(layers|h)/./.*kernel": {}} | table_rule(family, **tie)
    made, scanned = make(family, rules=rules), make(family, rules=rules, scan=True)
    base = base_folder(made)
    ours = made.save(tmp_path / "ours", params=made.params)
    paths = made.save(tmp_path / "paths", names=None)
    peft = peft_made(ours, tmp_path / "peft")
    forms = {
        "adapter": (made.adapter, made.names),
        "stacked": (scanned.adapter, made.names),
        "ours": (ours, None),
        "ours with names": (ours, made.names),
        "paths": (paths, made.names),
        "peft": (peft, None),
        "peft with names": (peft, made.names),
    }
    wanted = models.to_hf(made.model, lj.merge(made.params, made.adapter))
    for form, (adapter, names) in forms.items():
        done = lj.export_merged(base, adapter, tmp_path / f"out {form}", names=names)
        assert same_bytes(tensors_of(tmp_path / f"out {form}"), wanted), form
        assert len(done.merged) == len(made.plan) and not done.untied
        assert config_of(tmp_path / f"out {form}") == config_of(base)


def test_files_are_as_they_were(make, base_folder, tmp_path):
    made = make("llama")
    base = tmp_path / "base"
    shutil.copytree(base_folder(made, 3), base)
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    (base / "1_Pooling" / "pytorch_model.bin").write_text("")
    (base / "pytorch_model.bin").write_text("old weights")
    (base / ".cache").mkdir()
    out = tmp_path / "out"
    lj.export_merged(base, made.adapter, out, names=made.names)
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) == [
        "1_Pooling/config.json",
        "LICENSE",
        "config.json",
        "lorax_jax_export.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    for name in ("config.json", "tokenizer.json", "LICENSE"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    one, other = (
        json.loads((f / "model.safetensors.index.json").read_text())
        for f in (base, out)
    )
    assert one == other
    for file in set(one["weight_map"].values()):
        with safe_open(base / file, "np") as old, safe_open(out / file, "np") as new:
            assert list(old.keys()) == list(new.keys())
            assert old.metadata() == new.metadata() == {"format": "pt"}
    models.load(out)  # it is a checkpoint


def test_the_base_is_not_touched(make, base_folder, tmp_path):
    made = make("tied")
    base = base_folder(made)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in base.iterdir()}
    lj.export_merged(base, made.adapter, tmp_path / "out", names=made.names)
    assert before == {
        p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in base.iterdir()
    }


def test_some_layers_of_a_stack(make, base_folder, tmp_path):
    rules = {"layers/1/mlp/up_proj/kernel": {}}
    made = make("llama", scan=True, rules=rules)
    base = base_folder(make("llama"))
    done = lj.export_merged(base, made.adapter, tmp_path / "out", names=made.names)
    assert done.merged == ("model.layers.1.mlp.up_proj.weight",)


def test_several_adapters_and_weights(make, base_folder, tmp_path):
    made, other = make("llama"), make("llama", rules={".*/mlp/.*kernel": {}})
    base = base_folder(made)
    folder = other.save(tmp_path / "b")
    adapters, weights = [made.adapter, folder], [0.5, -1.25]
    lj.export_merged(
        base, adapters, tmp_path / "out", names=made.names, weights=weights
    )
    merged = lj.merge(made.params, made.adapter, other.adapter, weights=weights)
    assert same_bytes(tensors_of(tmp_path / "out"), models.to_hf(made.model, merged))
    lj.export_merged(base, folder, tmp_path / "half", weights=0.5)
    half = lj.merge(made.params, other.adapter, weights=[0.5])
    assert same_bytes(tensors_of(tmp_path / "half"), models.to_hf(made.model, half))
    for wrong in ([0.5], []):
        with pytest.raises(
            CheckpointError, match=f"`weights` has {len(wrong)} entries"
        ):
            lj.export_merged(
                base, adapters, tmp_path / "x", names=made.names, weights=wrong
            )
    with pytest.raises(CheckpointError, match="Give one adapter or more"):
        lj.export_merged(base, [], tmp_path / "x")


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_another_dtype(make, base_folder, tmp_path, stored, dtype):
    made = make("llama", dtype=stored)
    base, out = base_folder(made), tmp_path / "out"
    lj.export_merged(base, made.adapter, out, names=made.names, dtype=dtype)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), made.params)
    merged = models.to_hf(made.model, lj.merge(wide, made.adapter))
    wanted = {k: v.astype(jnp.dtype(dtype)) for k, v in merged.items()}
    assert same_bytes(tensors_of(out), wanted)  # rounded once
    assert config_of(out)["dtype"] == dtype


@pytest.mark.parametrize("size", [4000, "4KB", "4 kB"])
def test_the_size_of_files(make, base_folder, tmp_path, size):
    made = make("llama")
    base, out = base_folder(made), tmp_path / "out"
    lj.export_merged(base, made.adapter, out, names=made.names, max_shard_size=size)
    files = sorted(out.glob("model-*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    data = [sum(t.nbytes for t in load_file(file).values()) for file in files]
    assert len(files) > 2 and max(data) <= 4000
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(data)
    assert set(index["weight_map"].values()) == {file.name for file in files}
    wanted = models.to_hf(made.model, lj.merge(made.params, made.adapter))
    assert same_bytes(tensors_of(out), wanted)
    models.load(out)
    whole = tmp_path / "whole"
    lj.export_merged(out, made.adapter, whole, names=made.names, max_shard_size="1MiB")
    assert [f.name for f in whole.glob("*.safetensors*")] == ["model.safetensors"]


def test_tensors_of_other_kinds_are_copied(make, base_folder, tmp_path):
    made, base = make("llama"), tmp_path / "base"
    shutil.copytree(base_folder(made), base)
    more = {
        "steps": np.arange(5),
        "mask": np.array([True, False]),
        "none": np.zeros((0, 3)),
    }
    save_file(tensors_of(base) | more, base / "model.safetensors")
    lj.export_merged(
        base, made.adapter, tmp_path / "out", names=made.names, dtype="bfloat16"
    )
    found = tensors_of(tmp_path / "out")
    for name in ("steps", "mask"):
        assert (
            found[name].dtype == more[name].dtype and (found[name] == more[name]).all()
        )
    assert found["none"].dtype == ml_dtypes.bfloat16
