"""Adapters that PEFT made, opened here."""

import json

import jax
import numpy as np
import pytest
import twins
from safetensors.numpy import load_file, save_file

import lorax_jax as lj
from lorax_jax._errors import CheckpointError

TOLERANCE = 1e-5
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ATTENTION = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}

# Name -> family and the arguments of PEFT's LoraConfig.
CASES = {
    "suffixes": ("llama", {"target_modules": ["q_proj", "mlp.down_proj"]}),
    "regex": ("llama", {"target_modules": r".*layers\.(0|2)\..*(up|o)_proj"}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "all-linear gpt2": ("gpt2", {"target_modules": "all-linear"}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "up_proj": 6},
            "alpha_pattern": {r"layers\.[12]\..*k_proj": 3},
        },
    ),
    "rslora": (
        "gpt2",
        {
            "target_modules": ["c_attn", "c_proj"],
            "use_rslora": True,
            "rank_pattern": {"mlp.c_proj": 2},
        },
    ),
    "some layers": (
        "llama",
        {
            "target_modules": ["v_proj", "model.layers.0.mlp.up_proj"],
            "layers_to_transform": [1, 2],
            "layers_pattern": "layers",
        },
    ),
    "excluded": (
        "tied",
        {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    ),
    "dropout": ("tied", {"target_modules": ["q_proj"], "lora_dropout": 0.25}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "square": ("gpt2", {"target_modules": ["attn.c_proj"]}),
    "positions": ("gpt2", {"target_modules": ["wpe", "c_fc"]}),
    "lookup": ("tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": ("tied", {"target_modules": ["lm_head", "q_proj"]}),
    "both": ("tied", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "shared": (
        "tied",
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "shared gpt2": (
        "gpt2",
        {"target_modules": ["wte", "lm_head"], "ensure_weight_tying": True},
    ),
    "both gpt2": ("gpt2", {"target_modules": ["wte", "lm_head", "c_attn"]}),
    "gaussian": (
        "llama",
        {"target_modules": ["o_proj"], "init_lora_weights": "gaussian"},
    ),
}

# PEFT knows tied tables by the name `embed_tokens` and takes `lm_head` out of the
# targets that it saves. Where the table has another name, it does not find the head's
# half of the adapter in its own folder again. Ours keeps both targets.
LOST_BY_PEFT = {"shared gpt2"}


def peft_model(twin, **config):
    """Their model with an adapter whose B is not zero."""
    import peft
    import torch

    config = {"r": 4, "lora_alpha": 7, "task_type": "CAUSAL_LM"} | config
    model = peft.get_peft_model(twin.fresh(), peft.LoraConfig(**config)).eval()
    torch.manual_seed(1)
    seen = set()
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            if "lora_" in name and leaf.data_ptr() not in seen:
                seen.add(leaf.data_ptr())  # tied ones share their memory
                leaf.copy_(0.1 * torch.randn_like(leaf))
    return model


@pytest.fixture(scope="module")
def made(twin, tmp_path_factory):
    """`made(case)`: the twin, the folder that PEFT saved, and their logits."""
    done = {}

    def make(case):
        if case not in done:
            family, config = CASES[case]
            pair = twin(family)
            model = peft_model(pair, **config)
            folder = tmp_path_factory.mktemp("peft")
            model.save_pretrained(folder)
            done[case] = pair, folder, twins.their_logits(model)
        return done[case]

    return make


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_logits(made, record_property, case, scan):
    pair, folder, wanted = made(case)
    model, params = pair.ours(scan)
    adapter, receipt = lj.load_adapter(folder, params, names=model.names)
    assert not receipt.problems and receipt.sites == receipt.expected
    ours = twins.logits(model, params, adapter)
    difference = np.abs(ours - wanted).max()
    record_property("max_abs_difference", float(difference))
    assert difference <= TOLERANCE
    assert np.abs(ours - twins.logits(model, params)).max() > 0.01  # it acts


def modules_of(model):
    """Rank and scale of every adapted module."""
    return {
        name: (dict(module.r), dict(module.scaling))
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and module.r
    }


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_again(made, tmp_path, case):
    """PEFT -> here -> PEFT: the same tensors, a configuration of the same meaning."""
    import peft

    pair, folder, wanted = made(case)
    model, params = pair.ours(True)
    adapter, receipt = lj.load_adapter(folder, params, names=model.names)
    lj.save_adapter(tmp_path, adapter, plan=receipt.plan, names=model.names)
    theirs, ours = load_file(folder / TENSORS), load_file(tmp_path / TENSORS)
    # PEFT adds copies of the base's embeddings; nothing of the adapter is lost.
    assert set(theirs) - set(ours) == {k.split(" ")[0] for k in receipt.ignored}
    assert all(np.array_equal(theirs[key], ours[key]) for key in ours)
    assert all(theirs[key].dtype == ours[key].dtype for key in ours)
    other = peft.PeftModel.from_pretrained(pair.fresh(), tmp_path)
    assert np.abs(twins.their_logits(other) - wanted).max() <= TOLERANCE
    if case not in LOST_BY_PEFT:
        one = peft.PeftModel.from_pretrained(pair.fresh(), folder)
        assert modules_of(one) == modules_of(other)
        assert np.array_equal(twins.their_logits(one), twins.their_logits(other))
    again, _ = lj.load_adapter(tmp_path, params)
    assert twins.equal(again, adapter)


@pytest.mark.parametrize("case", CASES)
def test_merged_from_peft(made, tmp_path, record_property, case):
    """`export_merged` needs no model of ours to merge PEFT's folder."""
    pair, folder, wanted = made(case)
    lj.export_merged(pair.folder, folder, tmp_path / "out")
    merged = twins.load_theirs(tmp_path / "out")
    difference = np.abs(twins.their_logits(merged) - wanted).max()
    record_property("max_abs_difference", float(difference))
    assert difference <= TOLERANCE


@pytest.mark.parametrize(
    "case", sorted(CASES.keys() - {"both", "both gpt2", "dropout"} - LOST_BY_PEFT)
)
def test_the_configuration_alone(made, case):
    """`from_peft` plans what PEFT adapts, at its ranks and scales."""
    import peft

    pair, folder, _ = made(case)
    model, params = pair.ours()
    names = lj.checkpoint.NameMap.of(model.names)
    config = lj.LoraConfig.from_peft(folder, model.names)
    plan = lj.plan(config, params, fn=model.apply, args=(twins.IDS,))
    there = modules_of(peft.PeftModel.from_pretrained(pair.fresh(), folder))
    found = {
        name.removeprefix("base_model.model."): (rank["default"], scale["default"])
        for name, (rank, scale) in there.items()
    }
    ours = {}
    for site in plan:
        module = names.head if site.use == "head" else names.module(site.path)
        ours[module] = site.rank, site.scale
        if case.startswith("shared") and site.path == names.tied:
            ours[names.head] = site.rank, site.scale
    assert ours == found
    # The plan may also be told to the loader, which then checks it.
    adapter, receipt = lj.load_adapter(folder, params, names=names, plan=plan)
    assert receipt.plan is plan and not receipt.problems


@pytest.mark.parametrize(
    "case", sorted(CASES.keys() - {"both", "both gpt2"} - LOST_BY_PEFT)
)
def test_a_configuration_written_here(made, case):
    """`to_peft` gives PEFT what makes the same modules of the same ranks."""
    import peft

    pair, folder, _ = made(case)
    model = pair.ours()[0]
    config = lj.LoraConfig.from_peft(folder, model.names)
    fields = config.to_peft(model.names)
    fields = {k: v for k, v in fields.items() if k not in ("peft_type", "peft_version")}
    theirs = peft.get_peft_model(pair.fresh(), peft.LoraConfig(**fields))
    there = modules_of(peft.PeftModel.from_pretrained(pair.fresh(), folder))
    assert modules_of(theirs) == there


def test_without_the_prefix(made, tmp_path):
    """`inject_adapter_in_model` saves keys without PEFT's prefix."""
    import peft
    import torch

    pair, folder, _ = made("suffixes")
    model = pair.fresh()
    config = peft.LoraConfig.from_pretrained(folder)
    peft.inject_adapter_in_model(config, model)
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            if "lora_" in name:
                leaf.copy_(0.1 * torch.randn_like(leaf))
    state = peft.get_peft_model_state_dict(model)
    assert not any(key.startswith("base_model.") for key in state)
    save_file({k: v.numpy() for k, v in state.items()}, tmp_path / TENSORS)
    (tmp_path / CONFIG).write_text((folder / CONFIG).read_text())
    ours, params = pair.ours(True)
    adapter, _ = lj.load_adapter(tmp_path, params, names=ours.names)
    difference = twins.logits(ours, params, adapter) - twins.their_logits(model)
    assert np.abs(difference).max() <= TOLERANCE


def test_square_kernels_beside_a_head(twin, tmp_path):
    """PEFT writes the layout of whichever module it saw last: not enough to go by."""
    pair = twin("gpt2")
    targets = ["attn.c_proj", "lm_head"]
    theirs = peft_model(pair, target_modules=targets)
    theirs.save_pretrained(tmp_path / "a")
    assert not json.loads((tmp_path / "a" / CONFIG).read_text())["fan_in_fan_out"]
    model, params = pair.ours()
    with pytest.raises(CheckpointError, match="is square, .* Give the `plan`"):
        lj.load_adapter(tmp_path / "a", params, names=model.names)
    config = lj.LoraConfig.from_peft(tmp_path / "a", model.names)
    plan = lj.plan(config, params, fn=model.apply, args=(twins.IDS,))
    adapter, _ = lj.load_adapter(tmp_path / "a", params, names=model.names, plan=plan)
    wanted = twins.their_logits(theirs)
    assert np.abs(twins.logits(model, params, adapter) - wanted).max() <= TOLERANCE
    lj.export_merged(pair.folder, tmp_path / "a", tmp_path / "out")  # GPT-2 is known
    merged = twins.load_theirs(tmp_path / "out")
    assert np.abs(twins.their_logits(merged) - wanted).max() <= TOLERANCE


# --- What is not known here -----------------------------------------------------------

REFUSED = {
    "alora_invocation_tokens": {"alora_invocation_tokens": [5]},
    "init_lora_weights": {"init_lora_weights": "pissa_niter_2"},
}


@pytest.mark.parametrize("field", REFUSED)
def test_refused_by_name(twin, tmp_path, field):
    pair = twin("llama")
    peft_model(pair, target_modules=["q_proj"], **REFUSED[field]).save_pretrained(
        tmp_path
    )
    model, params = pair.ours()
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=field):
            lj.load_adapter(tmp_path, params, names=model.names, strict=strict)
    with pytest.raises(CheckpointError, match=field):
        lj.export_merged(pair.folder, tmp_path, tmp_path / ".." / "out")


def test_converted_factors_load(twin, tmp_path):
    """PiSSA that PEFT converted is plain LoRA of twice the rank."""
    import peft
    import torch

    pair = twin("llama")
    start = peft.LoraConfig(
        r=4,
        lora_alpha=7,
        target_modules=["q_proj", "up_proj"],
        init_lora_weights="pissa",
    )
    model = peft.get_peft_model(pair.fresh(), start).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            if "lora_" in name:
                leaf.add_(0.05 * torch.randn_like(leaf))
    wanted = twins.their_logits(model)
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start"
    )
    ours, params = pair.ours(True)
    adapter, receipt = lj.load_adapter(tmp_path / "plain", params, names=ours.names)
    assert {site.rank for site in receipt.plan} == {8}
    assert np.abs(twins.logits(ours, params, adapter) - wanted).max() <= 2 * TOLERANCE


def test_a_resized_vocabulary_is_noticed(twin, tmp_path):
    pair = twin("llama")
    model = pair.fresh()
    model.resize_token_embeddings(100)
    import peft

    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(
        tmp_path, save_embedding_layers=True
    )
    ours, params = pair.ours()
    with pytest.raises(CheckpointError, match="unexpected .*embed_tokens.weight"):
        lj.load_adapter(tmp_path, params, names=ours.names)


def test_training_goes_on_here(made):
    """The factors of a loaded file are leaves like any other."""
    pair, folder, _ = made("patterns")
    model, params = pair.ours(True)
    adapter, _ = lj.load_adapter(folder, params, names=model.names)

    def loss(train):
        bound = lj.bind(params, lj.Adapter(train, adapter.fixed))
        return (lj.adapt(model.apply)(bound, twins.IDS) ** 2).mean()

    grads = jax.tree.leaves(jax.grad(loss)(adapter.train))
    assert all(np.abs(grad).max() > 0 for grad in grads)


def test_the_fields_that_peft_writes(made):
    """A new field in a new PEFT is for somebody to read about."""
    _, folder, _ = made("suffixes")
    from lorax_jax import _peft

    assert set(json.loads((folder / CONFIG).read_text())) == set(_peft.DEFAULTS)
