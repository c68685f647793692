"""Tiny BERTs, one for each head."""

import functools

import jax
import numpy as np

from lorax_jax import models

BERT = {
    "model_type": "bert",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "initializer_range": 0.1,
}
HEADS = {
    "bare": {},
    "masked_lm": {"architectures": ["BertForMaskedLM"]},
    "untied": {"architectures": ["BertForMaskedLM"], "tie_word_embeddings": False},
    "classifier": {
        "architectures": ["BertForSequenceClassification"],
        "num_labels": 3,
    },
}
MASK = np.arange(12) < np.array([[12], [5]])


@functools.cache
def tiny(head, scan=False):
    """An encoder with drawn parameters, biases and norms too."""
    plain = models.from_config(BERT | HEADS[head])
    draw = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: np.asarray(
            (leaf.ndim == 1) + 0.15 * draw.normal(size=leaf.shape), leaf.dtype
        ),
        plain.abstract(),
    )
    if not scan:
        return plain, jax.device_put(params)
    stack = [params["encoder"]["layer"][str(i)] for i in range(plain.num_layers)]
    layer = jax.tree.map(lambda *leaves: np.stack(leaves), *stack)
    scanned = models.from_config(BERT | HEADS[head], scan_layers=True)
    return scanned, jax.device_put(params | {"encoder": {"layer": layer}})
