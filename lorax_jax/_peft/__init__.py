"""What PEFT's configuration files say, as plain data: no tensors, no adapters."""

from ._beside import BIASES as BIASES
from ._beside import Whole as Whole
from ._beside import rows_by_module as rows_by_module
from ._beside import saved_by as saved_by
from ._beside import token_rows as token_rows
from ._fields import DEFAULTS as DEFAULTS
from ._fields import VERSION as VERSION
from ._fields import Ranks as Ranks
from ._fields import Targets as Targets
from ._fields import check_fields as check_fields
from ._fields import flag as flag
from ._fields import layer_replication as layer_replication
from ._fields import number as number
from ._from_peft import from_peft as from_peft
from ._modules import LAYERS as LAYERS
from ._modules import is_linear as is_linear
from ._parameters import Parameters as Parameters
from ._parameters import check_alone as check_alone
from ._parameters import check_owners as check_owners
from ._parameters import exact_parameters as exact_parameters
from ._patterns import condense as condense
from ._patterns import exact_targets as exact_targets
from ._to_peft import as_lists as as_lists
from ._to_peft import plain as plain
from ._to_peft import to_peft as to_peft
