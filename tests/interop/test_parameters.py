"""Bare parameters of experts: PEFT's `target_parameters`, and the same leaves here."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from moes import (
    CONFIG,
    FIELDS,
    LAYERS,
    MOES,
    TENSORS,
    TOLERANCE,
    D,
    M,
    Moe,
    adapted_run,
    far,
    peft_model,
    run,
)
from safetensors.numpy import load_file, save_file
from twins import modules_of, sites_of

import lorax_jax as lj
from lorax_jax._errors import CheckpointError, ConfigError
from lorax_jax.checkpoint import NameMap


@pytest.fixture(params=MOES.values(), ids=MOES.keys())
def moe(request):
    return request.param


@pytest.mark.parametrize("planned", [False, True], ids=["without plan", "plan"])
def test_theirs_here(moe, planned, tmp_path, record_property):
    """Outputs, gradients of both factors, merged parameters, and the file again."""
    import torch

    theirs = moe.theirs()
    params = moe.params(theirs)
    base = run(theirs, moe.x)
    model = peft_model(theirs)
    model.save_pretrained(tmp_path / "a")
    plan = None
    if planned:
        config = lj.LoraConfig.from_peft(tmp_path / "a", moe.names)
        plan = lj.plan(config, params, moe.fn, (moe.x,))
        assert sites_of(plan, moe.names) == modules_of(model)
    adapter, receipt = lj.load_adapter(
        tmp_path / "a", params, names=moe.names, plan=plan
    )
    assert not receipt.problems and receipt.sites == receipt.expected == 4 * LAYERS
    assert plan is None or receipt.plan is plan

    out = model(torch.from_numpy(moe.x))
    torch.sin(out).sum().backward()
    worst = far(adapted_run(moe, params, adapter), out.detach().numpy())
    assert far(base, out.detach().numpy()) > 0.01  # it acts

    def loss(train):
        bound = lj.bind(params, lj.Adapter(train, adapter.fixed))
        return jnp.sin(lj.adapt(moe.fn)(bound, jnp.asarray(moe.x))).sum()

    grads = lj.Adapter(jax.grad(loss)(adapter.train), adapter.fixed)
    for name, one in (("b", adapter), ("g", grads)):
        lj.save_adapter(tmp_path / name, one, plan=receipt.plan, names=moe.names)
    found = load_file(tmp_path / "g" / TENSORS)
    expected = {
        name.replace(".default", ""): parameter.grad.numpy()
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    assert found.keys() == expected.keys() and len(found) == 8 * LAYERS
    for key, gradient in expected.items():
        assert np.abs(gradient).max() > 0
        worst = max(worst, far(found[key], gradient))

    one, other = (load_file(tmp_path / name / TENSORS) for name in "ab")
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[key], other[key]) for key in one)
    merged = moe.params(model.merge_and_unload())
    for ours, wanted in zip(
        *map(jax.tree.leaves, (lj.merge(params, adapter), merged)), strict=True
    ):
        worst = max(worst, far(ours, wanted))
    record_property("max_relative_difference", float(worst))
    assert worst <= TOLERANCE


def test_ours_there(moe, tmp_path, monkeypatch):
    """Our folder in PEFT: every key and every bit arrives, and comes back."""
    import peft

    theirs = moe.theirs()
    params = moe.params(theirs)
    rules = {
        r"layers/0/(up|router)": {"rank": 3, "alpha": 7},
        r"layers/\d/(up|down|router|out)": {},
    }
    config = lj.LoraConfig(rules, rank=2, alpha=3, init=False, rslora=True)
    plan = lj.plan(config, params, moe.fn, (moe.x,))
    adapter = drawn(plan, params)
    lj.save_adapter(tmp_path / "a", adapter, plan=plan, names=moe.names, params=params)
    results = []
    real = peft.PeftModel.load_adapter
    spy = lambda *args, **kw: results.append(real(*args, **kw)) or results[-1]  # noqa: E731
    monkeypatch.setattr(peft.PeftModel, "load_adapter", spy)
    model = peft.PeftModel.from_pretrained(theirs, tmp_path / "a")
    assert results[0].unexpected_keys == []
    assert [key for key in results[0].missing_keys if "lora_" in key] == []
    assert modules_of(model) == sites_of(plan, moe.names)
    assert far(adapted_run(moe, params, adapter), run(model, moe.x)) <= TOLERANCE

    model.save_pretrained(tmp_path / "b")
    written, back = (load_file(tmp_path / f / TENSORS) for f in "ab")
    assert written.keys() == back.keys()
    assert all(np.array_equal(written[key], back[key]) for key in written)
    loaded, _ = lj.load_adapter(tmp_path / "a", params)  # by its own metadata
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, adapter))
    loaded, _ = lj.load_adapter(tmp_path / "b", params, names=moe.names, plan=plan)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, adapter))


def test_configurations(moe):
    """`to_peft` has PEFT adapt the same, at the same ranks and scales."""
    import peft

    config = lj.LoraConfig.from_peft({"peft_type": "LORA"} | FIELDS, moe.names)
    model = peft_model(moe.theirs())
    fields = config.to_peft(moe.names)
    assert fields["target_parameters"] == ["down", "router.weight", "up"]
    fields = {k: v for k, v in fields.items() if k not in ("peft_type", "peft_version")}
    again = peft.get_peft_model(moe.theirs(), peft.LoraConfig(**fields))
    assert modules_of(again) == modules_of(model)


def test_merged_without_the_model(moe, tmp_path, record_property):
    """`export_merged` gives the parameters that PEFT's merge gives."""
    theirs = moe.theirs()
    params = moe.params(theirs)
    base = tmp_path / "base"
    base.mkdir()
    state = {name: leaf.detach().numpy() for name, leaf in theirs.state_dict().items()}
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text("{}")
    model = peft_model(theirs)
    model.save_pretrained(tmp_path / "a")
    adapter, receipt = lj.load_adapter(tmp_path / "a", params, names=moe.names)
    lj.save_adapter(tmp_path / "b", adapter, plan=receipt.plan, names=moe.names)
    wanted = model.merge_and_unload().state_dict()
    worst = 0.0
    for number, one in enumerate((adapter, tmp_path / "a", tmp_path / "b")):
        out = tmp_path / f"out{number}"
        done = lj.export_merged(base, one, out, names=moe.names)
        assert len(done.merged) == 4 * LAYERS == len(state)
        found = load_file(out / "model.safetensors")
        for name, leaf in wanted.items():
            worst = max(worst, far(found[name], leaf.numpy()))
    record_property("max_relative_difference", float(worst))
    assert worst <= TOLERANCE
    with pytest.raises(CheckpointError, match="has `target_parameters`, and a check"):
        lj.export_merged(base, tmp_path / "b", tmp_path / "out")


def test_parameters_alone(tmp_path):
    """No targets beside them are an empty list: PEFT fills in its own for null."""
    moe = Moe()
    config = lj.LoraConfig(".*/up", rank=2)
    fields = config.to_peft(moe.names)
    assert (fields["target_modules"], fields["target_parameters"]) == ([], ["up"])
    theirs = moe.theirs()
    params = moe.params(theirs)
    plan = lj.plan(config, params, moe.fn, (moe.x,))
    lj.save_adapter(tmp_path, drawn(plan, params), plan=plan, names=moe.names)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == []
    given = {"peft_type": "LORA", "target_parameters": ["up"]}
    with pytest.raises(ConfigError, match="no `target_modules`, and PEFT then adapts"):
        lj.LoraConfig.from_peft(given, moe.names)
    # What PEFT saved says what it took.
    model = peft_model(theirs, target_modules=None, target_parameters=["up"], **PLAIN)
    model.save_pretrained(tmp_path / "theirs")
    assert (
        json.loads((tmp_path / "theirs" / CONFIG).read_text())["target_modules"] is None
    )
    found = lj.LoraConfig.from_peft(tmp_path / "theirs", moe.names)
    assert [rule.pattern for rule in found.rules] == [r"layers/\d+/up"]


PLAIN = {"rank_pattern": {}, "alpha_pattern": {}}


def test_the_order_is_that_of_the_class():
    """PEFT nests in the order in which a module lists its parameters, no other."""
    for order, names in itertools.product(
        (("up", "down"), ("down", "up")),
        (["experts.up", "experts.down"], ["experts.down", "experts.up"]),
    ):
        model = peft_model(Moe(order=order).theirs(), target_parameters=names, **PLAIN)
        experts = model.base_model.model.layers[0].experts
        assert experts.parameter_name == order[-1]
        assert experts.base_layer.parameter_name == order[0]


def test_an_order_that_is_not_theirs_is_noticed(tmp_path):
    moe = Moe()
    theirs = moe.theirs()
    params = moe.params(theirs)
    peft_model(theirs).save_pretrained(tmp_path)
    wrong = dataclasses.replace(moe, order=("down", "up")).names
    with pytest.raises(
        CheckpointError, match=r"experts.lora_A.weight is \(3, 6\), not"
    ):
        lj.load_adapter(tmp_path, params, names=wrong)
    entries = [entry for entry in moe.names if not entry[0].endswith("up")]
    fewer = NameMap(entries, parameters=moe.names.parameters)
    with pytest.raises(CheckpointError, match="more parameters of that module than"):
        lj.load_adapter(tmp_path, params, names=fewer)


@pytest.mark.parametrize("end", ["A", "B"])
@pytest.mark.parametrize("key", ["experts", "experts.base_layer", "router"])
def test_keys_that_are_missing(tmp_path, end, key):
    moe = Moe()
    theirs = moe.theirs()
    params = moe.params(theirs)
    peft_model(theirs).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    lost = f"base_model.model.layers.1.{key}.lora_{end}.weight"
    del tensors[lost]
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(CheckpointError, match=f"missing +{lost}"):
        lj.load_adapter(tmp_path, params, names=moe.names)
    _, receipt = lj.load_adapter(tmp_path, params, names=moe.names, strict=False)
    assert receipt.missing == (lost,) and receipt.sites == 4 * LAYERS - 1


def test_a_matrix_the_other_way_round(tmp_path):
    """A 2-D parameter is (d_out, d_in) to PEFT, whatever its module says or does."""
    import torch

    class Product(torch.nn.Module):
        is_transposed = True  # of 3-D parameters alone

        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(D, M) / 3)

        def forward(self, x):
            return x @ self.w

    torch.manual_seed(0)
    theirs = torch.nn.Sequential(Product())
    params = {"w": jnp.asarray(theirs[0].w.detach().numpy())}
    names = NameMap([("w", "0.w", "same")], is_transposed=["0"])
    fields = {"target_modules": [], "target_parameters": ["w"]} | PLAIN
    model = peft_model(theirs, **fields)
    model.save_pretrained(tmp_path / "a")
    written = load_file(tmp_path / "a" / TENSORS)
    assert written["base_model.model.0.lora_A.weight"].shape == (2, M)
    x = np.random.default_rng(0).normal(0, 1, (5, D)).astype(np.float32)
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    plan = lj.plan(lj.LoraConfig("w", rank=2, alpha=3), params, fn, (x,))
    for one in (plan, None):
        adapter, receipt = lj.load_adapter(
            tmp_path / "a", params, names=names, plan=one
        )
        ours = lj.adapt(fn)(lj.bind(params, adapter), jnp.asarray(x))
        assert far(ours, run(model, x)) <= TOLERANCE
        lj.save_adapter(tmp_path / "b", adapter, plan=receipt.plan, names=names)
        back = load_file(tmp_path / "b" / TENSORS)
        assert all(np.array_equal(written[key], back[key]) for key in back)
    assert adapter.train["w"]["a"].shape == (M, 2)  # as PEFT has it


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_where_they_start(init):
    """An expert's A is drawn as a matrix of its own: its fan-in is d, not E * d."""
    import torch

    experts, d, rank = 10, 16, 8
    moe = Moe()
    theirs = moe.theirs()
    owner = theirs.layers[0].experts
    owner.up = torch.nn.Parameter(torch.zeros(experts, d, d))
    fields = {"target_modules": [], "target_parameters": ["layers.0.experts.up"]}
    model = peft_model(theirs, r=rank, init_lora_weights=init, **fields | PLAIN)
    wrapper = model.base_model.model.layers[0].experts
    wrapper.reset_lora_parameters("default", init)
    expected = wrapper.lora_A["default"].weight
    fn = lambda p, x: jnp.einsum("etd,edm->etm", x, p["up"])  # noqa: E731
    params, x = {"up": jnp.zeros((experts, d, d))}, jnp.ones((experts, 2, d))
    plan = lj.plan(lj.LoraConfig("up", rank=rank, init=init), params, fn, (x,))
    train = lj.init(plan, params, key=jax.random.key(0)).train["up"]
    assert train["a"].size == expected.numel() and not train["b"].any()
    # 1,280 draws: a standard deviation is known to about 2 percent.
    assert float(train["a"].std()) == pytest.approx(expected.std().item(), rel=0.1)
    if init is True:
        for drawn_a in (np.asarray(train["a"]), expected.detach().numpy()):
            assert np.abs(drawn_a).max() == pytest.approx(1 / np.sqrt(d), rel=0.02)
