"""Bare parameters of experts in PEFT's files, without PEFT."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from safetensors.numpy import load_file

import lorax_jax as lj
from lorax_jax import _peft
from lorax_jax._errors import CheckpointError, ConfigError
from lorax_jax.checkpoint import NameMap
from lorax_jax.checkpoint._record import FIELD

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
E, D, M = 3, 4, 6
STEM = "base_model.model."
NAMES = NameMap(
    [
        ("gate", "m.gate.weight", "linear"),
        ("q", "m.q.weight", "linear"),
        ("up", "m.experts.up", "linear"),
        ("down", "m.experts.down", "same"),
    ],
    parameters="m.gate.weight",
)
PARAMS = {
    "gate": jnp.ones((D, E)),
    "q": jnp.ones((D, D)),
    "up": jnp.ones((E, D, M)),
    "down": jnp.ones((E, D, M)),  # (experts, d_out, d_in)
}
X = jnp.ones((E, 2, D))


def fn(p, x):
    y = jnp.einsum("etd,edm->etm", x @ p["q"], p["up"])
    return jnp.einsum("etm,edm->etd", y, p["down"]), x @ p["gate"]


def planned(targets=".*", **config):
    config = {"rank": 2, "alpha": 3, "init": False} | config
    return lj.plan(lj.LoraConfig(targets, **config), PARAMS, fn, (X,))


def saved(folder, plan, names=NAMES):
    adapter = drawn(plan, PARAMS)
    lj.save_adapter(folder, adapter, plan=plan, names=names)
    return adapter


def test_the_formula(tmp_path):
    """A is expert-major and B rank-major; each makes the change of `merge`."""
    adapter = saved(tmp_path, planned())
    found = load_file(tmp_path / TENSORS)
    merged = lj.merge(PARAMS, adapter)
    scale = 3 / 2
    for key, name in (("experts.base_layer", "up"), ("experts", "down")):
        a = found[f"{STEM}m.{key}.lora_A.weight"]
        b = found[f"{STEM}m.{key}.lora_B.weight"]
        d_in, d_out = (D, M) if name == "up" else (M, D)
        assert a.shape == (E * 2, d_in) and b.shape == (d_out, 2 * E)
        change = scale * np.einsum(
            "mre,erd->emd", b.reshape(d_out, 2, E), a.reshape(E, 2, d_in)
        )
        ours = np.asarray(merged[name] - PARAMS[name])
        ours = ours.mT if name == "up" else ours
        np.testing.assert_allclose(ours, change, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_modules"] == ["m.q"]
    assert set(config["target_parameters"]) == {
        "m.gate.weight",
        "m.experts.up",
        "m.experts.down",
    }


def test_one_parameter_is_not_nested(tmp_path):
    adapter = saved(tmp_path, planned("up"))
    assert set(load_file(tmp_path / TENSORS)) == {
        f"{STEM}m.experts.lora_{x}.weight" for x in "AB"
    }
    loaded, _ = lj.load_adapter(tmp_path, PARAMS)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, adapter))


def test_a_changed_record_is_refused(tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import save_file

    saved(tmp_path, planned("up"))
    tensors = load_file(tmp_path / TENSORS)
    with safe_open(tmp_path / TENSORS, "np") as file:
        record = json.loads(file.metadata()[FIELD])
    for change in (
        {"parameter": "m.other.up"},
        {"parameter": 3},
        {"key": "m.experts.base_layer.x"},
        {"part": None},
        {"kind": "dora"},
    ):
        site = {k: v for k, v in (record["sites"][0] | change).items() if v is not None}
        bad = json.dumps(record | {"sites": [site]})
        save_file(tensors, tmp_path / TENSORS, metadata={FIELD: bad})
        with pytest.raises(CheckpointError, match="which `save_adapter` never writes"):
            lj.load_adapter(tmp_path, PARAMS)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dora": True}, "'gate' is a bare parameter .* its adapter is DoRA"),
        ({"dropout": 0.1}, "its adapter drops inputs of A"),
        ({"lora_bias": True}, "its adapter has a bias of B"),
        (
            {"targets": {"gate": {"parts": {"first": {1: (0, 2)}}}}},
            "its adapter is a part of it",
        ),
    ],
)
def test_what_cannot_be_saved(tmp_path, config, message):
    config = {"targets": "gate|q"} | config
    with pytest.raises(CheckpointError, match=message):
        saved(tmp_path / "a", planned(**config))
    assert not (tmp_path / "a").exists()


NAMINGS = {
    "a module of the whole model": (
        [("up", "up", "linear")],
        "adapts the bare parameters up, which no module of the model holds",
    ),
    "a module that is adapted too": (
        [("up", "m.q.up", "linear"), ("q", "m.q.weight", "linear")],
        "adapts the bare parameters m.q.up of modules that it adapts as well",
    ),
    "a name that ends another": (
        [("up", "m.up", "linear"), ("down", "aux.m.up", "same")],
        "`target_parameters` cannot name 'm.up' alone",
    ),
    "a convolution": ([("up", "m.up", "conv")], "and `names` calls it 'conv'"),
}


@pytest.mark.parametrize("case", NAMINGS)
def test_names_that_peft_cannot_find(tmp_path, case):
    names, message = NAMINGS[case]
    plan = planned("|".join(path for path, *_ in names if path != "down"))
    with pytest.raises(CheckpointError, match=message):
        saved(tmp_path / "a", plan, names)
    assert not (tmp_path / "a").exists()


def test_experts_that_share_their_input_are_declared(tmp_path):
    """A product of one input with every expert has the experts among its outputs."""
    shared = lambda p, x: jnp.einsum("td,edm->etm", x, p["up"])  # noqa: E731
    params, x = {"up": PARAMS["up"]}, jnp.ones((2, D))
    config = lj.LoraConfig("up", rank=2, init=False)
    plan = lj.plan(config, params, shared, (x,))
    match = r"outputs \(0, 2\).*are declared, targets=.*batch"
    with pytest.raises(CheckpointError, match=match):
        saved(tmp_path, plan)
    config = lj.LoraConfig({"up": {"batch": 0}}, rank=2, init=False)
    plan = lj.plan(config, params, shared, (x,))
    adapter = saved(tmp_path, plan)
    merged = shared(lj.merge(params, adapter), x)
    ours = lj.adapt(shared)(lj.bind(params, adapter), x)
    np.testing.assert_allclose(ours, merged, rtol=1e-5)
    loaded, _ = lj.load_adapter(tmp_path, params, names=NAMES)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, adapter))


# --- Configurations -------------------------------------------------------------------


def test_all_linear_has_parameters_too():
    """Theirs takes linear layers alone, so what ours takes beside is named."""
    kernels = [(f"{path}/kernel", theirs, x) for path, theirs, x in NAMES]
    names = NameMap(kernels, parameters="m.gate.weight")
    fields = lj.LoraConfig("all-linear", rank=2, exclude="gate/.*").to_peft(names)
    assert fields["target_modules"] == "all-linear"
    assert fields["target_parameters"] == ["down", "up"]
    again = lj.LoraConfig.from_peft(fields, names)
    assert again.exclude == ("gate/kernel",)
    fewer = lj.LoraConfig.from_peft(fields | {"target_parameters": ["up"]}, names)
    assert fewer.exclude == ("gate/kernel", "down/kernel")
    with pytest.raises(ConfigError, match="takes 'down' cannot be told from `names`"):
        lj.LoraConfig("all-linear").to_peft(NAMES)


def test_ranks_are_of_the_parameter():
    fields = {
        "peft_type": "LORA",
        "target_modules": [],
        "target_parameters": ["experts.up", "down"],
        "rank_pattern": {"experts.up": 3},
        "alpha_pattern": {"m.experts.(up|down)": 5},
    }
    config = lj.LoraConfig.from_peft(fields, NAMES)
    found = {rule.pattern: (rule.rank, rule.alpha) for rule in config.rules}
    assert found == {"up": (3, 5), "down": (None, 5)}
    again = lj.LoraConfig.from_peft(config.to_peft(NAMES), NAMES)
    assert again == config
    with pytest.raises(ConfigError, match="'experts', which takes no adapted module"):
        lj.LoraConfig.from_peft(fields | {"rank_pattern": {"experts": 2}}, NAMES)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dora": True}, "(?s)does not combine with.*use_dora"),
        ({"dropout": 0.5}, "(?s)does not combine with.*lora_dropout = 0.5"),
        ({"lora_bias": True}, "(?s)does not combine with.*lora_bias"),
        ({"bias": "all"}, "(?s)does not combine with.*bias = 'all'"),
    ],
)
def test_what_to_peft_refuses(config, message):
    with pytest.raises(ConfigError, match=message):
        lj.LoraConfig("up", **config).to_peft(NAMES)


def test_conv1d_beside_parameters_is_refused():
    """PEFT sets `fan_in_fan_out` for it, and its wrappers then raise."""
    names = [("c/kernel", "c.weight", "same"), ("up", "m.up", "linear")]
    with pytest.raises(ConfigError, match="(?s)fan_in_fan_out = True"):
        lj.LoraConfig(["c/kernel", "up"]).to_peft(names)
    lj.LoraConfig("up").to_peft(names)


def test_what_takes_nothing_is_named():
    base = {"peft_type": "LORA", "target_modules": ["q"]}
    near = re.escape("m.experts.up")
    with pytest.raises(ConfigError, match=f"'experts.upp' in .* Closest: .*{near}"):
        given = base | {"target_parameters": ["experts.upp"]}
        lj.LoraConfig.from_peft(given, NAMES)
    # The module of a bare parameter is no target of PEFT's, which has no layer for it.
    with pytest.raises(ConfigError, match="the targets gate, which take no module"):
        lj.LoraConfig.from_peft(base | {"target_modules": ["gate"]}, NAMES)


def test_parameters_and_their_endings():
    taken = _peft.Parameters({"target_parameters": ["up", "m.down"]}, "it")
    assert taken("up") and taken("a.up") and taken("m.down") and taken("x.m.down")
    assert not taken("a.xup") and not taken("down") and not taken("up.a")
