"""From a data file to a trained adapter: the thin loop under the command line.

Every part stands alone: `read_records`, `split`, `tokenize` and `windows` make rows of
tokens, `make_step` a jitted step with plain Optax, `finetune` a loop around it.
"""

# ruff: noqa: I001  (in the order of use)
from ._errors import DataError as DataError
from ._errors import TrainingError as TrainingError
from ._records import Chat as Chat
from ._records import Completion as Completion
from ._records import Record as Record
from ._records import Text as Text
from ._records import read_records as read_records
from ._split import split as split
from ._documents import Document as Document
from ._documents import chat_prompt as chat_prompt
from ._documents import tokenize as tokenize
from ._documents import total_bytes as total_bytes
from ._windows import Windows as Windows
from ._windows import batch_at as batch_at
from ._windows import windows as windows
from ._loss import bits_per_byte as bits_per_byte
from ._loss import cross_entropy as cross_entropy
from ._optimizer import optimizer as optimizer
from ._scaled import scaled as scaled
from ._step import Metrics as Metrics
from ._step import State as State
from ._step import make_score as make_score
from ._step import make_step as make_step
from ._step import start as start
from ._state import foreign_states as foreign_states
from ._state import holds_nothing as holds_nothing
from ._state import remove_states as remove_states
from ._state import restore_state as restore_state
from ._state import save_state as save_state
from ._state import saved_steps as saved_steps
from ._history import History as History
from ._history import write_history as write_history
from ._plot import plot_history as plot_history
from ._finetune import Heldout as Heldout
from ._finetune import Run as Run
from ._finetune import evaluate as evaluate
from ._finetune import finetune as finetune
