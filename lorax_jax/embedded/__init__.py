"""A small pretrained model and a text to adapt it to: all that a first run needs.

README.md beside this file is the model card; texts.py and train.py made all the rest.

    >>> from lorax_jax.embedded import ADAPT_TEXT, MODEL_DIR
    >>> (MODEL_DIR / "config.json").exists(), ADAPT_TEXT.name
    (True, 'devil.txt')
"""

from pathlib import Path

_HERE = Path(__file__).parent

MODEL_DIR = _HERE / "model"
"""A Hugging Face folder: a Llama of 1.9 million parameters that writes scripture."""

ADAPT_TEXT = _HERE / "devil.txt"
"""Bierce's Devil's Dictionary, what `lorax-jax finetune` adapts the model to."""

HELDOUT_TEXT = _HERE / "kjv_heldout.txt"
"""Chapters of the King James Bible that the model was not trained on."""
