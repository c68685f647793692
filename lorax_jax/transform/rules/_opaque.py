"""What nothing symbolic can enter: kernels, foreign code and solvers."""

from .._registry import refused

refused(
    "pallas_call",
    "ffi_call",
    "call_exported",
    reason="an opaque kernel computes with the dense matrix",
    module=__name__,
)
refused(
    "pure_callback",
    "io_callback",
    "debug_callback",
    "debug_print",
    reason="a callback hands the dense matrix to Python",
    module=__name__,
)
refused(
    "custom_linear_solve",
    "call_hi_primitive",
    reason="it has derivatives of its own, which could not see the adapter",
    module=__name__,
)
