"""Repeated layers: PEFT's `layer_replication` against `replicate`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import twins
from safetensors.numpy import load_file

import lorax_jax as lj
from lorax_jax import models
from lorax_jax._errors import CheckpointError, PlanError
from lorax_jax._json import read_json

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TOLERANCE = 1e-5
RANGES = ((0, 2), (1, 3))  # the layers 0, 1, 1, 2

both = pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])

CASES = {
    "lora": {"target_modules": ["q_proj", "down_proj"]},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"layers.2.self_attn.q_proj": 2},
        "layers_to_transform": [1, 2, 3],
        "layers_pattern": "layers",
    },
    "dora": {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
    "rest": {
        "target_modules": ["o_proj"],
        "modules_to_save": ["input_layernorm"],
        "trainable_token_indices": [3, 5],
    },
}


def peft_model(pair, **config):
    """Their model with an adapter, every trained tensor moved."""
    import peft
    import torch

    config = {"r": 4, "lora_alpha": 7, "task_type": "CAUSAL_LM"} | config
    model = peft.get_peft_model(pair.fresh(), peft.LoraConfig(**config)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for leaf in model.parameters():
            if leaf.requires_grad:
                leaf.add_(0.1 * torch.randn_like(leaf))
    return model


def open_in_peft(pair, folder, monkeypatch):
    """Their model with our adapter, and what PEFT says about its keys."""
    import peft

    results = []
    real = peft.PeftModel.load_adapter

    def load_adapter(self, *args, **kwargs):
        results.append(real(self, *args, **kwargs))
        return results[-1]

    monkeypatch.setattr(peft.PeftModel, "load_adapter", load_adapter)
    model = peft.PeftModel.from_pretrained(pair.fresh(), folder)
    monkeypatch.undo()
    return model, results[0]


def modules_of(model):
    """Rank and scale of every adapted module."""
    return {
        name: (dict(module.r), dict(module.scaling))
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and module.r
    }


def deeper(pair, scan, ranges=RANGES):
    """Our model and parameters with repeated layers."""
    model, params = pair.ours(scan)
    params = lj.replicate(params, ranges, layers=model.layers_path)
    return model.with_layers(sum(b - a for a, b in ranges)), params


@pytest.fixture(scope="module")
def made(twin, tmp_path_factory):
    """`made(case)`: the folder that PEFT saved, and their model."""
    done = {}

    def make(case):
        if case not in done:
            ranges = [list(pair) for pair in RANGES]
            model = peft_model(twin("llama"), layer_replication=ranges, **CASES[case])
            folder = tmp_path_factory.mktemp("peft")
            model.save_pretrained(folder)
            done[case] = folder, model
        return done[case]

    return make


def loss_of(model, params, adapter):
    def loss(train):
        bound = lj.bind(params, lj.Adapter(train, adapter.fixed))
        return (lj.adapt(model.apply)(bound, twins.IDS) ** 2).mean()

    return loss


@pytest.mark.parametrize("case", CASES)
@both
def test_logits(twin, made, case, scan):
    folder, theirs = made(case)
    model, params = deeper(twin("llama"), scan)
    adapter, receipt = lj.load_adapter(folder, params, names=model.names)
    assert not receipt.problems and receipt.plan.config.layer_replication == RANGES
    found = twins.logits(model, params, adapter)
    assert np.abs(found - twins.their_logits(theirs)).max() <= TOLERANCE
    plain = np.asarray(lj.adapt(model.apply)(params, twins.IDS))
    assert np.abs(found - plain).max() > 0.01  # it acts


@both
def test_gradients(twin, made, tmp_path, scan):
    """Every copy's A and B get PEFT's gradients."""
    import torch

    folder, theirs = made("lora")
    theirs.zero_grad()
    (theirs(torch.tensor(twins.IDS).long()).logits ** 2).mean().backward()
    wanted = {
        name.replace(".default", ""): leaf.grad.numpy()
        for name, leaf in theirs.named_parameters()
        if "lora_" in name
    }
    model, params = deeper(twin("llama"), scan)
    adapter, receipt = lj.load_adapter(folder, params, names=model.names)
    grads = jax.jit(jax.grad(loss_of(model, params, adapter)))(adapter.train)
    # Saved like an adapter, gradients are laid out as PEFT's are.
    moved = lj.Adapter(grads, adapter.fixed)
    lj.save_adapter(tmp_path, moved, plan=receipt.plan, names=model.names)
    found = load_file(tmp_path / TENSORS)
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        assert np.abs(found[name] - gradient).max() <= TOLERANCE, name
        assert np.abs(gradient).max() > 0


@pytest.mark.parametrize("case", CASES)
@both
def test_there_and_back_again(twin, made, tmp_path, monkeypatch, case, scan):
    """PEFT's folder loaded, saved and opened by PEFT: the same bits throughout."""
    folder, theirs = made(case)
    pair = twin("llama")
    model, params = deeper(pair, scan)
    adapter, receipt = lj.load_adapter(folder, params, names=model.names)
    plan = receipt.plan
    lj.save_adapter(tmp_path, adapter, plan=plan, names=model.names, params=params)
    one, other = load_file(folder / TENSORS), load_file(tmp_path / TENSORS)
    kept = {k.split(" ")[0] for k in receipt.ignored}
    assert set(one) - set(other) == kept
    assert all(np.array_equal(one[key], other[key]) for key in other)
    config = read_json(tmp_path / CONFIG)
    assert config["layer_replication"] == [list(pair) for pair in RANGES]
    again, result = open_in_peft(pair, tmp_path, monkeypatch)
    assert result.unexpected_keys == []
    assert [key for key in result.missing_keys if "lora_" in key] == []
    assert modules_of(again) == modules_of(theirs)
    assert np.array_equal(twins.their_logits(again), twins.their_logits(theirs))
    # Without `names`, too, and with the metadata alone.
    lj.save_adapter(tmp_path / "paths", adapter, plan=plan)
    for saved in (tmp_path, tmp_path / "paths"):
        back, _ = lj.load_adapter(saved, params)
        assert twins.equal(back.train, adapter.train)


@both
def test_trained_here(twin, tmp_path, monkeypatch, scan):
    """A plan made here says how the layers are repeated, by itself where it can."""
    pair = twin("llama")
    model, params = deeper(pair, scan)
    config = lj.LoraConfig(
        {r"layers/2/.*q_proj/kernel": {"rank": 3}, r".*(q|v)_proj/kernel": {}},
        rank=2,
        init=False,
        layer_replication=None if scan else RANGES,
    )
    plan = lj.plan(config, params, fn=model.apply, args=(twins.IDS,))
    assert plan.config.layer_replication == RANGES
    assert {s.path.split("/")[1] for s in plan} == {"0", "1", "2", "3"}
    adapter = twins.draw(plan, params)
    lj.save_adapter(tmp_path, adapter, plan=plan, names=model.names, params=params)
    theirs, result = open_in_peft(pair, tmp_path, monkeypatch)
    assert result.unexpected_keys == []
    assert [key for key in result.missing_keys if "lora_" in key] == []
    ours = twins.logits(model, params, adapter)
    assert np.abs(ours - twins.their_logits(theirs)).max() <= TOLERANCE
    shown = lj.LoraConfig.from_peft(tmp_path, model.names)
    assert shown.layer_replication == RANGES
    fields = shown.to_peft(model.names)
    assert fields["layer_replication"] == [[0, 2], [1, 3]]
    counted = lj.count(params, adapter)
    assert (counted.trainable, counted.total) == (plan.trainable, plan.total)
    theirs.print_trainable_parameters()
    theirs = [p for p in theirs.parameters()]
    assert counted.total == sum(p.numel() for p in theirs)


def test_scanned_and_unrolled_agree(twin):
    """The same values in the same places, and one adapter for both."""
    pair = twin("llama")
    adapters, logits = [], []
    for scan in (False, True):
        model, params = deeper(pair, scan)
        config = lj.LoraConfig(
            r".*_proj/kernel", rank=2, init=False, layer_replication=RANGES
        )
        plan = lj.plan(config, params, fn=model.apply, args=(twins.IDS,))
        adapter = lj.init(plan, params, key=jax.random.key(0))
        logits.append(twins.logits(model, params, adapter))
        adapters.append(adapter)
    assert np.abs(logits[0] - logits[1]).max() <= TOLERANCE
    for i in range(4):
        one = adapters[0].train[f"layers/{i}/mlp/up_proj/kernel"]["a"]
        other = adapters[1].train["layers/mlp/up_proj/kernel"]["a"][i]
        assert jnp.array_equal(one, other)


@pytest.mark.parametrize("case", ["lora", "dora", "rest"])
@both
def test_merged(twin, made, tmp_path, case, scan):
    """Merging builds the copies: in memory, and as a checkpoint of more layers."""
    folder, theirs = made(case)
    wanted = twins.their_logits(theirs)
    pair = twin("llama")
    model, params = deeper(pair, scan)
    adapter, _ = lj.load_adapter(folder, params, names=model.names)
    merged = lj.merge(params, adapter)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(merged))
    found = np.asarray(model.apply(merged, twins.IDS))
    assert np.abs(found - wanted).max() <= TOLERANCE
    lj.export_merged(
        pair.folder,
        adapter,
        tmp_path / "1",
        names=model.names,
        layer_replication=RANGES,
    )
    lj.export_merged(pair.folder, folder, tmp_path / "2", max_shard_size="20KB")
    for out in ("1", "2"):
        exported = twins.load_theirs(tmp_path / out)
        assert exported.config.num_hidden_layers == 4
        assert np.abs(twins.their_logits(exported) - wanted).max() <= TOLERANCE
        again, arrays = models.load(tmp_path / out, scan_layers=scan)
        logits = np.asarray(again.apply(arrays, twins.IDS))
        assert np.abs(logits - wanted).max() <= TOLERANCE


@both
def test_load_adapted(twin, made, scan):
    folder, theirs = made("lora")
    model, params, adapter, _ = models.load_adapted(
        folder, base=twin("llama").folder, scan_layers=scan
    )
    assert model.num_layers == 4
    wanted = twins.their_logits(theirs)
    assert np.abs(twins.logits(model, params, adapter) - wanted).max() <= TOLERANCE


@both
def test_other_layers_are_refused(twin, made, tmp_path, scan):
    folder, _ = made("lora")
    pair = twin("llama")
    model, params = pair.ours(scan)
    with pytest.raises(CheckpointError, match=r"lj\.replicate\(params, \(\(0, 2\)"):
        lj.load_adapter(folder, params, names=model.names, strict=False)
    config = lj.LoraConfig.from_peft(folder, model.names)
    with pytest.raises(PlanError, match=r"lj\.replicate\(params, \(\(0, 2\)"):
        lj.plan(config, params, fn=model.apply, args=(twins.IDS,))
    other, wrong = deeper(pair, scan, ((0, 2), (0, 2)))
    with pytest.raises(CheckpointError, match="stands for the layers"):
        lj.load_adapter(folder, wrong, names=other.names)
    peft_model(pair, target_modules=["q_proj"]).save_pretrained(tmp_path)
    if scan:  # a list of layers that are the same arrays may be a model's own
        with pytest.raises(CheckpointError, match="for a model whose layers are not"):
            lj.load_adapter(tmp_path, wrong, names=model.names)


def test_peft_must_be_told_of_which_layers(twin, tmp_path):
    model, params = deeper(twin("llama"), False)
    config = lj.LoraConfig(r".*q_proj/kernel", rank=2)
    plan = lj.plan(config, params, fn=model.apply, args=(twins.IDS,))
    adapter = lj.init(plan, params, key=jax.random.key(0))
    with pytest.raises(CheckpointError, match=r"layer_replication=\(\(0, 2\), \(1, 3"):
        lj.save_adapter(tmp_path, adapter, plan=plan, names=model.names)
