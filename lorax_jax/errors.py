"""Every exception and warning that this library raises on purpose."""

from ._errors import AdapterError as AdapterError
from ._errors import AuditError as AuditError
from ._errors import CaptureError as CaptureError
from ._errors import CaptureWarning as CaptureWarning
from ._errors import CheckpointError as CheckpointError
from ._errors import ConfigError as ConfigError
from ._errors import FollowError as FollowError
from ._errors import GrowthError as GrowthError
from ._errors import LoraxError as LoraxError
from ._errors import PlanError as PlanError
from ._errors import PlanWarning as PlanWarning
from ._errors import ReplicationError as ReplicationError
from ._errors import TransformError as TransformError
