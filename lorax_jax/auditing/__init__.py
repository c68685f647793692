"""Proofs about a train step, read off its trace and its compiled program."""

from ._audit import audit as audit
from ._costs import Costs as Costs
from ._report import Audit as Audit
from ._report import Check as Check
