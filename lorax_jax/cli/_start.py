"""What the initializer of a run reads of its data."""

from typing import Any

import click
import jax

from .. import capturing, train
from ..planning import Plan
from ._base import Base


def prepared(
    plan: Plan, base: Base, data: train.Windows, settings: dict[str, Any]
) -> capturing.Prepared:
    """The plan, and statistics of the batches that training begins with.

    Of none where none is read. With `rho` above 1 ranks are distributed anew. Tokens
    count as they do in the loss: prompts and padding do not.

    Args:
        plan: where the adapter acts.
        base: the model.
        data: the rows to train on.
        settings: from `_settings`.
    """
    if not capturing.prepared_types(plan):
        return capturing.Prepared(plan, capturing.Gathered({}, {}))
    size = settings["batch"]
    count = -(-min(settings["init_rows"], data.rows) // size)
    batches = []
    for number in range(count):
        rows = train.batch_at(data, number, size=size, seed=settings["seed"])
        batches.append((rows.ids[:, :-1], rows.ids[:, 1:], rows.weights))
    click.echo(f"init      {settings['init']}: reads {count * size} rows")

    def model(params: Any, ids: Any, labels: Any, weights: Any) -> jax.Array:
        del labels, weights
        return base.model.apply(params, ids)

    def loss(params: Any, ids: Any, labels: Any, weights: Any) -> jax.Array:
        return train.cross_entropy(base.model.apply(params, ids), labels, weights)

    return capturing.prepare(
        plan,
        base.params,
        model,
        batches,
        loss=loss,
        mask=lambda ids, labels, weights: weights,
        rho=settings["rho"],
        progress=True,
    )
