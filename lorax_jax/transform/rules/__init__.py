"""One rule for each primitive; importing this package registers them all."""

from . import _calls as _calls
from . import _concatenate as _concatenate
from . import _cond as _cond
from . import _conv as _conv
from . import _dot_general as _dot_general
from . import _gather as _gather
from . import _opaque as _opaque
from . import _ragged as _ragged
from . import _scan as _scan
from . import _shape as _shape
from . import _shard_map as _shard_map
from . import _while as _while
from . import _write as _write
