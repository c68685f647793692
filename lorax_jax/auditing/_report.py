"""`Audit` and `Check`: the answers, and how they print."""

import dataclasses
from collections.abc import Iterable

from .._errors import AuditError
from ._costs import Costs

# Findings that a check shows; the others are counted.
_MOST = 8


@dataclasses.dataclass(frozen=True)
class Check:
    """The answer to one question about a step.

    Attributes:
        name: what is promised, such as `"no dense update"`.
        passed: whether the step keeps the promise; `None` where it was not looked at.
        detail: what was found, one finding a line, or what was looked at.
        source: the line of the model behind the first finding, `file:line (function)`.
    """

    name: str
    passed: bool | None
    detail: str
    source: str = ""


def answer(name: str, findings: Iterable[tuple[str, str]], otherwise: str) -> Check:
    """A check that passes when there are no findings.

    Args:
        name: the promise.
        findings: what was found, and the line it comes from; equal ones count once.
        otherwise: the detail where nothing was found.
    """
    found = list(dict.fromkeys(findings))
    if not found:
        return Check(name, True, otherwise)
    lines = [what + (f"\n  at {at}" if at else "") for what, at in found[:_MOST]]
    if len(found) > _MOST:
        lines.append(f"... ({len(found)} in all)")
    return Check(name, False, "\n".join(lines), found[0][1])


@dataclasses.dataclass(frozen=True)
class Audit:
    """What `audit` found out; printing it gives a table.

    Attributes:
        checks: one answer to each question.
        costs: what the step costs, and what the frozen step costs.
        refusal: why `adapt` refuses the function, or `""`. The checks then describe the
            step with everything allowed that `adapt` would have to be asked for.
    """

    checks: tuple[Check, ...]
    costs: Costs
    refusal: str = ""

    @property
    def ok(self) -> bool:
        """Whether no check failed. What was skipped did not fail."""
        return not self.failed

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.passed is False)

    def __getitem__(self, name: str) -> Check:
        """The check of this name."""
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"{name!r}; the checks are {[c.name for c in self.checks]}")

    def raise_if_failed(self) -> "Audit":
        """Returns the audit, or raises an `AuditError` with the table."""
        if not self.ok:
            names = ", ".join(check.name for check in self.failed)
            raise AuditError(f"The step fails: {names}.\n{self}")
        return self

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        lines = [f"{'check'.ljust(width)}  answer   detail"]
        for check in self.checks:
            said = {True: "yes", False: "NO", None: "skipped"}[check.passed]
            first, *more = check.detail.splitlines()
            lines.append(f"{check.name.ljust(width)}  {said.ljust(7)}  {first}")
            lines += [" " * (width + 11) + line for line in more]
        lines.insert(1, "-" * max(map(len, lines)))
        return "\n".join([*lines, str(self.costs)])
