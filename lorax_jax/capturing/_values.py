"""Whether parameters are values."""

from typing import Any

from .. import _paths
from .._errors import CaptureError, shorten


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
