"""A real model: SmolLM2-135M-Instruct, if `benchmarks/fetch_smollm2.py` has run."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorax_jax import models

_DEFAULT = Path(__file__).parents[2] / "benchmarks" / "cache" / "smollm2"
FOLDER = Path(os.environ.get("LORAX_SMOLLM2", _DEFAULT))
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):",
    "<|im_start|>user\nName three colors.<|im_end|>\n<|im_start|>assistant\n",
    "Water boils at 100 degrees",
]

pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.usefixtures("optimized"),
    pytest.mark.skipif(
        not (FOLDER / "model.safetensors").is_file(),
        reason=f"no model in {FOLDER}: run benchmarks/fetch_smollm2.py",
    ),
]


@pytest.fixture(scope="module")
def smollm2():
    return models.load(FOLDER)


@pytest.fixture(scope="module")
def tokenizer():
    return models.tokenizer(FOLDER)


def test_it_knows_the_capital_of_france(smollm2, tokenizer):
    model, params = smollm2
    ids = tokenizer([PROMPTS[0]], return_tensors="np")["input_ids"]
    out, _ = models.generate(model.apply, params, ids, max_new_tokens=4)
    assert "Paris" in tokenizer.decode(np.asarray(out)[0])


def test_the_same_twenty_tokens_as_transformers(smollm2, tokenizer):
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    model, params = smollm2
    batch = tokenizer(PROMPTS, return_tensors="np", padding=True, padding_side="left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    ours, _ = models.generate(model.apply, params, ids, mask=mask, max_new_tokens=20)
    torch_model: Any = LlamaForCausalLM.from_pretrained(FOLDER)
    theirs = torch_model.generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        max_new_tokens=20,
        min_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
    )
    np.testing.assert_array_equal(np.asarray(ours), theirs.numpy())
