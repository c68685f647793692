"""Running a function on adapted weights."""

from . import rules as rules
from ._consumers import Consumer as Consumer
from ._consumers import Leaf as Leaf
from ._interpreter import adapt as adapt
from ._roles import Reading as Reading
from ._roles import read as read
