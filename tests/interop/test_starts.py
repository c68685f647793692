"""Starts from factors of the weight, there and here."""

import copy
import dataclasses
import json

import jax
import numpy as np
import pytest
import twins
from drawn import started
from safetensors.numpy import load_file

import lorax_jax as lj
from lorax_jax._errors import CheckpointError

# Logits of order 2 in float32.
TOLERANCE = 1e-5
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


# --- Ours, opened there ---------------------------------------------------------------


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ours_in_peft_and_back(
    twin, adapted, tmp_path, record_property, family, scan, rslora
):
    """Rank and alpha patterns and rsLoRA together, which its own conversion refuses."""
    import peft

    pair = twin(family)
    plan, _ = adapted(pair, scan, rslora=rslora)
    model, params = pair.ours(scan)
    adapter = started(plan, size=0.15)
    lj.save_adapter(tmp_path / "ours", adapter, plan=plan, names=model.names)
    fields = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert fields["rank_pattern"] and fields["alpha_pattern"]
    assert fields["use_rslora"] is rslora
    theirs = peft.PeftModel.from_pretrained(pair.fresh(), tmp_path / "ours")
    state = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    written = load_file(tmp_path / "ours" / TENSORS)
    assert set(state) == set(written)
    assert all(np.array_equal(state[key].numpy(), written[key]) for key in written)
    ours, wanted = twins.logits(model, params, adapter), twins.their_logits(theirs)
    difference = np.abs(ours - wanted).max()
    record_property("max_abs_difference", float(difference))
    assert difference <= TOLERANCE
    assert np.abs(ours - twins.logits(model, params)).max() > 0.1  # it acts
    # And back: what PEFT saves of it is plain LoRA.
    theirs.save_pretrained(tmp_path / "theirs")
    back, receipt = lj.load_adapter(tmp_path / "theirs", params, names=model.names)
    assert [s.rank for s in receipt.plan] == [2 * s.rank for s in plan]
    assert np.abs(twins.logits(model, params, back) - wanted).max() <= TOLERANCE


def test_minor_components_stay_frozen_there(twin, adapted, tmp_path):
    import peft

    pair = twin("llama")
    plan, _ = adapted(pair)
    slots = [
        dataclasses.replace(
            slot, sites=tuple(dataclasses.replace(s, init="mica") for s in slot.sites)
        )
        for slot in plan.slots
    ]
    plan = dataclasses.replace(plan, slots=tuple(slots))
    adapter = started(plan, frozen=("b",))
    model, params = pair.ours()
    lj.save_adapter(tmp_path, adapter, plan=plan, names=model.names)
    theirs = peft.PeftModel.from_pretrained(pair.fresh(), tmp_path, is_trainable=True)
    moving = {n: p.requires_grad for n, p in theirs.named_parameters() if "lora_" in n}
    assert moving and all(("lora_A" in n) is grad for n, grad in moving.items())
    wanted = twins.their_logits(theirs.eval())
    assert np.abs(twins.logits(model, params, adapter) - wanted).max() <= TOLERANCE


# --- Theirs, opened here --------------------------------------------------------------


def trained(pair, folder, steps=3, before=None, start=None, **config):
    """Their model after a few steps, its folder, and that of its start."""
    import peft
    import torch

    config = {"r": 4, "lora_alpha": 7, "task_type": "CAUSAL_LM"} | config
    torch.manual_seed(0)
    base, config = pair.fresh(), peft.LoraConfig(**config)
    if before is not None:
        before(base, config)
    model = peft.get_peft_model(base, config)
    if start is not None:
        kept = model.peft_config["default"]
        model.peft_config["default"] = copy.copy(kept)
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(start)
        model.peft_config["default"] = kept
    ids = torch.tensor(twins.IDS).long()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    return model


CASES = {
    "pissa": ("llama", {"init_lora_weights": "pissa"}),
    "pissa conv1d": ("gpt2", {"init_lora_weights": "pissa"}),
    "pissa patterns": (
        "llama",
        {
            "init_lora_weights": "pissa",
            "use_rslora": True,
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "up_proj": 6},
            "alpha_pattern": {"up_proj": 3},
        },
    ),
    "pissa head": ("llama", {"init_lora_weights": "pissa"}),
    "pissa dora": ("llama", {"init_lora_weights": "pissa", "use_dora": True}),
    "olora": ("llama", {"init_lora_weights": "olora"}),
    "olora rslora": ("llama", {"init_lora_weights": "OLoRA", "use_rslora": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_their_residuals_here(twin, tmp_path, record_property, case):
    """Factors of a residual base, on the base itself."""
    family, config = CASES[case]
    targets = ["c_attn", "c_fc"] if family == "gpt2" else ["q_proj", "up_proj"]
    targets += ["lm_head"] if "head" in case else []
    pair = twin(family)
    theirs = trained(pair, tmp_path / "a", target_modules=targets, **config)
    wanted = twins.their_logits(theirs)
    for scan in (False, True):
        model, params = pair.ours(scan)
        adapter, receipt = lj.load_adapter(tmp_path / "a", params, names=model.names)
        assert all("a0" in fixed for fixed in adapter.fixed.values())
        init = config["init_lora_weights"].lower()
        assert {site.init for site in receipt.plan} == {init}
        ours = twins.logits(model, params, adapter)
        difference = np.abs(ours - wanted).max()
        record_property(f"max_abs_difference_{scan}", float(difference))
        assert difference <= TOLERANCE
        assert np.abs(ours - twins.logits(model, params)).max() > 0.01  # it acts
    # Little has moved, and the signs are those of what was trained.
    for name, fixed in adapter.fixed.items():
        a, a0 = np.asarray(adapter.train[name]["a"]), np.asarray(fixed["a0"])
        assert np.linalg.norm(a - a0) < 0.5 * np.linalg.norm(a0)
    # Kept here, it is plain LoRA there.
    lj.save_adapter(
        tmp_path / "b", adapter, plan=receipt.plan, names=pair.ours(True)[0].names
    )
    import peft

    again = peft.PeftModel.from_pretrained(pair.fresh(), tmp_path / "b")
    assert np.abs(twins.their_logits(again) - wanted).max() <= TOLERANCE


@pytest.mark.parametrize("named", [True, False])
def test_their_residuals_are_merged(twin, tmp_path, named):
    pair = twin("llama")
    config = {"init_lora_weights": "pissa", "target_modules": ["q_proj", "up_proj"]}
    wanted = twins.their_logits(trained(pair, tmp_path / "a", **config))
    names = pair.ours()[0].names if named else None
    lj.export_merged(pair.folder, tmp_path / "a", tmp_path / "out", names=names)
    merged = twins.load_theirs(tmp_path / "out")
    assert np.abs(twins.their_logits(merged) - wanted).max() <= TOLERANCE


def _gradients(base, config):
    import torch
    from peft.tuners.lora import preprocess_loraga

    ids = torch.tensor(twins.IDS).long()

    def step():
        base(ids, labels=ids).loss.backward()

    preprocess_loraga(base, config, step)


def _covariances(base, config):
    import torch
    from peft.tuners.lora.corda import preprocess_corda

    ids = torch.tensor(twins.IDS).long()

    def run():
        for row in ids:
            base(row[None])

    preprocess_corda(base, config, run)


READ = {"pissa_niter_2": None, "lora_ga": _gradients, "corda": _covariances}


def _options(method):
    """PEFT's options of a start: not the usual ones."""
    import peft
    from peft.tuners.lora.config import CordaConfig

    if method == "lora_ga":
        return {"lora_ga_config": peft.LoraGAConfig(direction="ArBr")}
    return (
        {"corda_config": CordaConfig(corda_method="ipm")} if method == "corda" else {}
    )


@pytest.mark.parametrize("method", READ)
def test_starts_that_cannot_be_computed_again(twin, tmp_path, record_property, method):
    if method == "corda":
        pytest.importorskip("attr", reason="PEFT's CorDA imports attrs")
    config = {"init_lora_weights": method, "target_modules": ["q_proj"]} | _options(
        method
    )
    pair = twin("llama")
    theirs = trained(
        pair, tmp_path / "a", before=READ[method], start=tmp_path / "s", **config
    )
    model, params = pair.ours(True)
    with pytest.raises(CheckpointError, match=r"load_adapter\(..., start=folder\)"):
        lj.load_adapter(tmp_path / "a", params, names=model.names)
    adapter, _ = lj.load_adapter(
        tmp_path / "a", params, names=model.names, start=tmp_path / "s"
    )
    ours, wanted = twins.logits(model, params, adapter), twins.their_logits(theirs)
    record_property("max_abs_difference", float(np.abs(ours - wanted).max()))
    assert np.abs(ours - wanted).max() <= TOLERANCE
    assert np.abs(ours - twins.logits(model, params)).max() > 0.001  # it acts
    with pytest.raises(CheckpointError, match="convert the adapter there"):
        lj.export_merged(pair.folder, tmp_path / "a", tmp_path / "out")


def test_a_start_of_another_adapter(twin, tmp_path):
    pair = twin("llama")
    model, params = pair.ours()
    config = {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}
    trained(pair, tmp_path / "a", 0, **config)
    trained(pair, tmp_path / "b", 0, **config | {"r": 3})
    trained(pair, tmp_path / "plain", 0, **config | {"init_lora_weights": True})
    load = {"params": params, "names": model.names}
    with pytest.raises(CheckpointError, match="does not have the rank and scale"):
        lj.load_adapter(tmp_path / "a", start=tmp_path / "b", **load)
    with pytest.raises(CheckpointError, match="`start` is given, and the factors"):
        lj.load_adapter(tmp_path / "plain", start=tmp_path / "a", **load)
    types = jax.eval_shape(lambda: params)
    with pytest.raises(CheckpointError, match="has only the type of"):
        lj.load_adapter(tmp_path / "a", types, names=model.names)


def test_the_head_of_a_tied_table(twin, tmp_path):
    """PEFT takes PiSSA's start out of the table, and with it out of the lookup."""
    pair = twin("tied")
    config = {"target_modules": ["lm_head", "q_proj"], "init_lora_weights": "pissa"}
    trained(pair, tmp_path, 1, **config)
    model, params = pair.ours()
    with pytest.raises(CheckpointError, match="adapts the head that shares"):
        lj.load_adapter(tmp_path, params, names=model.names)


def test_tables_have_no_such_start(twin, tmp_path):
    pair = twin("llama")
    config = {"target_modules": ["embed_tokens", "q_proj"]}
    theirs = trained(pair, tmp_path, **config, init_lora_weights="pissa")
    model, params = pair.ours()
    adapter, _ = lj.load_adapter(tmp_path, params, names=model.names)
    assert "a0" not in adapter.fixed["embed_tokens/embedding"]
    ours = twins.logits(model, params, adapter)
    assert np.abs(ours - twins.their_logits(theirs)).max() <= TOLERANCE


def test_minor_components_of_theirs(twin, tmp_path):
    pair = twin("llama")
    config = {"target_modules": ["embed_tokens", "q_proj", "up_proj"]}
    theirs = trained(pair, tmp_path, **config, init_lora_weights="mica")
    model, params = pair.ours(True)
    adapter, receipt = lj.load_adapter(tmp_path, params, names=model.names)
    assert {site.init for site in receipt.plan} == {"mica"}
    assert all("b" in fixed for fixed in adapter.fixed.values())
    assert all(set(train) == {"a"} for train in adapter.train.values())
    ours = twins.logits(model, params, adapter)
    assert np.abs(ours - twins.their_logits(theirs)).max() <= TOLERANCE


@pytest.mark.parametrize(
    "init",
    [True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_3", "olora", "mica"],
)
def test_configurations(twin, tmp_path, init):
    import peft

    pair = twin("llama")
    trained(pair, tmp_path, 0, target_modules=["q_proj"], init_lora_weights=init)
    names = pair.ours()[0].names
    config = lj.LoraConfig.from_peft(tmp_path, names)
    assert config.init == init and isinstance(config.init, type(init))
    fields = config.to_peft(names)
    assert fields["init_lora_weights"] == init
    assert peft.LoraConfig.from_peft_type(**fields).init_lora_weights == init
