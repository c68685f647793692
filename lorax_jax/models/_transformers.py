"""The two things taken from `transformers`: config classes and tokenizers.

Imported where they are used: `transformers` takes a second to import (and, where torch
is installed, brings it along), which nobody should pay who builds a model by hand.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

_QUIET = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


@contextlib.contextmanager
def _no_advice() -> Iterator[None]:
    """Importing `transformers` without torch prints that models are unavailable.

    Here they are not wanted, so the line would only worry people.
    """
    before = os.environ.get(_QUIET)
    os.environ[_QUIET] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_QUIET]
        else:
            os.environ[_QUIET] = before


def config_class(family: str) -> Any:
    """The `transformers` config class of a `model_type`.

    Args:
        family: such as `"llama"`.

    Returns:
        A subclass of `transformers.PreTrainedConfig`.
    """
    with _no_advice():
        from transformers import CONFIG_MAPPING
    return CONFIG_MAPPING[family]


def tokenizer(directory: str | os.PathLike) -> Any:
    """The tokenizer that lies beside a checkpoint.

    Args:
        directory: a checkpoint folder or a hub id, as for `load`.

    Returns:
        What `transformers.AutoTokenizer.from_pretrained` returns. Use it with
        `return_tensors="np"` and `padding_side="left"` for `generate`.
    """
    with _no_advice():
        from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(directory)
