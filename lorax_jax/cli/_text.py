"""From a prompt to text."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ._program import Failure, warn


def continue_text(
    apply: Callable[..., Any],
    params: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    positions: int | None = None,
    window: int | None = None,
) -> str:
    """What a model makes of a prompt, without the prompt.

    Args:
        apply: `model.apply`, or its adapted form.
        params: the parameters, or bound ones.
        tokenizer: beside the model.
        prompt: at least one token.
        max_new_tokens: it may stop earlier, at the end-of-text token.
        temperature: 0 takes the likeliest token each time.
        top_p: see `models.generate`.
        seed: of the sampling.
        positions: how many the model has learned, if it learned them.
        window: how many it was trained on; more are worth a warning.

    Raises:
        Failure: if the prompt has no token, or there are too few positions.
    """
    import jax

    from .. import models

    ids = tokenizer(prompt, verbose=False)["input_ids"]
    if not ids:
        raise Failure("--prompt is empty; give at least one word to go on from.")
    total = len(ids) + max_new_tokens
    if positions is not None and total > positions:
        raise Failure(
            f"The prompt has {len(ids)} tokens and {max_new_tokens} are to follow, but "
            f"the model has learned {positions} positions. Ask for fewer new tokens."
        )
    if window is not None and total > window:
        warn(
            f"The prompt has {len(ids)} tokens and {max_new_tokens} are to follow; the "
            f"model was trained on {window} positions, and may do badly beyond."
        )
    found, _ = models.generate(
        apply,
        params,
        np.array([ids], np.int32),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        key=jax.random.key(seed),
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.eos_token_id or 0,
        cache=None if positions is None else total,
    )
    new = np.asarray(found)[0, len(ids) :].tolist()
    if tokenizer.eos_token_id in new:
        new = new[: new.index(tokenizer.eos_token_id)]
    return tokenizer.decode(new)
