"""Adapters for BERT, from PEFT and to it: bare encoders and masked-LM heads."""

import json

import numpy as np
import pytest
import twins
from berts import BERT, MASK
from safetensors.numpy import load_file

import lorax_jax as lj
from lorax_jax import models

# States and logits of order 3 in float32; measured, at most 1.2e-6.
TOLERANCE = 1e-5
IDS = np.random.default_rng(0).integers(2, 97, (2, 12)).astype(np.int32)
CASES = {
    "query and value": ("BertModel", {"target_modules": ["query", "value"]}),
    # What PEFT adapts of a BERT when it is told nothing.
    "nothing said": ("BertForMaskedLM", {}),
    "all-linear": ("BertForMaskedLM", {"target_modules": "all-linear"}),
    "tables": (
        "BertModel",
        {"target_modules": ["word_embeddings", "output.dense"], "use_rslora": True},
    ),
    "head": ("BertForMaskedLM", {"target_modules": ["decoder", "key"]}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(case)`: their base's folder, PEFT's folder, and what theirs gives."""
    done = {}

    def make(case):
        if case not in done:
            name, config = CASES[case]
            base = save_base(name, tmp_path_factory.mktemp("base"))
            model = peft_model(name, base, config)
            folder = tmp_path_factory.mktemp("peft")
            model.save_pretrained(folder)
            done[case] = base, folder, theirs(model)
        return done[case]

    return make


def save_base(name, folder):
    import torch
    import transformers

    torch.manual_seed(0)
    settings = {key: value for key, value in BERT.items() if key != "model_type"}
    model = getattr(transformers, name)(transformers.BertConfig(**settings))
    with torch.no_grad():  # biases and norms start at 0 and 1: move them
        for leaf in model.parameters():
            leaf.add_(0.05 * torch.randn_like(leaf))
    model.save_pretrained(folder)
    return folder


def load_theirs(name, folder):
    import transformers

    return getattr(transformers, name).from_pretrained(
        folder, attn_implementation="eager"
    )


def peft_model(name, base, config):
    """Their model with an adapter whose B is not zero."""
    import peft
    import torch

    config = peft.LoraConfig(r=4, lora_alpha=7, **config)
    model = peft.get_peft_model(load_theirs(name, base), config).eval()
    with torch.no_grad():
        for key, leaf in model.named_parameters():
            if "lora_" in key:
                leaf.copy_(0.1 * torch.randn_like(leaf))
    return model


def theirs(model):
    """States or logits of the real tokens."""
    import torch

    with torch.no_grad():
        out = model(torch.tensor(IDS).long(), attention_mask=torch.tensor(MASK).long())
    return out[0].numpy()[MASK]


def ours(model, params, adapter=None):
    if adapter is not None:
        params = lj.bind(params, adapter)
    return np.asarray(lj.adapt(model.apply)(params, IDS, mask=MASK))[MASK]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_theirs_here(made, case, scan, record_property):
    base, folder, wanted = made(case)
    model, params, adapter, receipt = models.load_adapted(
        folder, base=base, scan_layers=scan
    )
    assert not receipt.problems and receipt.sites == receipt.expected
    found = ours(model, params, adapter)
    difference = np.abs(found - wanted).max()
    record_property("max_abs_difference", float(difference))
    assert difference <= TOLERANCE
    assert np.abs(found - ours(model, params)).max() > 0.01  # it acts


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_again(made, tmp_path, case):
    import peft

    base, folder, wanted = made(case)
    model, params, adapter, receipt = models.load_adapted(
        folder, base=base, scan_layers=True
    )
    lj.save_adapter(tmp_path, adapter, plan=receipt.plan, names=model.names)
    tensors = [load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path)]
    assert set(tensors[0]) - set(tensors[1]) == {
        key.split(" ")[0] for key in receipt.ignored
    }
    assert all(np.array_equal(tensors[0][key], tensors[1][key]) for key in tensors[1])
    back = peft.PeftModel.from_pretrained(
        load_theirs(CASES[case][0], base), tmp_path
    ).eval()
    assert np.abs(theirs(back) - wanted).max() <= TOLERANCE


@pytest.mark.parametrize("case", ["query and value", "nothing said", "all-linear"])
def test_the_configuration_alone(made, case):
    """`from_peft` plans what PEFT adapts."""
    base, folder, _ = made(case)
    model, params = models.load(base)
    config = lj.LoraConfig.from_peft(folder, model.names)
    plan = lj.plan(config, params, fn=model.apply, args=(IDS,))
    names = lj.checkpoint.NameMap.of(model.names)
    there = {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        for key in load_file(folder / "adapter_model.safetensors")
        if "lora_A" in key
    }
    assert {names.module(site.path) for site in plan} == there


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_nothing_said_here_is_query_and_value(made, tmp_path, scan):
    import peft

    base, _, _ = made("query and value")
    model, params = models.load(base, scan_layers=scan)
    plan = lj.plan(lj.LoraConfig(rank=2), params, fn=model.apply, args=(IDS,))
    assert len(plan) == 4
    adapter = twins.draw(plan)
    lj.save_adapter(tmp_path, adapter, plan=plan, names=model.names)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["fan_in_fan_out"] is False
    back = peft.PeftModel.from_pretrained(load_theirs("BertModel", base), tmp_path)
    found = ours(model, params, adapter)
    assert np.abs(theirs(back.eval()) - found).max() <= TOLERANCE
    assert np.abs(found - ours(model, params)).max() > 0.01  # it acts


def test_merged_in_transformers(made, tmp_path):
    base, folder, wanted = made("all-linear")
    lj.export_merged(base, folder, tmp_path / "out")
    merged = load_theirs("BertForMaskedLM", tmp_path / "out").eval()
    assert np.abs(theirs(merged) - wanted).max() <= TOLERANCE
