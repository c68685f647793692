"""What an adapted weight is."""

from ._adapted import Adapted as Adapted
from ._adapted import Origin as Origin
from ._adapted import is_weight as is_weight
from ._base import Term as Term
from ._base import Use as Use
from ._lora import LowRank as LowRank
