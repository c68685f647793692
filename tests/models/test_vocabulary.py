"""Models with more tokens than their checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_jax import models
from lorax_jax._errors import GrowthError

LLAMA = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
BERT = {
    "model_type": "bert",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "architectures": ["BertForMaskedLM"],
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 11,
    "n_embd": 8,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 11,  # as many as tokens: sizes do not tell
}
WORDS = "embeddings/word_embeddings/embedding"
CASES = {
    "untied": (LLAMA, {"embed_tokens/embedding": 0, "lm_head/kernel": 1}),
    "tied": (LLAMA | {"tie_word_embeddings": True}, {"embed_tokens/embedding": 0}),
    "gpt2": (GPT2, {"wte/embedding": 0}),
    "masked LM": (BERT, {"cls/predictions/bias": 0, WORDS: 0}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_larger_model(case, scan):
    config, axes = CASES[case]
    model = models.from_config(config, scan_layers=scan)
    assert models.token_axes(model) == axes
    params = model.init(jax.random.key(0))
    larger, more, growth = models.grow(model, params, to=13, multiple=4)
    assert larger.config.vocab_size == growth.after == 16
    assert larger.scan_layers == scan and model.config.vocab_size == 11
    shapes = jax.tree.map(lambda x: x.shape, larger.abstract())
    assert jax.tree.map(lambda x: x.shape, more) == shapes
    ids = jnp.array([[1, 5, 10]])
    before, after = model.apply(params, ids), larger.apply(more, ids)
    assert after.shape == (1, 3, 16)
    np.testing.assert_allclose(after[..., :11], before, atol=1e-5)
    # A new token's logit is the mean of the old ones.
    np.testing.assert_allclose(after[..., 11], before.mean(-1), atol=1e-5)
    assert np.isfinite(larger.apply(more, jnp.array([[12]]))).all()


def test_what_is_refused():
    model = models.from_config(GPT2)
    with pytest.raises(GrowthError, match="`to` = 10, and the tables count 11"):
        models.grow(model, model.abstract(), to=10)
