"""Running a function on adapted weights."""

from . import rules as rules
from ._adapt import adapt as adapt
from ._adapt import is_adapted as is_adapted
from ._consumers import Consumer as Consumer
from ._consumers import Leaf as Leaf
from ._flow import NONE as NONE
from ._flow import Flow as Flow
from ._flow import Marks as Marks
from ._flow import Visit as Visit
from ._roles import Reading as Reading
from ._roles import read as read
