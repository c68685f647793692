"""`export_merged`: the bytes of an in-memory merge, without the memory."""

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lorax_jax as lj
from lorax_jax import models
from lorax_jax._errors import AdapterError, CheckpointError
from lorax_jax.adapters import Fixed, Role
from lorax_jax.checkpoint import _export, _stream

FAMILIES = ["llama", "tied", "gpt2"]


def tensors_of(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def same_bytes(one, other):
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and one[k].tobytes() == other[k].tobytes()
        for k in one
    )


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


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


@pytest.mark.parametrize("use", ["lookup", "head"])
@pytest.mark.parametrize("family", ["tied", "gpt2"])
@pytest.mark.parametrize("form", ["adapter", "ours", "peft"])
def test_one_use_of_a_tied_table_unties_it(
    make, base_folder, peft_made, table_rule, tmp_path, family, use, form
):
    made = make(family, rules=table_rule(family, tie=use) | {r".*/0/mlp/.*kernel": {}})
    base, out = base_folder(made), tmp_path / "out"
    adapter, names = made.adapter, made.names
    if form != "adapter":
        adapter, names = made.save(tmp_path / "a"), None
    if form == "peft":
        adapter = peft_made(adapter, tmp_path / "b")
    done = lj.export_merged(base, adapter, out, names=names)
    assert done.untied and config_of(out)["tie_word_embeddings"] is False
    table = (
        "transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"
    )
    old, new = tensors_of(base), tensors_of(out)
    changed = {"lookup": table, "head": "lm_head.weight"}[use]
    kept = {"lookup": "lm_head.weight", "head": table}[use]
    assert new[kept].tobytes() == old[table].tobytes()
    assert new[changed].tobytes() != old[table].tobytes()
    assert changed in done.merged and kept not in done.merged
    model, params = models.load(out)
    ids = np.arange(7, dtype=np.int32)[None]
    bound = lj.bind(made.params, made.adapter)
    ours = lj.adapt(made.model.apply)(bound, ids)
    np.testing.assert_allclose(model.apply(params, ids), ours, atol=1e-5)


def test_a_shared_adapter_beside_one_of_the_head(
    make, base_folder, table_rule, tmp_path
):
    """The table gets the one, the head both."""
    shared = make("tied", rules=table_rule("tied", tie="shared"))
    head = make("tied", rules=table_rule("tied", tie="head"))
    base, out = base_folder(shared), tmp_path / "out"
    adapters = [shared.adapter, head.adapter]
    done = lj.export_merged(base, adapters, out, names=shared.names)
    assert done.untied
    model, params = models.load(out)
    ids = np.arange(7, dtype=np.int32)[None]
    ours = lj.adapt(shared.model.apply)(lj.bind(shared.params, *adapters), ids)
    np.testing.assert_allclose(model.apply(params, ids), ours, atol=1e-4, rtol=1e-5)


def test_some_layers_of_a_stack(make, base_folder, tmp_path):
    rules = {"layers/1/mlp/up_proj/kernel": {}}
    made = make("llama", scan=True, rules=rules)
    base = base_folder(make("llama"))
    done = lj.export_merged(base, made.adapter, tmp_path / "out", names=made.names)
    assert done.merged == ("model.layers.1.mlp.up_proj.weight",)


def test_a_redundant_copy_of_a_tied_table(make, base_folder, table_rule, tmp_path):
    """Some checkpoints hold the head although it is tied."""
    base = tmp_path / "base"
    made = make("tied", rules=table_rule("tied", tie="shared"))
    shutil.copytree(base_folder(made), base)
    tensors = tensors_of(base)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    lj.export_merged(base, made.adapter, tmp_path / "out", names=made.names)
    found = tensors_of(tmp_path / "out")
    table = "model.embed_tokens.weight"
    assert found["lm_head.weight"].tobytes() == found[table].tobytes()
    assert found[table].tobytes() != tensors[table].tobytes()
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True
    models.load(tmp_path / "out")  # which looks whether the two agree
    head = make("tied", rules=table_rule("tied", tie="head"))
    folder = head.save(tmp_path / "adapter")
    for adapter, names in ((head.adapter, made.names), (folder, None)):
        lj.export_merged(base, adapter, tmp_path / "head", names=names)
        found = tensors_of(tmp_path / "head")
        assert found[table].tobytes() == tensors[table].tobytes()
        assert found["lm_head.weight"].tobytes() != tensors[table].tobytes()
        assert config_of(tmp_path / "head")["tie_word_embeddings"] is False


def test_a_shared_adapter_on_an_untied_checkpoint(
    make, base_folder, table_rule, tmp_path
):
    """As PEFT does: each of the two modules gets its copy."""
    made = make("tied", rules=table_rule("tied", tie="shared"))
    untied = make("llama")
    base = base_folder(untied)
    folder = made.save(tmp_path / "a")
    done = lj.export_merged(base, folder, tmp_path / "out")
    assert set(done.merged) == {"model.embed_tokens.weight", "lm_head.weight"}
    old, new = tensors_of(base), tensors_of(tmp_path / "out")
    deltas = [new[name] - old[name] for name in done.merged]
    np.testing.assert_allclose(*deltas, atol=1e-5)


def test_a_checkpoint_without_its_head(make, base_folder, table_rule, tmp_path):
    made = make("gpt2")
    base = tmp_path / "base"
    shutil.copytree(base_folder(made), base)
    bare = {k.removeprefix("transformer."): v for k, v in tensors_of(base).items()}
    save_file(bare, base / "model.safetensors")
    wanted = models.to_hf(made.model, lj.merge(made.params, made.adapter))
    wanted = {k.removeprefix("transformer."): v for k, v in wanted.items()}
    folder = made.save(tmp_path / "a")
    for adapter, names in (
        (made.adapter, made.names),
        (folder, None),
        (folder, made.names),
    ):
        lj.export_merged(base, adapter, tmp_path / "out", names=names)
        assert same_bytes(tensors_of(tmp_path / "out"), wanted)
    head = make("gpt2", rules=table_rule("gpt2", tie="head"))
    with pytest.raises(CheckpointError, match="is a checkpoint without a head"):
        lj.export_merged(base, head.adapter, tmp_path / "other", names=made.names)
    assert not (tmp_path / "other").exists()


def test_a_model_that_has_no_head(tmp_path):
    """An encoder's table is not tied to anything."""
    table = np.ones((9, 4), np.float32)
    save_file(
        {"embeddings.word_embeddings.weight": table}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    params = {"table": jnp.asarray(table)}
    plan = lj.plan(
        lj.LoraConfig("table", rank=2, init=False),
        params,
        lambda p, i: p["table"][i],
        (jnp.zeros(3, int),),
    )
    adapter = lj.init(plan, params, key=jax.random.key(0))
    names = [("table", "embeddings.word_embeddings.weight", "same")]
    folder = tmp_path / "adapter"
    lj.save_adapter(folder, adapter, plan=plan, names=names)
    (folder / "adapter_model.safetensors").rename(folder / "old")
    save_file(load_file(folder / "old"), folder / "adapter_model.safetensors")
    base = tmp_path / "base"
    base.mkdir()
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).rename(base / name)
    done = lj.export_merged(base, folder, tmp_path / "out")
    assert done.merged == ("embeddings.word_embeddings.weight",) and not done.untied
    assert "tie_word_embeddings" not in config_of(tmp_path / "out")


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


def test_experts(tmp_path, make, base_folder):
    role = Role("w", (1,), (2,), (0,))
    fixed = Fixed(role, {"scale": jnp.ones(()), "rank": jnp.asarray(2)})
    train = {"a": jnp.ones((3, 4, 2)), "b": jnp.ones((3, 2, 5))}
    adapter = lj.Adapter({"w": train}, {"w": fixed})
    names = [("w", "w.weight", "same")]
    with pytest.raises(AdapterError, match="for each of 3 experts, or indices of a"):
        lj.export_merged(
            base_folder(make("llama")), adapter, tmp_path / "out", names=names
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


# --- Memory ---------------------------------------------------------------------------


def big(tmp_path, dtype, shapes):
    """A checkpoint of some large tensors, and an adapter of all of them."""
    draw = np.random.default_rng(0)
    names, train, fixed, where = [], {}, {}, {}
    for i, (shape, layout) in enumerate(shapes):
        file = f"model-{i + 1:05d}-of-{len(shapes):05d}.safetensors"
        tensor = draw.standard_normal(shape, np.float32).astype(dtype)
        save_file({f"m{i}.weight": tensor}, tmp_path / file)
        where[f"m{i}.weight"] = file
        names.append((f"m{i}", f"m{i}.weight", layout))
        d_in, d_out = shape if layout == "same" else shape[::-1]
        train[f"m{i}"] = {
            "a": jnp.asarray(draw.standard_normal((d_in, 8), np.float32)),
            "b": jnp.asarray(draw.standard_normal((8, d_out), np.float32)),
        }
        fixed[f"m{i}"] = Fixed(
            Role(f"m{i}", (0,), (1,)),
            {"scale": jnp.float32(0.5), "rank": jnp.asarray(8, jnp.int32)},
        )
    (tmp_path / "config.json").write_text("{}")
    index = {"metadata": {}, "weight_map": where}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return names, lj.Adapter(train, fixed)


SHAPES = [((2048, 1100), "linear"), ((5000, 512), "same"), ((700, 2048), "linear")]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_large_tensors_one_at_a_time_and_still_the_same_bytes(tmp_path, dtype):
    base = tmp_path / "base"
    base.mkdir()
    names, adapter = big(base, dtype, SHAPES)
    largest = max(np.prod(shape) for shape, _ in SHAPES) * np.dtype(dtype).itemsize
    lj.export_merged(base, adapter, tmp_path / "warm", names=names)
    tracemalloc.start()
    lj.export_merged(base, adapter, tmp_path / "out", names=names)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = sum(x.nbytes for x in jax.tree.leaves(adapter.train))
    assert peak < 2 * largest + size
    old, new = tensors_of(base), tensors_of(tmp_path / "out")
    for (name, tensor, layout), (shape, _) in zip(names, SHAPES, strict=True):
        blocks = list(_stream._blocks(shape if layout == "same" else shape[::-1]))
        assert len(blocks) > 2
        kernel = old[tensor] if layout == "same" else old[tensor].T
        part = lj.Adapter({name: adapter.train[name]}, {name: adapter.fixed[name]})
        merged = np.asarray(lj.merge({name: jnp.asarray(kernel)}, part)[name])
        merged = merged if layout == "same" else merged.T
        assert new[tensor].tobytes() == np.ascontiguousarray(merged).tobytes()


_RESIDENT = """
    import resource, sys, threading, time
    import jax, jax.numpy as jnp, numpy as np
    import lorax_jax as lj
    from lorax_jax.adapters import Fixed, Role

    base, warm, out = sys.argv[1:]
    names = [("m", "m.weight", "linear")]
    draw = np.random.default_rng(0)
    a = jnp.asarray(draw.standard_normal((4096, 8), np.float32))
    b = jnp.asarray(draw.standard_normal((8, 4096), np.float32))
    values = {"scale": jnp.float32(1), "rank": jnp.asarray(8, jnp.int32)}
    fixed = Fixed(Role("m", (0,), (1,)), values)
    adapter = lj.Adapter({"m": {"a": a, "b": b}}, {"m": fixed})

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    peak, done = [0], []
    def watch():
        while not done:
            peak[0] = max(peak[0], resident())
            time.sleep(0.001)

    lj.export_merged(base, adapter, warm, names=names)  # compiled by now
    before = resident()
    thread = threading.Thread(target=watch)
    thread.start()
    lj.export_merged(base, adapter, out, names=names)
    done.append(1)
    thread.join()
    print(peak[0] - before)
"""


@pytest.mark.skipif(
    not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc"
)
def test_what_the_process_takes_from_the_system(tmp_path):
    """Not what Python allocates alone: the resident set, mapped files included."""
    tensor = np.ones((4096, 4096), ml_dtypes.bfloat16)
    base = tmp_path / "base"
    base.mkdir()
    save_file({"m.weight": tensor}, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    command = [sys.executable, "-c", textwrap.dedent(_RESIDENT)]
    folders = [base, tmp_path / "warm", tmp_path / "out"]
    found = subprocess.run(
        [*command, *folders], capture_output=True, text=True, check=True
    )
    assert int(found.stdout) < 2 * tensor.nbytes + 8 * 2 * 4096 * 4


def test_blocks_cover_every_row_and_are_alike():
    for shape in [(4096, 4096), (1100, 2048), (65, 1 << 20), (10, 10), (128, 1 << 16)]:
        blocks = list(_stream._blocks(shape))
        rows = {block.stop - block.start for block in blocks}
        assert len(rows) == 1 and min(rows) >= min(64, shape[0])
        covered = {i for block in blocks for i in range(block.start, block.stop)}
        assert covered == set(range(shape[0]))


def test_the_mark(make, base_folder, tmp_path):
    made = make("llama", rules={"layers/0/mlp/up_proj/kernel": {}})
    lj.export_merged(
        base_folder(made), made.adapter, tmp_path / "out", names=made.names
    )
    mark = json.loads((tmp_path / "out" / _export.MARK).read_text())
    assert mark["merged"] == ["model.layers.0.mlp.up_proj.weight"]
