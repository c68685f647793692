"""What `lorax-jax` starts: nothing is imported before Ctrl-C is provided for.

The package takes a second or two to import, and a module inside it is imported after
it. So this one lies beside it.
"""

import os
import signal
from types import FrameType


def main() -> None:
    """Runs the command line; Ctrl-C while it is being imported ends it with 130.

    Imported code may swallow a `KeyboardInterrupt`, or die of it in its own way, so
    none is raised: until the commands can answer for themselves, the process ends.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else somebody wants Ctrl-C ignored
        signal.signal(signal.SIGINT, _end)
    from lorax_jax.cli import main

    signal.signal(signal.SIGINT, before)
    main()


def _end(signum: int, frame: FrameType | None) -> None:
    del frame
    os.write(2, b"\nInterrupted. Nothing was saved.\n")
    os._exit(128 + signum)
