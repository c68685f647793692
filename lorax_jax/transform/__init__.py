"""Running a function on adapted weights."""

from . import rules as rules
from ._interpreter import adapt as adapt
