"""Kernels of convolutions on disk."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from jax import lax
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lorax_jax as lj
from lorax_jax._errors import AdapterError, CheckpointError, ConfigError

DRAW = np.random.default_rng(0)
TENSORS = "adapter_model.safetensors"


def weight(*shape):
    return jnp.asarray(DRAW.normal(0, 1, shape), jnp.float32)


# Kernels with a window of (3, 2), as Flax has them, as torch has them, in two groups.
PARAMS = {
    "last": weight(3, 2, 4, 6),
    "first": weight(5, 6, 3, 2),
    "grouped": weight(3, 2, 2, 8),
}
X = jnp.asarray(DRAW.normal(0, 1, (1, 7, 7, 4)), jnp.float32)
NAMES = [("last", "c.last.weight", "conv"), ("first", "c.first.weight", "same")]


def conv(x, w, kernel, groups=1):
    return lax.conv_general_dilated(
        x,
        w,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", kernel, "NHWC"),
        feature_group_count=groups,
    )


def fn(p, x):
    y = conv(jnp.tanh(conv(x, p["last"], "HWIO")), p["first"], "OIHW")
    return y, conv(x, p["grouped"], "HWIO", 2)


def planned(*targets, **config):
    config = lj.LoraConfig(list(targets), rank=2, init=False, **config)
    plan = lj.plan(config, PARAMS, fn, (X,))
    return plan, drawn(plan, PARAMS)


def same(one, other):
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


def without_metadata(folder):
    save_file(load_file(folder / TENSORS), folder / TENSORS)
    return folder


def test_the_tensors_are_a_convolutions(tmp_path):
    plan, adapter = planned("last", "first")
    lj.save_adapter(tmp_path, adapter, plan=plan, names=NAMES)
    found = load_file(tmp_path / TENSORS)
    stem = "base_model.model.c"
    shapes = {name.removeprefix(stem): x.shape for name, x in found.items()}
    assert shapes == {
        ".last.lora_A.weight": (2, 4, 3, 2),
        ".last.lora_B.weight": (6, 2, 1, 1),
        ".first.lora_A.weight": (2, 6, 3, 2),
        ".first.lora_B.weight": (5, 2, 1, 1),
    }
    a = found[f"{stem}.last.lora_A.weight"]
    ours = np.asarray(adapter.train["last"]["a"])  # (3, 2, 4, rank)
    np.testing.assert_array_equal(a, ours.transpose(3, 2, 0, 1))
    for names in (None, NAMES):
        assert same(lj.load_adapter(tmp_path, PARAMS, names=names)[0], adapter)
    without_metadata(tmp_path)
    for given in (None, plan):
        loaded, receipt = lj.load_adapter(tmp_path, PARAMS, names=NAMES, plan=given)
        assert same(loaded, adapter)
        assert {site.role for site in receipt.plan} == {site.role for site in plan}


def test_the_magnitudes_of_dora(tmp_path):
    plan, adapter = planned("last", "first", dora=True)
    lj.save_adapter(tmp_path, adapter, plan=plan, names=NAMES)
    found = load_file(tmp_path / TENSORS)
    magnitude = found["base_model.model.c.last.lora_magnitude_vector"]
    np.testing.assert_array_equal(
        magnitude, np.asarray(adapter.train["last"]["magnitude"]).reshape(1, 6, 1, 1)
    )
    assert same(lj.load_adapter(tmp_path, PARAMS)[0], adapter)
    without_metadata(tmp_path)
    for given in (None, plan):
        loaded, _ = lj.load_adapter(tmp_path, PARAMS, names=NAMES, plan=given)
        assert same(loaded, adapter)


def test_kernels_that_are_trained_whole(tmp_path):
    plan, adapter = planned("first", whole="last")
    lj.save_adapter(tmp_path, adapter, plan=plan, names=NAMES)
    whole = load_file(tmp_path / TENSORS)["base_model.model.c.last.weight"]
    ours = np.asarray(adapter.train["last"]["whole"])  # (3, 2, 4, 6)
    np.testing.assert_array_equal(whole, ours.transpose(3, 2, 0, 1))
    assert same(lj.load_adapter(tmp_path, PARAMS)[0], adapter)
    without_metadata(tmp_path)
    for given in (None, plan):
        loaded, _ = lj.load_adapter(tmp_path, PARAMS, names=NAMES, plan=given)
        assert same(loaded, adapter)


def test_stacked_kernels(tmp_path):
    params = {"layers": {"kernel": weight(3, 3, 4, 4)}}

    def scanned(p, x):
        def layer(x, w):
            y = lax.conv_general_dilated(
                x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
            )
            return jnp.tanh(y), None

        return lax.scan(layer, x, p["layers"]["kernel"])[0]

    config = lj.LoraConfig("all-linear", rank=2, init=False)
    plan = lj.plan(config, params, scanned, (jnp.ones((1, 7, 4)),))
    assert [site.path for site in plan] == [f"layers/{i}/kernel" for i in range(3)]
    adapter = lj.init(plan, params, key=jax.random.key(0))
    names = [("layers/{i}/kernel", "h.{i}.conv.weight", "conv")]
    lj.save_adapter(tmp_path, adapter, plan=plan, names=names)
    shape = load_file(tmp_path / TENSORS)["base_model.model.h.2.conv.lora_A.weight"]
    assert shape.shape == (2, 4, 3)
    assert same(lj.load_adapter(tmp_path, params)[0], adapter)
    without_metadata(tmp_path)
    loaded, receipt = lj.load_adapter(tmp_path, params, names=names)
    assert same(loaded, adapter) and receipt.plan.slots[0].role == plan.slots[0].role


def test_groups_have_their_own_factors(tmp_path):
    plan, adapter = planned("grouped")
    lj.save_adapter(tmp_path, adapter, plan=plan)
    shapes = [x.shape for x in load_file(tmp_path / TENSORS).values()]
    assert shapes == [(2, 2, 12), (2, 4, 2)]  # groups, then (rank, d_in), (d_out, rank)
    loaded, receipt = lj.load_adapter(tmp_path, PARAMS)
    assert same(loaded, adapter)
    assert receipt.plan.slots[0].role == plan.slots[0].role
    assert receipt.plan.trainable == plan.trainable == 2 * (2 * 12 + 8)
    names = [*NAMES, ("grouped", "c.grouped.weight", "conv")]
    with pytest.raises(CheckpointError, match="a convolution in 2 groups, each with"):
        lj.save_adapter(tmp_path, adapter, plan=plan, names=names)


def test_a_kernel_with_other_axes_is_no_convolution(tmp_path):
    plan, adapter = planned("first")
    names = [("first", "c.first.weight", "conv")]
    with pytest.raises(CheckpointError, match="A kernel that lies as torch has it is"):
        lj.save_adapter(tmp_path, adapter, plan=plan, names=names)


def test_a_matrix_where_a_kernel_should_be(tmp_path):
    plan, adapter = planned("last")
    lj.save_adapter(tmp_path, adapter, plan=plan, names=NAMES)
    found = load_file(tmp_path / TENSORS)
    key = "base_model.model.c.last.lora_A.weight"
    save_file(found | {key: found[key].reshape(2, -1)}, tmp_path / TENSORS)
    with pytest.raises(CheckpointError, match=r"last.lora_A.weight is \(2, 24\), not"):
        lj.load_adapter(tmp_path, PARAMS, names=NAMES, plan=plan)


def test_a_kernel_where_a_matrix_should_be(tmp_path):
    plan, adapter = planned("last")
    lj.save_adapter(tmp_path, adapter, plan=plan, names=NAMES)
    with safe_open(tmp_path / TENSORS, "np") as file:
        record = json.loads(file.metadata()["lorax_jax"])
    del record["sites"][0]["part"]
    record["sites"][0]["order"] = [1, 0]
    metadata = {"lorax_jax": json.dumps(record)}
    save_file(load_file(tmp_path / TENSORS), tmp_path / TENSORS, metadata)
    with pytest.raises(CheckpointError, match="with 2 input axes, and last has 3"):
        lj.load_adapter(tmp_path, PARAMS, plan=plan)


@pytest.mark.parametrize(
    ("field", "value"), [("order", [0, 0, 1]), ("order", [1, 0]), ("groups", 5)]
)
def test_damaged_metadata(tmp_path, field, value):
    plan, adapter = planned("last")
    lj.save_adapter(tmp_path, adapter, plan=plan, names=NAMES)
    with safe_open(tmp_path / TENSORS, "np") as file:
        record = json.loads(file.metadata()["lorax_jax"])
    site = record["sites"][0]
    (site if field == "order" else site["part"])[field] = value
    metadata = {"lorax_jax": json.dumps(record)}
    save_file(load_file(tmp_path / TENSORS), tmp_path / TENSORS, metadata)
    with pytest.raises(CheckpointError, match="which `save_adapter` never writes"):
        lj.load_adapter(tmp_path, PARAMS)


def theirs(params):
    kernel = np.asarray(params["last"]).transpose(3, 2, 0, 1)
    return {
        "c.last.weight": np.ascontiguousarray(kernel),
        "c.first.weight": np.asarray(params["first"]),
    }


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file(theirs(PARAMS), folder / "model.safetensors")
    return folder


KINDS = {
    "lora": (["last", "first"], {}),
    "dora": (["last", "first"], {"dora": True}),
    "whole": (["first"], {"whole": "last"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_merging(tmp_path, base, kind):
    targets, config = KINDS[kind]
    plan, adapter = planned(*targets, **config)
    lj.save_adapter(tmp_path / "a", adapter, plan=plan, names=NAMES, params=PARAMS)
    lj.save_adapter(tmp_path / "b", adapter, plan=plan, names=NAMES)
    without_metadata(tmp_path / "b")
    lj.save_adapter(tmp_path / "p", adapter, plan=plan)
    wanted = theirs(lj.merge(PARAMS, adapter))
    forms = [(adapter, NAMES), *((tmp_path / f, NAMES) for f in "abp")]
    for form, names in [*forms, (tmp_path / "a", None), (tmp_path / "b", None)]:
        lj.export_merged(base, form, tmp_path / "out", names=names)
        found = load_file(tmp_path / "out" / "model.safetensors")
        assert {name: x.shape for name, x in found.items()} == {
            name: x.shape for name, x in wanted.items()
        }
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-6)


def test_grouped_kernels_are_merged_in_memory(tmp_path, base):
    _, adapter = planned("grouped")
    names = [*NAMES, ("grouped", "c.grouped.weight", "conv")]
    with pytest.raises(AdapterError, match="2 groups, which an export has no word for"):
        lj.export_merged(base, adapter, tmp_path / "out", names=names)


def test_all_linear_is_not_theirs():
    """Ours takes convolutions; PEFT's would leave them out in silence."""
    config = lj.LoraConfig("all-linear", rank=2)
    names = [*NAMES, ("q", "q.weight", "linear")]
    with pytest.raises(ConfigError, match="'all-linear' cannot be combined with"):
        config.to_peft(names)
    fields = lj.LoraConfig("all-linear", exclude=["last", "first"]).to_peft(names)
    assert fields["target_modules"] == "all-linear"
    assert lj.LoraConfig.from_peft(fields, names).exclude == ("last", "first")
