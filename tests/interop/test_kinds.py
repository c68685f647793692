"""What is more than plain LoRA, against PEFT: files, outputs, gradients, merges."""

import json

import jax
import numpy as np
import pytest
import twins
from safetensors.numpy import load_file

import lorax_jax as lj

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TOLERANCE = 1e-5

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}

# Name -> family and what PEFT's LoraConfig gets beside the targets.
CASES = {
    "dora": ("llama", {"use_dora": True}),
    "dora rslora": ("llama", {"use_dora": True, "use_rslora": True}),
    "dora Conv1D": ("gpt2", {"use_dora": True}),
    "dora table": (
        "llama",
        {"use_dora": True, "target_modules": ["embed_tokens", "v_proj"]},
    ),
    "dora tied table": (
        "tied",
        {"use_dora": True, "target_modules": ["embed_tokens", "v_proj"]},
    ),
    "dora tied head": (
        "tied",
        {"use_dora": True, "target_modules": ["lm_head", "v_proj"]},
    ),
    "bias of B": ("gpt2", {"lora_bias": True}),
    "all biases": ("gpt2", {"bias": "all"}),
    "biases of targets": ("gpt2", {"bias": "lora_only"}),
    "both biases": ("gpt2", {"bias": "all", "lora_bias": True}),
    "head": ("llama", {"modules_to_save": ["lm_head"]}),
    "norms": ("llama", {"modules_to_save": ["norm"]}),
    "norms with biases": ("gpt2", {"modules_to_save": ["ln_f", "h.1.ln_1"]}),
    "tied table": (
        "tied",
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "rows": ("llama", {"trainable_token_indices": [5, 2, 90]}),
    "rows of a tied table": ("tied", {"trainable_token_indices": [5, 2, 90]}),
    "rows of a tied wte": ("gpt2", {"trainable_token_indices": {"wte": [7]}}),
    "rows of both": (
        "llama",
        {"trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [5, 3]}},
    ),
    "everything": (
        "gpt2",
        {
            "bias": "lora_only",
            "modules_to_save": ["ln_f"],
            "trainable_token_indices": [3, 4],
            "use_dora": True,
        },
    ),
}


def peft_model(pair, **config):
    """Their model with an adapter, every trained tensor moved."""
    import peft
    import torch

    config = {"r": 4, "lora_alpha": 7, "target_modules": _targets(pair)} | config
    config["task_type"] = "CAUSAL_LM"
    model = peft.get_peft_model(pair.fresh(), peft.LoraConfig(**config)).eval()
    torch.manual_seed(1)
    seen = set()
    with torch.no_grad():
        for _, leaf in model.named_parameters():
            if leaf.requires_grad and leaf.data_ptr() not in seen:
                seen.add(leaf.data_ptr())  # tied ones share their memory
                leaf.add_(0.05 * torch.randn_like(leaf))
    return model


def _targets(pair):
    return TARGETS["gpt2" if pair.family == "gpt2" else "llama"]


@pytest.fixture(scope="module")
def made(twin, tmp_path_factory):
    """`made(case)`: the twin, their model, and the folder that it saved."""
    done = {}

    def make(case):
        if case not in done:
            family, config = CASES[case]
            pair = twin(family)
            model = peft_model(pair, **config)
            folder = tmp_path_factory.mktemp("peft")
            model.save_pretrained(folder, save_embedding_layers=False)
            done[case] = pair, model, folder
        return done[case]

    return make


def weights_of(ids):
    """What turns logits into a number, so that gradients are of order one."""
    return np.random.default_rng(3).normal(0, 0.1, (*ids.shape, 97)).astype("f")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_outputs_and_gradients(made, tmp_path, record_property, case, scan):
    """Gradients are compared as files: each tensor under its own key."""
    import peft
    import torch

    pair, theirs, folder = made(case)
    model, params = pair.ours(scan)
    adapter, receipt = lj.load_adapter(folder, params, names=model.names)
    assert not receipt.problems and receipt.sites == receipt.expected
    forward = lj.adapt(model.apply)
    weights = weights_of(twins.IDS)

    def loss(train):
        bound = lj.bind(params, lj.Adapter(train, adapter.fixed))
        logits = forward(bound, twins.IDS)
        return (logits * weights).sum(), logits

    (_, ours), grads = jax.value_and_grad(loss, has_aux=True)(adapter.train)
    logits = theirs(torch.tensor(twins.IDS).long()).logits
    theirs.zero_grad()
    (logits * torch.tensor(weights)).sum().backward()
    difference = np.abs(np.asarray(ours) - logits.detach().numpy()).max()
    record_property("max_abs_difference", float(difference))
    assert difference <= TOLERANCE
    assert np.abs(ours - twins.logits(model, params)).max() > 0.01  # it acts

    moved = adapter._replace(train=grads)
    lj.save_adapter(tmp_path, moved, plan=receipt.plan, names=model.names)
    found = load_file(tmp_path / TENSORS)
    state = {}
    for name, leaf in theirs.state_dict(keep_vars=True).items():
        state[name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    wanted = peft.get_peft_model_state_dict(
        theirs, state_dict=state, save_embedding_layers=False
    )
    assert wanted.keys() == found.keys()
    for key, gradient in wanted.items():
        gradient = gradient.numpy()
        if key.endswith("tokens_delta"):
            gradient = gradient[np.argsort(ids_of(folder, key))]
        scale = max(np.abs(gradient).max(), 1.0)
        assert np.abs(gradient).max() > 0, key
        assert np.abs(found[key] - gradient).max() <= TOLERANCE * scale, key


def ids_of(folder, key):
    """Which rows a tensor of theirs holds."""
    asked = json.loads((folder / CONFIG).read_text())["trainable_token_indices"]
    if isinstance(asked, list):
        return asked
    return next(ids for name, ids in asked.items() if f"{name}.token_adapter" in key)


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_again(made, tmp_path, case):
    """PEFT -> here -> PEFT: the same tensors, and the same function."""
    import peft

    pair, theirs, folder = made(case)
    model, params = pair.ours(True)
    adapter, receipt = lj.load_adapter(folder, params, names=model.names)
    lj.save_adapter(tmp_path, adapter, plan=receipt.plan, names=model.names)
    one, other = load_file(folder / TENSORS), load_file(tmp_path / TENSORS)
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype
        if key.endswith("tokens_delta"):  # here ascending, there as they were asked for
            one[key] = one[key][np.argsort(ids_of(folder, key))]
        assert np.array_equal(one[key], other[key]), key
    again, _ = lj.load_adapter(tmp_path, params)
    assert twins.equal(again, adapter)
    opened = peft.PeftModel.from_pretrained(pair.fresh(), tmp_path).eval()
    wanted = twins.their_logits(theirs)
    assert np.array_equal(twins.their_logits(opened), wanted)
    trained = {n for n, p in theirs.named_parameters() if p.requires_grad}
    opened = peft.PeftModel.from_pretrained(pair.fresh(), tmp_path, is_trainable=True)
    assert {n for n, p in opened.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("case", CASES)
def test_merged(made, tmp_path, record_property, case):
    """`merge`, and `export_merged` without a model of ours."""
    import torch

    from lorax_jax import models

    pair, theirs, folder = made(case)
    model, params = pair.ours()
    adapter, _ = lj.load_adapter(folder, params, names=model.names)
    wanted = twins.their_logits(theirs)
    lj.export_merged(pair.folder, folder, tmp_path / "out")
    merged = twins.load_theirs(tmp_path / "out")
    assert np.abs(twins.their_logits(merged) - wanted).max() <= TOLERANCE
    if case in ("dora tied table", "dora tied head"):
        return  # no one matrix does both uses
    import copy

    with torch.no_grad():
        state = copy.deepcopy(theirs).merge_and_unload().state_dict()
    found = models.to_hf(model, lj.merge(params, adapter))
    error = max(np.abs(found[name] - state[name].numpy()).max() for name in found)
    record_property("max_abs_difference", float(error))
    assert error <= 1e-6


@pytest.mark.parametrize("case", CASES)
def test_the_configuration_alone(made, case):
    """`from_peft` plans what PEFT adapts; `to_peft` has PEFT train the same."""
    import peft

    pair, theirs, folder = made(case)
    model, params = pair.ours()
    config = lj.LoraConfig.from_peft(folder, model.names)
    plan = lj.plan(config, params, fn=model.apply, args=(twins.IDS,))
    adapter, receipt = lj.load_adapter(folder, params, names=model.names, plan=plan)
    assert receipt.plan is plan and not receipt.problems
    fields = config.to_peft(model.names)
    fields = {k: v for k, v in fields.items() if k not in ("peft_type", "peft_version")}
    again = peft.get_peft_model(
        pair.fresh(), peft.LoraConfig(**fields | {"task_type": "CAUSAL_LM"})
    )

    def trained(model):
        return {
            name: leaf.shape
            for name, leaf in model.named_parameters()
            if leaf.requires_grad
        }

    assert trained(again) == trained(theirs)
    assert sum(np.prod(x) for x in trained(theirs).values()) == plan.trainable


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"use_dora": True}, {"use_dora": True}),
        ({}, {"use_dora": True}),
        ({"use_dora": True}, {}),
    ],
    ids=["dora dora", "lora dora", "dora lora"],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_two_in_order(twin, tmp_path, family, first, second):
    """Adapters act in order, and each norm is that of the base and its own delta."""
    import peft
    import torch

    pair = twin(family)
    targets = _targets(pair)
    config = {"r": 4, "lora_alpha": 7, "target_modules": targets}
    one, other = (peft.LoraConfig(**config | c) for c in (first, second))
    theirs = peft.get_peft_model(pair.fresh(), one, "one").eval()
    theirs.add_adapter("other", other)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, leaf in theirs.named_parameters():
            if "lora_" in name:
                leaf.add_(0.1 * torch.randn_like(leaf))
    theirs.save_pretrained(tmp_path)
    model, params = pair.ours()
    both = [
        lj.load_adapter(tmp_path / name, params, names=model.names)[0]
        for name in ("one", "other")
    ]
    results = []
    for order in (("one", "other"), ("other", "one")):
        theirs.base_model.set_adapter(list(order))
        adapters = [both[("one", "other").index(name)] for name in order]
        bound = lj.bind(params, *adapters)
        ours = np.asarray(lj.adapt(model.apply)(bound, twins.IDS))
        wanted = twins.their_logits(theirs)
        assert np.abs(ours - wanted).max() <= TOLERANCE
        results.append(wanted)
    assert np.abs(results[0] - results[1]).max() > 100 * TOLERANCE  # order matters


HEADS = {"SEQ_CLS": "score", "TOKEN_CLS": "classifier", "QUESTION_ANS": "qa_outputs"}


@pytest.mark.parametrize("task", HEADS)
def test_heads_that_come_with_a_task(task):
    names = [
        ("q/kernel", "q.weight", "linear"),
        ("head/kernel", f"{HEADS[task]}.weight", "linear"),
        ("head/bias", f"{HEADS[task]}.bias", "same"),
    ]
    fields = {"peft_type": "LORA", "target_modules": ["q"], "task_type": task}
    found = lj.LoraConfig.from_peft(fields, names)
    assert found.whole == ("head/kernel", "head/bias")
    assert json.loads(json.dumps(found.to_peft(names)))["modules_to_save"] == [
        HEADS[task]
    ]


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_dropout_with_their_mask(twin, tmp_path, monkeypatch, dora):
    """The same mask on both sides: what it drops, and in which part of the formula."""
    import torch

    pair = twin("llama")
    theirs = peft_model(pair, use_dora=dora, lora_dropout=0.25).train()
    theirs.save_pretrained(tmp_path)
    masks = {}

    def mask_of(key, keep, shape):
        assert abs(float(keep) - 0.75) < 1e-6
        draw = np.random.default_rng(shape[-1])
        return masks.setdefault(shape, draw.random(shape) < 0.75)

    class Fixed(torch.nn.Dropout):
        def forward(self, x):
            mask = mask_of(None, 0.75, tuple(x.shape))
            return torch.where(torch.tensor(mask), x / 0.75, torch.zeros(()))

    for module in theirs.modules():
        if hasattr(module, "lora_dropout") and module.lora_dropout:
            module.lora_dropout["default"] = Fixed()
    monkeypatch.setattr(jax.random, "bernoulli", mask_of)
    model, params = pair.ours()
    adapter, _ = lj.load_adapter(tmp_path, params, names=model.names)
    bound = lj.bind(params, adapter, key=jax.random.key(0))
    ours = np.asarray(lj.adapt(model.apply)(bound, twins.IDS))
    assert {shape[-1] for shape in masks} == {32, 48}
    wanted = twins.their_logits(theirs)
    assert np.abs(ours - wanted).max() <= TOLERANCE
    assert np.abs(ours - twins.logits(model, params, adapter)).max() > 0.01  # it drops
