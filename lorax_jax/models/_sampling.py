"""From logits to the next token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

# The kinds of sampling that are different programs; temperature and top_p are data.
GREEDY, PLAIN, NUCLEUS = "greedy", "plain", "nucleus"


def sample(
    logits: Float[Array, "batch vocab"],
    *,
    kind: str,
    key: PRNGKeyArray | None,
    temperature: Float[Array, "rows"],
    top_p: Float[Array, "rows"],
) -> Int[Array, "batch"]:
    """One token per row.

    Args:
        logits: of the next token.
        kind: `"greedy"`, `"plain"` or `"nucleus"`.
        key: the randomness of this step; None for greedy.
        temperature: divides the logits; one number, or one per row.
        top_p: for `"nucleus"`, the probability mass to choose from; likewise.

    Returns:
        Token ids, int32.
    """
    logits = logits.astype(jnp.float32)
    if kind == GREEDY or key is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature[:, None]
    if kind == NUCLEUS:
        logits = nucleus(logits, top_p)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def nucleus(
    logits: Float[Array, "batch vocab"], top_p: Float[Array, "rows"]
) -> Float[Array, "batch vocab"]:
    """Hides all but the likeliest tokens, as few as hold `top_p` of the probability.

    The likeliest token always stays. Tokens as likely as the last one kept stay too.

    Args:
        logits: float32.
        top_p: one number, or one per row.

    Returns:
        The logits, minus infinity where hidden.

    Example:
        >>> p = jnp.array([[0.5, 0.3, 0.2]])
        >>> jnp.isfinite(nucleus(jnp.log(p), jnp.array([0.6]))).tolist()
        [[True, True, False]]

    References:
        Holtzman et al., "The Curious Case of Neural Text Degeneration", 2019.
        https://arxiv.org/abs/1904.09751
    """
    falling = -jnp.sort(-logits, axis=-1)  # (batch, vocab)
    mass = jnp.cumsum(jax.nn.softmax(falling, axis=-1), axis=-1)
    # Keep a token if those before it do not yet make up top_p; the first has none.
    before = jnp.pad(mass[:, :-1], ((0, 0), (1, 0)))
    last = jnp.maximum((before < top_p[:, None]).sum(axis=-1) - 1, 0)  # (batch,)
    floor = jnp.take_along_axis(falling, last[:, None], axis=-1)  # (batch, 1)
    return jnp.where(logits < floor, -jnp.inf, logits)
