"""New tokens on both sides: files, logits, merges, tied and untied."""

import json

import numpy as np
import pytest
import twins
from safetensors.numpy import load_file

import lorax_jax as lj
from lorax_jax import models
from lorax_jax._errors import CheckpointError

TENSORS = "adapter_model.safetensors"
TOLERANCE = 1e-5
BEFORE, AFTER = 97, 101
NEW = (97, 98, 99, 100)
# Old tokens and new ones.
IDS = np.where(np.arange(24).reshape(2, 12) % 5 == 0, 99, twins.IDS).astype(np.int32)
IDS[0, 3:7] = NEW

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}


def logits(model):
    """What theirs gives."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(IDS).long()).logits.float().numpy()


def resized(pair):
    """Their model with as many tokens."""
    model = pair.fresh()
    model.resize_token_embeddings(AFTER)
    return model


@pytest.fixture(scope="module")
def made(twin, adapted, tmp_path_factory):
    """`made(family)`: a grown model of ours, an adapter that acts, and its folder."""
    done = {}

    def make(family):
        if family not in done:
            pair = twin(family)
            model, params, growth = models.grow(*pair.ours(), to=AFTER)
            config = lj.LoraConfig(
                twins.RULES, rank=4, alpha=7, token_rows=growth.token_rows
            )
            plan = lj.plan(config, params, fn=model.apply, args=(IDS,))
            adapter = twins.draw(plan, params)
            folder = tmp_path_factory.mktemp("ours")
            lj.save_adapter(
                folder,
                adapter,
                plan=plan,
                names=model.names,
                params=params,
                base_model_name_or_path=str(pair.folder),
                task_type="CAUSAL_LM",
                grown=growth,
            )
            bound = lj.bind(params, adapter)
            ours = np.asarray(lj.adapt(model.apply)(bound, IDS))
            done[family] = pair, model, params, adapter, folder, ours
        return done[family]

    return make


@pytest.mark.parametrize("family", twins.FAMILIES)
def test_ours_in_peft(made, record_property, family):
    """Every row of theirs that is new comes from the file, whatever they put there."""
    import peft

    pair, _, _, _, folder, ours = made(family)
    opened = peft.PeftModel.from_pretrained(resized(pair), folder).eval()
    state = peft.get_peft_model_state_dict(opened, save_embedding_layers=False)
    found = load_file(folder / TENSORS)
    assert state.keys() == found.keys()  # nothing is missing, nothing left over
    fresh = peft.get_peft_model(resized(pair), peft.LoraConfig.from_pretrained(folder))
    weights = peft.load_peft_weights(str(folder))
    result = peft.set_peft_model_state_dict(fresh, weights)
    assert not result.unexpected_keys
    # A tied head hands on the table's rows, and has a key that no file holds.
    lost = [key.split(".")[-4] for key in result.missing_keys if "delta" in key]
    assert lost == ([] if family == "llama" else ["lm_head"])
    assert not [key for key in result.missing_keys if "lora_" in key]
    theirs = logits(opened)
    assert theirs.shape == ours.shape == (2, 12, AFTER)
    difference = np.abs(theirs - ours)
    record_property("max_abs_difference", float(difference.max()))
    assert difference[..., :BEFORE].max() <= TOLERANCE
    assert difference[..., BEFORE:].max() <= TOLERANCE
    assert np.abs(theirs - logits(resized(pair))).max() > 0.01  # it acts


@pytest.mark.parametrize("family", twins.FAMILIES)
def test_ours_back_here(made, family):
    """The base grows by itself, and the file holds the rows alone."""
    _, model, params, adapter, folder, ours = made(family)
    loaded = lj.models.load_adapted(folder)
    assert loaded.model == model and not loaded.receipt.problems
    assert twins.equal(loaded.params, params) and twins.equal(loaded.adapter, adapter)
    rows = [x for name, x in load_file(folder / TENSORS).items() if "delta" in name]
    assert [x.shape for x in rows] == [(len(NEW), 32)] * (2 if family == "llama" else 1)


@pytest.mark.parametrize("family", twins.FAMILIES)
def test_ours_merged(made, tmp_path, family):
    """`export_merged`, from a folder and from memory, reopened by Transformers."""
    pair, model, params, adapter, folder, ours = made(family)
    lj.export_merged(pair.folder, folder, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["vocab_size"] == AFTER
    merged = twins.load_theirs(tmp_path / "a")
    assert np.abs(logits(merged) - ours).max() <= TOLERANCE
    axes = models.token_axes(model)
    _, growth = lj.grow(pair.ours()[1], axes, to=AFTER)
    names = {"names": model.names, "grown": growth}
    lj.export_merged(pair.folder, adapter, tmp_path / "b", **names)
    wanted = models.to_hf(model, lj.merge(params, adapter))
    for name in ("a", "b"):
        found = load_file(tmp_path / name / "model.safetensors")
        assert found.keys() == wanted.keys()
        assert all(np.array_equal(found[key], wanted[key]) for key in wanted)


@pytest.fixture(scope="module")
def theirs(twin, tmp_path_factory):
    """`theirs(family, rows)`: the twin, their model, and the folder that it saved."""
    import peft
    import torch

    done = {}

    def make(family, rows):
        if (family, repr(rows)) not in done:
            pair = twin(family)
            targets = TARGETS["gpt2" if family == "gpt2" else "llama"]
            config = peft.LoraConfig(
                r=4,
                lora_alpha=7,
                target_modules=targets,
                trainable_token_indices=rows,
                task_type="CAUSAL_LM",
            )
            model = peft.get_peft_model(resized(pair), config).eval()
            torch.manual_seed(1)
            with torch.no_grad():
                for leaf in model.parameters():
                    if leaf.requires_grad:
                        leaf.add_(0.05 * torch.randn_like(leaf))
            folder = tmp_path_factory.mktemp("peft")
            model.save_pretrained(folder, save_embedding_layers=False)
            done[family, repr(rows)] = pair, logits(model), folder
        return done[family, repr(rows)]

    return make


ALL = [*NEW, 5]
THEIRS = {
    "tied": ("tied", ALL),
    "gpt2": ("gpt2", ALL),
    "untied": ("llama", {"embed_tokens": ALL, "lm_head": [*NEW]}),
    "untied, the table alone": ("llama", ALL),
}


@pytest.mark.parametrize("case", THEIRS)
def test_theirs_here(theirs, tmp_path, record_property, case):
    pair, wanted, folder = theirs(*THEIRS[case])
    loaded = lj.models.load_adapted(folder, base=pair.folder)
    assert loaded.model.config.vocab_size == AFTER and not loaded.receipt.problems
    bound = lj.bind(loaded.params, loaded.adapter)
    found = np.asarray(lj.adapt(loaded.model.apply)(bound, IDS))
    difference = float(np.abs(found - wanted).max())
    record_property("max_abs_difference", difference)
    tolerance = TOLERANCE
    if case == "untied, the table alone":
        # The head's new rows are in no file. Ours are the mean w; theirs are drawn
        # around it, with the covariance 1e-9 times that of w: 4e-6 an entry here, and
        # 3e-5 in a logit, whose 32 inputs are of order one. Five of those:
        tolerance = 1.5e-4
    assert difference <= tolerance
    lj.export_merged(pair.folder, folder, tmp_path / "out")
    merged = twins.load_theirs(tmp_path / "out")
    assert np.abs(logits(merged) - wanted).max() <= tolerance


def test_theirs_on_a_base_that_has_not_grown(theirs):
    pair, _, folder = theirs("tied", ALL)
    model, params = pair.ours()
    with pytest.raises(
        CheckpointError,
        match=r"trains row 100 of 'embed_tokens/.*, which has 97 .*"
        r"`params, _ = lj.grow\(params, lj.checkpoint.read_growth\(.*, params, names=",
    ):
        lj.load_adapter(folder, params, names=model.names)
    growth = lj.checkpoint.read_growth(folder, params, names=model.names)
    grown, _ = lj.grow(params, growth)
    adapter, receipt = lj.load_adapter(folder, grown, names=model.names)
    assert not receipt.problems
    with pytest.raises(CheckpointError, match="Give `params` and `names` too"):
        lj.checkpoint.read_growth(folder)
