"""What the step costs beside the frozen step, as the compiler counts it."""

import dataclasses
from typing import Any

from .._count import Count
from ._step import Step


@dataclasses.dataclass(frozen=True)
class Costs:
    """Numbers of the compiled step, and of the frozen step.

    The compiler's own counts, for one device: a loop's body counts once, whatever the
    number of turns. `None` where the backend does not say.

    Attributes:
        flops, frozen_flops: floating-point operations.
        bytes, frozen_bytes: bytes read and written.
        temporary, frozen_temporary: bytes of the largest temporary memory.
        count: trainable values and all values.
    """

    flops: float | None
    frozen_flops: float | None
    bytes: float | None
    frozen_bytes: float | None
    temporary: int | None
    frozen_temporary: int | None
    count: Count

    def __str__(self) -> str:
        return (
            f"flops {_beside(self.flops, self.frozen_flops)}; "
            f"bytes {_beside(self.bytes, self.frozen_bytes)}; "
            f"temporary bytes {_beside(self.temporary, self.frozen_temporary)}\n"
            f"{self.count}"
        )


def _beside(value: float | None, frozen: float | None) -> str:
    if value is None or frozen is None:
        return "not known"
    more = f" ({value / frozen:.2f} x frozen)" if frozen else ""
    return f"{value:,.0f}{more}"


def costs(step: Step, frozen: Step, count: Count) -> Costs:
    """The numbers of both compiled steps."""
    flops, moved, temporary = _numbers(step.compiled)
    frozen_flops, frozen_moved, frozen_temporary = _numbers(frozen.compiled)
    return Costs(
        flops, frozen_flops, moved, frozen_moved, temporary, frozen_temporary, count
    )


def _numbers(compiled: Any) -> tuple[float | None, float | None, int | None]:
    counted = compiled.cost_analysis() or {}
    memory = compiled.memory_analysis()
    temporary = getattr(memory, "temp_size_in_bytes", None)
    return counted.get("flops"), counted.get("bytes accessed"), temporary
