"""What `load_adapter` did, and what it could not do."""

import dataclasses

from ..planning import Plan


@dataclasses.dataclass(frozen=True)
class Receipt:
    """A loaded adapter's account; printing it gives the summary and every problem.

    Attributes:
        expected: how many sites the file, or the plan, says there are.
        sites: how many were loaded.
        tensors: how many of the file's tensors they took.
        leaves: how many weights of the tree are adapted.
        missing: keys that should be in the file and are not.
        unexpected: keys that belong to no site.
        misshapen: keys whose tensors have a wrong shape, rank or dtype, and how.
        nonfinite: keys whose tensors hold NaN or infinity.
        changed: what else differs from the plan or the base that it was trained on.
        ignored: keys that were read and left out because they change nothing.
        plan: the plan of what was loaded: for `save_adapter`, `init` or a printed
            table.
    """

    expected: int
    sites: int
    tensors: int
    leaves: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[str, ...]
    nonfinite: tuple[str, ...]
    changed: tuple[str, ...]
    ignored: tuple[str, ...]
    plan: Plan

    @property
    def problems(self) -> tuple[str, ...]:
        """Every problem in a line of its own; empty if all is well."""
        return lines(
            missing=self.missing,
            unexpected=self.unexpected,
            misshapen=self.misshapen,
            nonfinite=self.nonfinite,
            changed=self.changed,
        )

    def __str__(self) -> str:
        head = (
            f"{self.sites} of {self.expected} sites loaded from {self.tensors} tensors "
            f"into {self.leaves} adapted weights"
        )
        ignored = [f"  {'ignored':<10}  {key}" for key in self.ignored]
        return "\n".join([head, *self.problems, *ignored])


def lines(**problems: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    """Problems of several kinds, one in a line.

    >>> lines(missing=["a"], unexpected=["b"])
    ('  missing     a', '  unexpected  b')
    """
    return tuple(
        f"  {kind:<10}  {key}" for kind, keys in problems.items() for key in keys
    )
