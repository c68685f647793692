"""Ctrl-C between two steps instead of in the middle of one."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Interrupt:
    """Whether Ctrl-C was pressed, and what pressing it again does."""

    def __init__(self):
        self.asked = False
        self._shielded = False

    def handle(self, signum, frame):
        """The signal's handler."""
        if self.asked and not self._shielded:
            raise KeyboardInterrupt
        self.asked = True

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        """Inside, no Ctrl-C raises: what is being written is written to its end."""
        self._shielded = True
        try:
            yield
        finally:
            self._shielded = False


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Inside, the first Ctrl-C is only remembered.

    A step donates its state: an exception in its middle would leave nothing to save.
    A second Ctrl-C raises `KeyboardInterrupt` at once, unless a state is being saved.
    Outside the main thread, where Python allows no signal handlers, nothing changes.

    Yields:
        An `Interrupt`, whose `asked` says whether to stop.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = signal.signal(signal.SIGINT, interrupt.handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
