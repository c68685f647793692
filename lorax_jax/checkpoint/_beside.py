"""What lies beside an adapter: a model card, and the tokenizer."""

import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .._errors import CheckpointError
from ._file_site import FileSite
from ._files import open_adapter

# What tokenizers of Transformers are made of.
_TOKENIZER = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def write_card(folder: Path, base: str | None, sites: Sequence[FileSite]) -> None:
    """Writes a short `README.md` with the hub's front matter.

    Args:
        folder: where to.
        base: the base model; named if it is a hub id.
        sites: what the adapter adapts.
    """
    factors = [site for site in sites if site.low_rank]
    ranks = sorted({site.rank for site in factors})
    modules = sorted({re.split(r"[./]", site.target)[-1] for site in factors})
    kind = "DoRA" if any(site.kind == "dora" for site in sites) else "LoRA"
    whole = sorted({_digits(site.path) for site in sites if site.kind == "whole"})
    rows = sum(len(site.ids) for site in sites)
    front = ["library_name: peft", "tags:", "- lora", "- lorax-jax"]
    named = base is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", base)
    if named:  # a path of the author's says nothing to others
        front.insert(0, f"base_model: {base}")
    text = f"""---
{chr(10).join(front)}
---

# {kind} adapter

A {kind} adapter{f" for `{base}`" if named else ""}, made with lorax-jax: {len(factors)}
weights, rank {" to ".join(map(str, dict.fromkeys((ranks[0], ranks[-1]))))}.

Adapted: {", ".join(f"`{name}`" for name in modules)}.
"""
    if whole:
        text += f"\nTrained whole: {', '.join(f'`{path}`' for path in whole)}.\n"
    if rows:
        text += f"\nTrained rows of tables: {rows}.\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


def _digits(path: str) -> str:
    return "/".join("*" if part.isdigit() else part for part in path.split("/"))


def write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Saves a tokenizer into `folder`, or copies its files from a folder.

    Args:
        folder: where to.
        tokenizer: what has `save_pretrained`, or a folder.

    Raises:
        CheckpointError: if it is neither, or the folder holds no tokenizer.
    """
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(str(folder))
        return
    if not isinstance(tokenizer, str | os.PathLike) or not Path(tokenizer).is_dir():
        raise CheckpointError(
            f"`tokenizer` = {tokenizer!r:.80} has no `save_pretrained` and is no "
            "folder. Give a tokenizer of Transformers, or the folder of one."
        )
    found = [name for name in _TOKENIZER if (Path(tokenizer) / name).is_file()]
    if not found:
        raise CheckpointError(
            f"`tokenizer` = {str(tokenizer)!r} holds no tokenizer's files, such as "
            "tokenizer.json."
        )
    for name in found:
        shutil.copyfile(Path(tokenizer) / name, folder / name)


def replace_tokenizer(folder: Path, tokenizer: Any) -> None:
    """The same, in place of the tokenizer that is there."""
    for name in _TOKENIZER:
        (folder / name).unlink(missing_ok=True)
    write_tokenizer(folder, tokenizer)


def tokenizer_of(folders: Iterable[str | os.PathLike]) -> Path | None:
    """The adapter's folder whose tokenizer goes with what it trained.

    It is one that trains rows of tables, or whose vocabulary grew, and that holds a
    tokenizer. Tables whose rows two adapters train cannot be merged, so there is one.
    """
    for folder in map(Path, folders):
        with open_adapter(folder) as files:
            record = files.record
            if record is None:
                concerned = bool(files.config.get("trainable_token_indices"))
            else:
                rows = any(site.kind == "rows" for site in record.sites)
                concerned = rows or record.grown is not None
        if concerned and any((folder / name).is_file() for name in _TOKENIZER):
            return folder
    return None
