"""Merged experts: all of a layer in one tensor, or each in one of its own."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorax_jax as lj
from lorax_jax._errors import AdapterError, CheckpointError
from lorax_jax.adapters import Fixed, Role, base_norm


def experts(tmp_path, batch=(0, 1), dora=False):
    """Two layers of three experts: parameters, an adapter, and their base's folder."""
    draw = np.random.default_rng(0)
    w = draw.normal(0, 1, (2, 3, 4, 5)).astype(np.float32)
    role = Role("l/w", (2,), (3,), batch, 1, kind="dora" if dora else "lora")
    scale = jnp.asarray([0.5, 2.0])
    fixed = {"scale": scale, "rank": jnp.asarray([2, 1])}
    a, b = (jnp.asarray(draw.normal(0, 1, s)) for s in ((2, 3, 4, 2), (2, 3, 2, 5)))
    # The second layer's rank is 1: what is beyond it is zero.
    a, b = a.at[1, ..., 1:].set(0), b.at[1, :, 1:].set(0)
    train = {"a": a, "b": b}
    params = {"l": {"w": jnp.asarray(w)}}
    if dora:
        fixed["norm"] = base_norm(params["l"]["w"], role)
        train["magnitude"] = jnp.asarray(draw.uniform(0.5, 2, (2, 3, 5)), jnp.float32)
    adapter = lj.Adapter({"l/w": train}, {"l/w": Fixed(role, fixed)})
    packed = {f"m.{i}.experts.w": np.ascontiguousarray(w[i].mT) for i in range(2)}
    each = {
        f"m.{i}.e.{e}.w.weight": np.ascontiguousarray(w[i, e])
        for i in range(2)
        for e in range(3)
    }
    (tmp_path / "base").mkdir()
    save_file(packed | each, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    return params, adapter


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_experts(tmp_path, dora):
    """All in one tensor, turned, or each in one of its own."""
    params, adapter = experts(tmp_path, dora=dora)
    wanted = np.asarray(lj.merge(params, adapter)["l"]["w"])
    tables = {
        "packed": [("l/{i}/w", "m.{i}.experts.w", "linear")],
        "each": [("l/{i}/{e}/w", "m.{i}.e.{e}.w.weight", "same")],
    }
    for name, table in tables.items():
        out = tmp_path / name
        done = lj.export_merged(tmp_path / "base", adapter, out, names=table)
        found = load_file(out / "model.safetensors")
        if name == "packed":
            assert sorted(done.merged) == ["m.0.experts.w", "m.1.experts.w"]
            ours = [found[f"m.{i}.experts.w"].mT for i in range(2)]
        else:
            assert len(done.merged) == 6
            ours = [[found[f"m.{i}.e.{e}.w.weight"] for e in range(3)] for i in (0, 1)]
        np.testing.assert_allclose(np.asarray(ours), wanted, rtol=1e-5, atol=1e-5)
        assert np.abs(wanted - np.asarray(params["l"]["w"])).max() > 0.1


def test_experts_that_are_not_there(tmp_path):
    params, adapter = experts(tmp_path)
    with pytest.raises(CheckpointError, match="`names` has no tensor for 'l/w', layer"):
        names = [("l/{i}/v", "m.{i}.experts.w", "linear")]
        lj.export_merged(tmp_path / "base", adapter, tmp_path / "out", names=names)
    role = Role("w", (2,), (3,), (0, 1))
    fixed = Fixed(role, {"scale": jnp.ones(()), "rank": jnp.asarray(2)})
    train = {"a": jnp.ones((2, 3, 4, 2)), "b": jnp.ones((2, 3, 2, 5))}
    with pytest.raises(AdapterError, match=r"each of \(2, 3\) experts, at the axes"):
        names = [("w", "m.w", "same")]
        lj.export_merged(
            tmp_path / "base",
            lj.Adapter({"w": train}, {"w": fixed}),
            tmp_path / "out",
            names=names,
        )
    few = [("l/{i}/w", "m.{i}.e.0.w.weight", "linear")]
    with pytest.raises(CheckpointError, match="of m.0.e.0.w.weight has the shape"):
        lj.export_merged(tmp_path / "base", adapter, tmp_path / "out", names=few)
