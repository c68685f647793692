"""A Hugging Face folder of a tiny random Llama, with a tokenizer made on the spot."""

import json
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from lorax_jax import models

EOS = "<|endoftext|>"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 300,
    "n_embd": 16,
    "n_head": 2,
    "n_layer": 1,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
BERT = {
    "model_type": "bert",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
}
TEXT = "".join(
    f"The {animal} sat on the {thing} and {verb} all day.\n\n"
    for animal in ("cat", "dog", "owl", "hen", "fox", "newt", "yak")
    for thing in ("mat", "wall", "roof", "fence")
    for verb in ("slept", "sang", "ate", "thought")
)


def write_tokenizer(folder: Path, **settings) -> None:
    """A byte-level BPE of at most 300 tokens, learned on `TEXT`."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    about |= settings
    (folder / "tokenizer_config.json").write_text(json.dumps(about), "utf-8")


def write_model(folder: Path, config: dict = CONFIG, **changes) -> None:
    """Config, random float32 weights and tokenizer."""
    write_tokenizer(folder)
    config = config | changes
    model = models.from_config(config)
    params = jax.jit(model.init)(jax.random.key(0))
    tensors = {k: np.asarray(v) for k, v in models.to_hf(model, params).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
