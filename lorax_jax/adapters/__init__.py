"""What an adapted weight is."""

from ._adapted import Adapted as Adapted
from ._adapted import Origin as Origin
from ._adapted import is_weight as is_weight
from ._base import Inner as Inner
from ._base import Term as Term
from ._bind import bind as bind
from ._bind import check_parts as check_parts
from ._dora import Dora as Dora
from ._dora import base_norm as base_norm
from ._dora import column_norm as column_norm
from ._dora import takes_inputs as takes_inputs
from ._join import join as join
from ._kind import KINDS as KINDS
from ._lora import LowRank as LowRank
from ._memory import on_device as on_device
from ._random import as_key as as_key
from ._random import dropout_keys as dropout_keys
from ._random import stable_hash as stable_hash
from ._role import Adapter as Adapter
from ._role import Fixed as Fixed
from ._role import Role as Role
from ._role import named as named
from ._rows import Rows as Rows
from ._shapes import not_floating as not_floating
from ._stored import stored as stored
from ._whole import bind_whole as bind_whole
