"""Are large arrays baked into the program?"""

from collections.abc import Iterator
from typing import Any

import jax

from .. import _paths
from ..transform import _jaxpr
from ._report import Check, answer
from ._step import Step

NAME = "no large constant"


def check(step: Step, params: Any, most: int) -> Check:
    """Looks for captured arrays of more than `most` bytes.

    A captured array is compiled into the program: it is copied for each compiled
    variant, slows compilation down, cannot be sharded or donated, and an update to it
    is never seen.
    """
    paths = {
        id(leaf): path
        for path, leaf in _paths.flatten(params)[0]
        if isinstance(leaf, jax.Array)
    }
    findings = []
    for value, at in _constants(step.jaxpr, ""):
        nbytes = getattr(value, "nbytes", 0)
        if nbytes > most:
            path = paths.get(id(value))
            what = f"the parameter {path!r}" if path else "an array that is no argument"
            shape = " x ".join(map(str, value.shape))
            findings.append(
                (f"{what}, {shape} {value.dtype}, {nbytes:,} bytes, is captured", at)
            )
    return answer(NAME, findings, f"no captured array is larger than {most:,} bytes")


def _constants(jaxpr: Any, enclosing: str) -> Iterator[tuple[Any, str]]:
    """Captured arrays, inner jaxprs' too, with the line that first reads each."""
    inner, consts = _jaxpr.closed(jaxpr)
    first: dict[Any, str] = {}
    for eqn in inner.eqns:
        at = _jaxpr.source(eqn) or enclosing
        for atom in eqn.invars:
            if _jaxpr.is_literal(atom):
                yield atom.val, at
            else:
                first.setdefault(atom, at)
        for value in eqn.params.values():
            for body in value if isinstance(value, tuple | list) else (value,):
                if hasattr(body, "eqns") or hasattr(body, "jaxpr"):
                    yield from _constants(body, at)
    for var, value in zip(inner.constvars, consts, strict=True):
        yield value, first.get(var, enclosing)
