"""Do the devices of a sharded step talk more than those of the frozen step?"""

import collections
import re
from typing import Any, NamedTuple

import jax

from ..adapters import Adapter
from ..transform import _jaxpr
from ._report import Check, answer
from ._step import Step

NAME = "no extra collective"

# `%name = f32[16,4]{1,0} all-gather(...)`; of an asynchronous one, its `-done` half,
# whose type is that of the result.
_OPERATION = re.compile(
    r"= (?P<type>.+?) (?P<kind>all-gather|all-reduce|reduce-scatter|"
    r"ragged-all-to-all|all-to-all|collective-permute|collective-broadcast)"
    r"(?:-done)?\("
)
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_FRAME = re.compile(r"stack_frame_id=(\d+)")
# Sums over devices.
_REDUCTIONS = ("all-reduce", "reduce-scatter")


class Collective(NamedTuple):
    """One array that devices exchange: the operation, the dtype and the local shape."""

    kind: str
    dtype: str
    shape: tuple[int, ...]


def check(step: Step, frozen: Step, adapter: Adapter) -> Check:
    """Compares the collectives of two compiled programs.

    Sums of arrays along the adapter's rank are an adapter's own (gradients of A and B
    under data parallelism, `x A` where W's inputs are split) and no finding, nor are
    sums of numbers: they are small. All else that the frozen step does not exchange is
    one.
    """
    sites = [{**fixed, **adapter.train[n]} for n, fixed in adapter.fixed.items()]
    ranks = {part["a"].shape[-1] for part in sites if "a" in part}
    ranks |= {2 * part["a0"].shape[-1] for part in sites if "a0" in part}
    usual = collections.Counter(c for c, _ in _collectives(frozen.compiled.as_text()))
    extra, sums = [], 0
    for collective, at in _collectives(step.compiled.as_text()):
        if usual[collective] > 0:
            usual[collective] -= 1
        elif collective.kind in _REDUCTIONS and (
            not collective.shape or ranks & set(collective.shape)
        ):
            sums += 1
        else:
            shape = ",".join(map(str, collective.shape))
            what = f"`{collective.kind}` of {collective.dtype}[{shape}]"
            extra.append((what + ", which the frozen step does not have", at))
    devices = _devices(step.compiled)
    return answer(
        NAME,
        extra,
        "one device"
        if devices == 1
        else f"{devices} devices exchange what the frozen step's do, and {sums} small "
        "sums",
    )


def _devices(compiled: Any) -> int:
    shardings = jax.tree.leaves(compiled.input_shardings)
    return max((len(s.device_set) for s in shardings), default=1)


def _collectives(text: str) -> list[tuple[Collective, str]]:
    """The collectives of a program, array by array, each with its line."""
    frames = _Frames(text)
    found = []
    for line in text.splitlines():
        operation = _OPERATION.search(line)
        if operation is None:
            continue
        frame = _FRAME.search(line)
        at = frames.source(frame.group(1)) if frame else "(unknown line)"
        for dtype, sizes in _ARRAY.findall(operation["type"]):
            shape = tuple(int(n) for n in sizes.split(",") if n)
            found.append((Collective(operation["kind"], dtype, shape), at))
    return found


class _Frames:
    """The tables of a compiled program's header that give an operation its line."""

    def __init__(self, text: str):
        self.tables: dict[str, dict[str, str]] = {}
        table: dict[str, str] = {}
        for line in text.splitlines():
            if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
                table = self.tables.setdefault(line, {})
            elif line[:1].isdigit():
                number, _, rest = line.partition(" ")
                table[number] = rest
            elif line[:1] in ("%", "E"):  # the program itself
                break

    def source(self, frame: str) -> str:
        """The innermost frame of a model, `file:line (function)`."""
        while frame in self.tables.get("StackFrames", {}):
            entry = _fields(self.tables["StackFrames"][frame])
            where = _fields(self.tables["FileLocations"][entry["file_location_id"]])
            file = self.tables["FileNames"][where["file_name_id"]].strip('"')
            name = self.tables["FunctionNames"][where["function_name_id"]].strip('"')
            place = f"{file}:{where['line']} ({name})"
            if not _jaxpr.is_machinery(file):
                return place
            parent = entry.get("parent_frame_id", "")
            if parent == frame:
                break
            frame = parent
        return "(unknown line)"


def _fields(entry: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\d+)", entry))
