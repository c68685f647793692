"""Arrays that lie in other ways than most: whatever the table and the roles say."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorax_jax as lj
from lorax_jax._errors import AdapterError, CheckpointError

DRAW = np.random.default_rng(0)


def weight(*shape):
    return jnp.asarray(DRAW.normal(0, 1, shape), jnp.float32)


# Kernels as torch has them, (d_out, d_in), in a model of ours: one wide, one square.
PARAMS = {"wide": weight(6, 4), "square": weight(4, 4)}
NAMES = [("wide", "m.wide.weight", "same"), ("square", "m.square.weight", "same")]
# The same arrays, in a checkpoint that keeps them as GPT-2's Conv1D does.
TURNED = [(ours, theirs, "linear") for ours, theirs, _ in NAMES]


def fn(params, x):
    return x @ params["square"].T @ params["wide"].T


def planned(targets):
    config = lj.LoraConfig(targets, rank=2, init=False)
    plan = lj.plan(config, PARAMS, fn, (jnp.ones(4),))
    assert all(site.role.inputs == (1,) for site in plan)
    return plan, lj.init(plan, PARAMS, key=jax.random.key(0))


def without_metadata(folder):
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path)
    return folder


def same(one, other):
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


@pytest.mark.parametrize(("names", "conv1d"), [(NAMES, False), (TURNED, True)])
def test_what_peft_is_told(tmp_path, names, conv1d):
    plan, adapter = planned(["wide", "square"])
    lj.save_adapter(tmp_path, adapter, plan=plan, names=names)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is conv1d
    found = load_file(tmp_path / "adapter_model.safetensors")
    stem = "base_model.model.m.wide.lora_"
    assert found[f"{stem}A.weight"].shape == (2, 4)  # (rank, d_in)
    assert found[f"{stem}B.weight"].shape == (6, 2)  # (d_out, rank)


def test_a_kernel_that_is_not_square_tells_for_all(tmp_path):
    plan, adapter = planned(["wide", "square"])
    lj.save_adapter(tmp_path, adapter, plan=plan, names=NAMES)
    without_metadata(tmp_path)
    loaded, receipt = lj.load_adapter(tmp_path, PARAMS, names=NAMES)
    assert same(loaded, adapter)
    assert {site.role for site in receipt.plan} == {site.role for site in plan}


def test_a_square_kernel_alone_asks_for_the_plan(tmp_path):
    plan, adapter = planned(["square"])
    lj.save_adapter(tmp_path, adapter, plan=plan, names=NAMES)
    without_metadata(tmp_path)
    with pytest.raises(
        CheckpointError, match="'m.square' is square, .* Give the `plan`"
    ):
        lj.load_adapter(tmp_path, PARAMS, names=NAMES)
    loaded, _ = lj.load_adapter(tmp_path, PARAMS, names=NAMES, plan=plan)
    assert same(loaded, adapter)


def test_kernels_that_contradict_each_other(tmp_path):
    params = {"a": weight(6, 4), "b": weight(6, 4), "c": weight(4, 4)}
    roles = {
        "a": {"inputs": (0,), "outputs": (1,)},
        "b": {"inputs": (1,), "outputs": (0,)},
        "c": {"inputs": (0,), "outputs": (1,)},
    }
    plan = lj.plan(lj.LoraConfig(["a", "b", "c"], rank=2), params, roles=roles)
    adapter = lj.init(plan, params, key=jax.random.key(0))
    names = [(name, f"{name}.weight", "same") for name in params]
    lj.save_adapter(tmp_path, adapter, plan=plan, names=names)
    assert same(lj.load_adapter(tmp_path, params)[0], adapter)  # the metadata says
    without_metadata(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be told. Give the `plan`"):
        lj.load_adapter(tmp_path, params, names=names)


def test_a_linear_kernel_that_lies_the_other_way(tmp_path):
    plan, adapter = planned(["wide"])
    lj.save_adapter(tmp_path, adapter, plan=plan, names=TURNED)
    without_metadata(tmp_path)
    with pytest.raises(CheckpointError, match=r"wide.lora_A.weight is \(2, 4\), not"):
        lj.load_adapter(tmp_path, PARAMS, names=TURNED)
    loaded, _ = lj.load_adapter(tmp_path, PARAMS, names=TURNED, plan=plan)
    assert same(loaded, adapter)


@pytest.mark.parametrize("names", [NAMES, TURNED], ids=["same", "linear"])
@pytest.mark.parametrize("targets", [["wide"], ["square"], ["wide", "square"]])
def test_merging(tmp_path, names, targets):
    plan, adapter = planned(targets)
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")

    def theirs(params):
        turned = names is TURNED
        return {
            f"m.{name}.weight": np.ascontiguousarray(leaf.T if turned else leaf)
            for name, leaf in params.items()
        }

    save_file(theirs(PARAMS), base / "model.safetensors")
    lj.export_merged(base, adapter, tmp_path / "out", names=names)
    lj.save_adapter(tmp_path / "a", adapter, plan=plan, names=names, params=PARAMS)
    lj.export_merged(base, tmp_path / "a", tmp_path / "named", names=names)
    lj.export_merged(base, tmp_path / "a", tmp_path / "alone")
    wanted = theirs(lj.merge(PARAMS, adapter))
    for out in ("out", "named", "alone"):
        found = load_file(tmp_path / out / "model.safetensors")
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-6)


def test_axes_that_alternate(tmp_path):
    params = {"w": weight(4, 3, 4)}
    role = {"w": {"inputs": (0, 2), "outputs": (1,)}}
    plan = lj.plan(lj.LoraConfig("w", rank=2), params, roles=role)
    adapter = lj.init(plan, params, key=jax.random.key(0))
    names = [("w", "w.weight", "same")]
    lj.save_adapter(tmp_path / "a", adapter, plan=plan, names=names)
    assert same(lj.load_adapter(tmp_path / "a", params)[0], adapter)
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    save_file({"w.weight": np.asarray(params["w"])}, base / "model.safetensors")
    with pytest.raises(AdapterError, match="alternate, so its change is no matrix"):
        lj.export_merged(base, adapter, tmp_path / "out", names=names)


def test_heads_merge_into_one_flat_kernel(tmp_path):
    params = {"q": weight(6, 2, 3), "o": weight(2, 3, 6)}

    def attend(p, x):
        return jnp.einsum("nh,nhd->d", jnp.einsum("i,inh->nh", x, p["q"]), p["o"])

    config = lj.LoraConfig(["q", "o"], rank=2, init=False)
    plan = lj.plan(config, params, attend, (jnp.ones(6),))
    adapter = lj.init(plan, params, key=jax.random.key(0))
    names = [("q", "q.weight", "linear"), ("o", "o.weight", "linear")]
    merged = lj.merge(params, adapter)

    def theirs(p):
        flat = {"q.weight": p["q"].reshape(6, 6).T, "o.weight": p["o"].reshape(6, 6).T}
        return {name: np.ascontiguousarray(x) for name, x in flat.items()}

    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    save_file(theirs(params), base / "model.safetensors")
    folder = tmp_path / "a"
    lj.save_adapter(folder, adapter, plan=plan, names=names, params=params)
    paths = tmp_path / "p"
    lj.save_adapter(paths, adapter, plan=plan)
    forms = [(adapter, names), (folder, names), (folder, None), (paths, names)]
    for form, table in forms:
        lj.export_merged(base, form, tmp_path / "out", names=table)
        found = load_file(tmp_path / "out" / "model.safetensors")
        for name, value in theirs(merged).items():
            np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-6)
