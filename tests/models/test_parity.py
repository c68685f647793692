"""The same weights in Transformers and here: the same logits, the same tokens."""

import jax
import numpy as np
import pytest

from lorax_jax import models

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Logits of order 3 in float32, whose last place is 2.4e-7: measured, the two differ by
# at most 2.6e-6, and each differs as much from the same model run in float64.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """`theirs(name, mapping)`: a random torch model and its saved checkpoint."""
    made = {}

    def make(name, mapping):
        if name not in made:
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(**mapping)
            model = transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation="eager"
            ).eval()
            with torch.no_grad():  # biases and norms start at 0 and 1: move them
                for leaf in model.parameters():
                    leaf.add_(0.1 * torch.randn_like(leaf))
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = model, folder
        return made[name]

    return make


def _logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(ids)).long(), **kwargs).logits.numpy()


def test_logits(theirs, family, mapping, scan, ids, record_property):
    torch_model, folder = theirs(family, mapping)
    model, params = models.load(folder, scan_layers=scan)
    ours = np.asarray(jax.jit(model.apply)(params, ids))
    difference = np.abs(ours - _logits(torch_model, ids)).max()
    record_property("max_abs_difference", float(difference))
    assert difference <= TOLERANCE


@pytest.mark.parametrize("name", ["llama3", "mistral", "gpt2"])
def test_logits_of_left_padded_rows(theirs, config_of, name, ragged):
    torch_model, folder = theirs(name, config_of(name))
    model, params = models.load(folder)
    batch, mask, _ = ragged
    ours = np.asarray(jax.jit(model.apply)(params, batch, mask=mask))
    wanted = _logits(
        torch_model,
        batch,
        attention_mask=torch.tensor(mask).long(),
        position_ids=torch.tensor(mask.cumsum(1) - 1).clamp(min=0),
    )
    assert np.abs(ours - wanted)[mask].max() <= TOLERANCE


def test_greedy_generation(theirs, family, mapping, ragged):
    torch_model, folder = theirs(family, mapping)
    model, params = models.load(folder)
    batch, mask, _ = ragged
    wanted = torch_model.generate(
        torch.tensor(batch).long(),
        attention_mask=torch.tensor(mask).long(),
        max_new_tokens=10,
        min_new_tokens=10,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=1,
    )
    ours, _ = models.generate(model.apply, params, batch, mask=mask, max_new_tokens=10)
    np.testing.assert_array_equal(np.asarray(ours), wanted.numpy())


def test_to_hf_gives_their_state_dict_back(theirs, family, mapping, scan):
    torch_model, folder = theirs(family, mapping)
    model, params = models.load(folder, scan_layers=scan)
    ours = models.to_hf(model, params)
    state = torch_model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert ours.keys() == state.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, state[name].numpy(), err_msg=name)


def test_bfloat16_is_as_close_as_their_bfloat16(theirs, config_of, ids):
    # Both round differently inside a layer; measured against float32, neither should
    # be much further off than the other.
    torch_model, folder = theirs("llama3", config_of("llama3"))
    exact = _logits(torch_model, ids)
    low = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager"
    )
    with torch.no_grad():
        their_logits = low(torch.tensor(np.asarray(ids)).long()).logits.float().numpy()
    model, params = models.load(folder, dtype="bfloat16")
    our_logits = np.asarray(model.apply(params, ids).astype("float32"))
    their_error = np.abs(their_logits - exact).mean()
    assert np.abs(our_logits - exact).mean() <= 1.5 * their_error
