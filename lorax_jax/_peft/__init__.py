"""What PEFT's configuration files say, as plain data: no tensors, no adapters."""

from ._fields import DEFAULTS as DEFAULTS
from ._fields import VERSION as VERSION
from ._fields import Ranks as Ranks
from ._fields import Targets as Targets
from ._fields import check_fields as check_fields
from ._fields import number as number
from ._patterns import condense as condense
from ._patterns import exact_targets as exact_targets
from ._rules import LAYERS as LAYERS
from ._rules import from_peft as from_peft
from ._rules import plain as plain
from ._rules import to_peft as to_peft
