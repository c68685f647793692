"""The same BERT in Transformers and here, short rows among long ones."""

import jax
import numpy as np
import pytest
from berts import BERT, MASK

from lorax_jax import models

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# States and logits of order 3 in float32, as in `test_parity.py`; measured, the two
# differ by at most 1.3e-6.
TOLERANCE = 1e-5

CASES = {
    "BertModel": {},
    "BertForMaskedLM": {},
    "BertForMaskedLM, untied": {"tie_word_embeddings": False},
    "BertForSequenceClassification": {"num_labels": 3},
    # What other checkpoints set differently.
    "BertModel, other": {
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "num_attention_heads": 2,
        "type_vocab_size": 3,
    },
}
TYPES = (np.arange(12) > 3)[None].repeat(2, 0).astype(np.int32)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """`theirs(case)`: a random torch model and its saved checkpoint."""
    made = {}

    def make(case):
        if case not in made:
            torch.manual_seed(0)
            settings = BERT | CASES[case]
            del settings["model_type"]
            config = transformers.BertConfig(**settings, attn_implementation="eager")
            model = getattr(transformers, case.split(",")[0])(config).eval()
            with torch.no_grad():  # biases and norms start at 0 and 1: move them
                for leaf in model.parameters():
                    leaf.add_(0.1 * torch.randn_like(leaf))
            folder = tmp_path_factory.mktemp("bert")
            model.save_pretrained(folder)
            made[case] = model, folder
        return made[case]

    return make


def _theirs(model, ids, mask, types):
    with torch.no_grad():
        return model(
            torch.tensor(np.asarray(ids)).long(),
            attention_mask=None if mask is None else torch.tensor(mask).long(),
            token_type_ids=None if types is None else torch.tensor(types).long(),
        )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_outputs(theirs, case, scan, padded, ids, record_property):
    torch_model, folder = theirs(case)
    model, params = models.load(folder, scan_layers=scan)
    mask, types = (MASK, TYPES) if padded else (None, None)
    wanted = _theirs(torch_model, ids, mask, types)
    ours = jax.jit(model.apply)(params, ids, mask=mask, types=types)
    if case.startswith("BertModel"):
        pooled = model.pooled(params, ours)
        np.testing.assert_allclose(pooled, wanted.pooler_output, atol=TOLERANCE)
        wanted = wanted.last_hidden_state
    else:
        wanted = wanted.logits
    difference = np.abs(np.asarray(ours) - wanted.numpy())
    if padded and difference.ndim == 3:
        difference = difference[MASK]
    record_property("max_abs_difference", float(difference.max()))
    assert difference.max() <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_to_hf_gives_their_state_dict_back(theirs, case, scan):
    torch_model, folder = theirs(case)
    ours = models.to_hf(*models.load(folder, scan_layers=scan))
    state = torch_model.state_dict()
    if case == "BertForMaskedLM":
        del state["cls.predictions.decoder.weight"]
        del state["cls.predictions.decoder.bias"]
    elif case.endswith("untied"):
        del state["cls.predictions.bias"]  # they add the decoder's own instead
    assert ours.keys() == state.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, state[name].numpy(), err_msg=name)
