"""`audit`: one call, every question."""

from collections.abc import Callable
from typing import Any

from .._count import count
from ..adapters import Adapter
from . import _collectives, _constants, _dense, _gradients, _widths, _zeros
from ._costs import costs
from ._report import Audit
from ._step import steps
from ._weights import weights


def audit(
    fn: Callable[..., Any],
    params: Any,
    adapter: Adapter,
    *args: Any,
    max_constant: int = 2**20,
    **kwargs: Any,
) -> Audit:
    r"""Proves what a train step does not do, or shows where it does.

    The step is value and gradient, with respect to the adapter, of
    `fn(bound, *args, **kwargs)`: of the loss if that is a number, else of the sum of
    all floating results. It is traced and compiled, and asked:

    | check | passes when |
    |---|---|
    | no dense update | nothing of a weight's shape is computed from its A and B alone |
    | no base-size gradient | the backward pass sums nothing of a base weight's shape |
    | no large constant | `fn` captures no array of more than `max_constant` bytes |
    | no wider activation | no activation is wider than the base's in its place |
    | no extra collective | devices exchange what the frozen step's do |
    | no zero gradient | A and B of every weight, in every layer, have a gradient |

    Values are told apart by what they are computed from, through every inner jaxpr, not
    by their shapes alone. The *frozen step* is the same model with a trained scalar in
    place of each adapter: forward, and the way back through the activations.

    The last check runs the step once. At B = 0, where adapters start, A's gradient is
    zero by construction, so factors of zeros are replaced by small random numbers for
    it. Inputs are not changed. On types (`jax.eval_shape`, shardings included) the
    check is skipped and says so; all others work.

    Args:
        fn: the model or the loss, plain or from `adapt`. What `adapt` refuses is
            audited with everything allowed, so that all places are found at once.
        params: the parameter tree, its first argument.
        adapter: the adapter, at any point of its training.
        args: the other arguments of `fn`: a batch.
        max_constant: bytes that a captured array may have.
        kwargs: the keyword arguments of `fn`.

    Returns:
        An `Audit`: `.ok`, `.checks`, `.costs`; printing it gives a table.

    Raises:
        AdapterError: if the adapter does not fit `params`.
        AuditError: if `fn` returns nothing floating.

    Example:
        >>> import jax, jax.numpy as jnp, lorax_jax as lj
        >>> params = {"w": jnp.ones((30, 20))}
        >>> fn = lambda params, x: jnp.tanh(x @ params["w"])
        >>> x = jnp.ones((5, 30)) / 30
        >>> plan = lj.plan(lj.LoraConfig("w", rank=2), params, fn, (x,))
        >>> adapter = lj.init(plan, params, key=jax.random.key(0))
        >>> lj.audit(fn, params, adapter, x).ok
        True
        >>> merged = lambda params, x: fn({"w": jnp.sort(params["w"])}, x)
        >>> report = lj.audit(merged, params, adapter, x)
        >>> [check.name for check in report.failed]
        ['no dense update', 'no base-size gradient']
    """
    built = steps(fn, params, adapter, args, kwargs)
    step, frozen = built.adapted, built.frozen
    shapes = weights(params, adapter)
    checks = (
        _dense.check(step, shapes, built.refusal),
        _gradients.check(step, frozen, shapes),
        _constants.check(step, params, max_constant),
        _widths.check(step, frozen, shapes),
        _collectives.check(step, frozen, adapter),
        _zeros.check(step, adapter),
    )
    numbers = costs(step, frozen, count(params, adapter))
    return Audit(checks, numbers, built.refusal)
