"""What an adapted weight is."""

from ._adapted import Adapted as Adapted
from ._adapted import Origin as Origin
from ._adapted import is_weight as is_weight
from ._base import Term as Term
from ._base import Use as Use
from ._lora import LowRank as LowRank
from ._tree import Adapter as Adapter
from ._tree import Fixed as Fixed
from ._tree import Role as Role
from ._tree import as_key as as_key
from ._tree import bind as bind
from ._tree import not_floating as not_floating
from ._tree import stable_hash as stable_hash
