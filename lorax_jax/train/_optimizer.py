"""`optimizer`: what the loop uses when it is given nothing else."""

import optax

from ._errors import TrainingError


def optimizer(
    *,
    learning_rate: float,
    steps: int,
    warmup: int | None = None,
    clip: float = 1.0,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW behind a clipped gradient, warmed up linearly, then along a cosine to zero.

    Plain Optax: everything that it moves is trainable, so it needs no mask.

    Args:
        learning_rate: at the end of the warmup.
        steps: of the whole run; the cosine ends there.
        warmup: steps of the warmup; `None` is a twentieth of the run.
        clip: largest norm of the gradient.
        weight_decay: pulls A and B to zero, and with them the adapted weights to the
            base's.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> tx = optimizer(learning_rate=1e-3, steps=100)
        >>> train = {"w": {"a": jnp.ones((3, 1)), "b": jnp.zeros((1, 2))}}
        >>> state = tx.init(train)
        >>> sum(leaf.size for leaf in jax.tree.leaves(state))  # two moments, two counts
        12
    """
    if warmup is None:
        warmup = min(max(1, steps // 20), steps - 1)
    if not 0 <= warmup < max(steps, 1):
        raise TrainingError(
            f"`warmup` = {warmup} steps do not fit into `steps` = {steps}. Warm up for "
            "fewer steps."
        )
    first = learning_rate / (warmup + 1)  # a first step at rate 0 would be wasted
    schedule = optax.warmup_cosine_decay_schedule(first, learning_rate, warmup, steps)
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(schedule, weight_decay=weight_decay),
    )
