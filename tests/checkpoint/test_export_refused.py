"""Exports that cannot be, or are interrupted: nothing is left behind."""

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folders import config_of, same_bytes, tensors_of
from safetensors.numpy import save_file

import lorax_jax as lj
from lorax_jax import models
from lorax_jax._errors import AdapterError, CheckpointError
from lorax_jax.checkpoint import _export, _stream


@pytest.mark.parametrize("size", ["5 apples", "-3", 0, -1, "", "GB", "1..2GB", "0MB"])
def test_sizes_that_are_none(tmp_path, size):
    with pytest.raises(
        CheckpointError, match="is no number of bytes. Write e.g. '5GB'"
    ):
        lj.export_merged(tmp_path, "a", tmp_path / "out", max_shard_size=size)


# --- Where it goes -------------------------------------------------------------------


def test_folders_that_are_in_use(make, base_folder, tmp_path):
    made = make("llama")
    base = tmp_path / "base"
    shutil.copytree(base_folder(made), base)
    folder = made.save(tmp_path / "adapter")
    for out in (base, base / "out", tmp_path, folder, folder / "out"):
        for overwrite in (False, True):
            with pytest.raises(
                CheckpointError, match="are one folder, or one lies in the"
            ):
                lj.export_merged(base, folder, out, overwrite=overwrite)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"holds \['thesis.txt'\], not written"):
        lj.export_merged(base, folder, out)
    assert (out / "thesis.txt").read_text() == "years of work"
    lj.export_merged(base, folder, out, overwrite=True)
    assert not (out / "thesis.txt").exists()
    again = make("llama", rank=3)
    (out / "left over").write_text("")
    with pytest.raises(CheckpointError, match=r"holds \['left over'\], not written"):
        lj.export_merged(base, again.adapter, out, names=made.names)
    (out / "left over").unlink()
    lj.export_merged(base, again.adapter, out, names=made.names)  # an earlier export
    wanted = models.to_hf(made.model, lj.merge(made.params, again.adapter))
    assert same_bytes(tensors_of(out), wanted)


def test_an_error_leaves_nothing_behind(make, base_folder, tmp_path, monkeypatch):
    made = make("llama")
    base, out = base_folder(made), tmp_path / "out"
    lj.export_merged(base, made.adapter, out, names=made.names)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    calls = []
    real = _stream.merged

    def fail(*args):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(_stream, "merged", fail)
    with pytest.raises(CheckpointError, match="The disk is full: .* as it was"):
        lj.export_merged(base, make("llama", rank=3).adapter, out, names=made.names)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert os.listdir(tmp_path) == ["out"]


def test_a_disk_that_is_too_small(make, base_folder, tmp_path, monkeypatch):
    made = make("llama")
    base = base_folder(made)
    monkeypatch.setattr("shutil.disk_usage", lambda p: type("U", (), {"free": 99}))
    with pytest.raises(
        CheckpointError, match="needs .* bytes, and its disk has 99 free"
    ):
        lj.export_merged(base, made.adapter, tmp_path / "out", names=made.names)
    assert not list(tmp_path.iterdir())


_KILLED = """
    import os, signal, sys
    import lorax_jax as lj
    from lorax_jax.checkpoint import _stream

    base, adapter, out = sys.argv[1:]
    calls, real = [], _stream.merged
    def merged(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)
    _stream.merged = merged
    lj.export_merged(base, adapter, out, overwrite=True)
"""


def test_a_kill_in_the_middle(make, base_folder, tmp_path):
    made = make("llama")
    folder, out = made.save(tmp_path / "a"), tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    command = [sys.executable, "-c", textwrap.dedent(_KILLED)]
    done = subprocess.run([*command, base_folder(made), folder, out], check=False)
    assert done.returncode == -9
    assert os.listdir(out) == ["old"]


# --- What does not fit ----------------------------------------------------------------


def test_names_are_needed_for_paths(make, base_folder, tmp_path):
    made = make("llama")
    base, out = base_folder(made), tmp_path / "out"
    with pytest.raises(
        CheckpointError, match="An `Adapter` names paths, .* Give `names`"
    ):
        lj.export_merged(base, made.adapter, out)
    paths = made.save(tmp_path / "paths", names=None)
    with pytest.raises(CheckpointError, match="The keys of .* are paths. Give `names`"):
        lj.export_merged(base, paths, out)
    fewer = [entry for entry in made.names if "up_proj" not in entry[0]]
    with pytest.raises(CheckpointError, match="`names` has no tensor for .*up_proj"):
        lj.export_merged(base, made.adapter, out, names=fewer)
    assert not out.exists()


def test_another_base(make, base_folder, peft_made, tmp_path):
    made, other = make("llama"), make("gpt2")
    base = base_folder(other)
    with pytest.raises(CheckpointError, match="changes model.layers.0.* does not have"):
        lj.export_merged(base, made.adapter, tmp_path / "out", names=made.names)
    folder = made.save(tmp_path / "a", params=made.params)
    with pytest.raises(
        CheckpointError, match="unexpected  base_model.model.model.layers"
    ):
        lj.export_merged(base, folder, tmp_path / "out")
    changed = tmp_path / "changed"
    shutil.copytree(base_folder(made), changed)
    tensors = {k: v * 1.1 for k, v in tensors_of(changed).items()}
    save_file(tensors, changed / "model.safetensors")
    for names in (None, made.names):
        with pytest.raises(
            CheckpointError, match="is not the weight that the adapter was"
        ):
            lj.export_merged(changed, folder, tmp_path / "out", names=names)
    wide = make("llama", rules={".*/up_proj/kernel": {}})
    tensors["model.layers.0.mlp.up_proj.weight"] = np.ones((3, 3), np.float32)
    save_file(tensors, changed / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"has the shape \(24, 16\), and .* \(3, 3\)"
    ):
        lj.export_merged(changed, wide.adapter, tmp_path / "out", names=made.names)
    folder = peft_made(wide.save(tmp_path / "w"), tmp_path / "p")
    with pytest.raises(
        CheckpointError, match=r"up_proj.lora_A.weight is \(4, 16\), not"
    ):
        lj.export_merged(changed, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_lacks_a_tensor(make, base_folder, peft_made, tmp_path):
    made = make("llama")
    base = base_folder(made)
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    folder = peft_made(made.save(tmp_path / "a"), tmp_path / "b", lambda t: t.pop(key))
    with pytest.raises(CheckpointError, match=f"missing     {key}"):
        lj.export_merged(base, folder, tmp_path / "out")


def test_nan_is_refused_unless_wanted(make, base_folder, tmp_path):
    made = make("llama")
    base, out = base_folder(made), tmp_path / "out"
    train = jax.tree.map(lambda x: x * np.float32(np.inf), made.adapter.train)
    adapter = made.adapter._replace(train=train)
    with pytest.raises(AdapterError, match="gives NaN or infinity"):
        lj.export_merged(base, adapter, out, names=made.names)
    assert not out.exists()
    lj.export_merged(base, adapter, out, names=made.names, safe=False)


def test_arrays_of_no_kind(make, base_folder, tmp_path):
    made = make("llama")
    name = next(iter(made.adapter.train))
    train = made.adapter.train | {
        name: made.adapter.train[name] | {"rows": jnp.ones(2)}
    }
    with pytest.raises(AdapterError, match=r"holds \['rows'\], of which .*'lora'"):
        lj.export_merged(
            base_folder(made),
            made.adapter._replace(train=train),
            tmp_path / "out",
            names=made.names,
        )


def test_what_is_no_models_folder(make, tmp_path):
    made, out = make("llama"), tmp_path / "out"

    def export(base, message):
        with pytest.raises(CheckpointError, match=message):
            lj.export_merged(base, made.adapter, out, names=made.names)

    base = tmp_path / "base"
    export(base, "is not a model's folder: it has no config.json")
    base.mkdir()
    (base / "config.json").write_text("{}")
    export(base, "holds neither model.safetensors nor model.safetensors.index.json")
    index = base / "model.safetensors.index.json"
    index.write_text("{}")
    export(base, "has no `weight_map`")
    for file in (
        "../x.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "x.bin",
        3,
        "..",
    ):
        index.write_text(json.dumps({"weight_map": {"w": file}}))
        export(base, "a path is refused, since it could lead anywhere")
    index.write_text(json.dumps({"weight_map": {"w": "x.safetensors"}}))
    export(base, "cannot be read")
    save_file({"other": np.ones(2, np.float32)}, base / "x.safetensors")
    export(base, "and the shards disagree about 2 tensors, such as 'other' in x.safe")
    (base / "config.json").write_text("[]")
    export(base, "holds a list, not a JSON object")
    assert not out.exists()


def test_infinities_in_a_models_configuration(make, base_folder, tmp_path):
    made, base = make("llama"), tmp_path / "base"
    shutil.copytree(base_folder(made), base)
    text = json.dumps(config_of(base) | {"time_step_limit": [0.0, float("inf")]})
    (base / "config.json").write_text(text)
    lj.export_merged(base, made.adapter, tmp_path / "out", names=made.names)
    assert (tmp_path / "out" / "config.json").read_text() == text


def test_the_mark(make, base_folder, tmp_path):
    made = make("llama", rules={"layers/0/mlp/up_proj/kernel": {}})
    lj.export_merged(
        base_folder(made), made.adapter, tmp_path / "out", names=made.names
    )
    mark = json.loads((tmp_path / "out" / _export.MARK).read_text())
    assert mark["merged"] == ["model.layers.0.mlp.up_proj.weight"]
