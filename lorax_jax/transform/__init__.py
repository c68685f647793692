"""Running a function on adapted weights."""

from . import rules as rules
from ._consumers import Consumer as Consumer
from ._consumers import Leaf as Leaf
from ._interpreter import adapt as adapt
from ._roles import trace_roles as trace_roles
