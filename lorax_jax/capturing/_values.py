"""Whether arguments are what they are taken for."""

from typing import Any

from .. import _paths
from .._errors import CaptureError, shorten
from ..planning import Plan


def check_values(params: Any) -> None:
    """Raises for parameters that are known by their types alone.

    Traced values pass: `jax.eval_shape` of what gathers is given types through them.

    Raises:
        CaptureError: naming them.
    """
    found = _paths.of_types(params)
    if found:
        raise CaptureError(
            "`params` holds types in place of values, as `jax.eval_shape` gives them: "
            f"{shorten(found)}. What is gathered is computed by the model: give the "
            "parameters themselves."
        )


def check_plan(plan: Any, call: str) -> None:
    """Raises for arguments in another order than that of `call`.

    Raises:
        CaptureError: if the plan is none.
    """
    if not isinstance(plan, Plan):
        raise CaptureError(
            f"`{call}` has a {type(plan).__name__} for its plan. Give the arguments in "
            "this order, and as `plan` what `lj.plan` gives."
        )
