"""An adapter with its scales multiplied: the base, in the program of the adapter."""

from typing import Any

from ..adapters import Adapter, Fixed


def scaled(adapter: Adapter, weight: Any) -> Adapter:
    """The adapter with every scale multiplied by `weight`.

    `bind(..., weights=)` multiplies an adapter whole, and refuses one with parts that
    have no multiple: trained rows, leaves trained whole, DoRA's magnitudes. Here they
    stay as they are. Before the first step they are the base's, so that an adapter
    scaled by 0 computes what the base does, and nothing is compiled for it.

    Args:
        adapter: any.
        weight: a number.

    Returns:
        A new adapter of the same structure and types.
    """
    fixed = {}
    for name, held in adapter.fixed.items():
        scales = {key: held[key] * weight for key in ("scale",) if key in held}
        fixed[name] = Fixed(held.role, {**held, **scales})
    return Adapter(adapter.train, fixed)
