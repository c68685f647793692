r"""Starting factors in a file.

Of a site that started from factors of its weight, a file with PEFT's keys holds what is
an ordinary LoRA of twice the rank on the original base,

$$A' = [A_0,\; A - A_0], \qquad B' = \begin{bmatrix} B - B_0 \\ B \end{bmatrix},$$

bit for bit what the adapter computes with, so that whoever opens it gets the same
model. The metadata says that it is so, and reading takes them apart again:

$$A = A_0 + (A - A_0), \qquad B_0 = B - (B - B_0).$$

`A_0` and `B` come back bit for bit. So do the others wherever the difference was exact:
where a value has not moved by more than a factor of two (Sterbenz), and where it moved
from zero or to it. Elsewhere they are right to one rounding of the larger of the two,
and the differences, which are what the adapter adds, stay as near.

A file with our own keys holds the four arrays apart, and is exact.
"""

import numpy as np

from ..adapters import Fixed
from ..planning import Slot
from ._arrays import Tensors, host


def joined(tensors: Tensors) -> Tensors:
    """The tensors of a site with its starting factors in those of twice the rank."""
    rest = {name: x for name, x in tensors.items() if name not in ("a0", "b0")}
    a, b, a0, b0 = (tensors[name] for name in ("a", "b", "a0", "b0"))
    return rest | {
        "a": np.concatenate([a0, a - a0], axis=-2),
        "b": np.concatenate([b - b0, b], axis=-1),
    }


def parted(tensors: Tensors) -> Tensors:
    """Undoes `joined`."""
    a0, a = np.split(tensors["a"], 2, axis=-2)
    b0, b = np.split(tensors["b"], 2, axis=-1)
    return tensors | {"a": a0 + a, "b": b, "a0": a0, "b0": b - b0}


def started(slot: Slot, fixed: Fixed) -> list[bool]:
    """Which sites of a slot have starting factors: a layer of zeros has none."""
    if "a0" not in fixed:
        return [False] * len(slot.sites)
    both = slot.matrices(host(fixed["a0"]), host(fixed["b0"]))
    return [bool(_any(x) or _any(y)) for x, y in zip(*both, strict=True)]


def _any(array: np.ndarray) -> bool:
    return bool((array != 0).any())
