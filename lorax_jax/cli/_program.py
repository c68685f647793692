"""How every command ends: its exit status, and what it says when something is wrong.

0: done. 2: the input is wrong; one message on the standard error, no traceback, unless
`--debug` asks for it. 130: Ctrl-C; the message says what is saved. 143: the same by
SIGTERM, as schedulers send it. A bug of ours keeps its traceback.
"""

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from .._errors import LoraxError
from ._advice import in_options

_FULL = {
    errno.ENOSPC: "The disk is full.",
    errno.EDQUOT: "Your share of the disk is full.",
    errno.EFBIG: "A file would be larger than it may be; see `ulimit -f`.",
}

_SMALLER = {
    "finetune": "Lower --batch (--accumulate makes up for it) or --length, or give "
    "--remat.",
    "generate": "Lower --max-new-tokens, or give a shorter prompt.",
}

_SAVED, _STATUS = f"{__name__}.saved", f"{__name__}.status"


class Failure(click.ClickException):
    """Something is wrong with the input; the message says what, and what to do."""

    exit_code = 2
    ctx: click.Context | None = None


class Program(click.Group):
    """The group of commands, and the only place that ends the process."""

    def __init__(self, *args: Any, commands: list[click.Command], **kwargs: Any):
        named = {str(command.name): command for command in commands}
        super().__init__(*args, commands=named, **kwargs)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of use, not of the alphabet

    def main(
        self,
        args: Any = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **kwargs: Any,
    ) -> Any:
        del standalone_mode  # click's own would end with other messages and statuses
        prog_name = prog_name or self.name
        # Its retries fill the screen; what comes of them is said once.
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        try:
            status = super().main(args, prog_name, complete_var, False, **kwargs)
        except click.Abort:  # Ctrl-C before any command was running
            sys.exit(130)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            sys.exit(2)
        except click.ClickException as error:
            where = getattr(error, "ctx", None)
            name = where.command_path if where else self.name
            click.echo(f"{name}: {error.format_message()}", err=True)
            sys.exit(2)
        sys.exit(status if isinstance(status, int) else 0)


class Command(click.Command):
    """A command that turns the library's errors into messages."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        text = "Show the traceback of an error."
        self.params.append(click.Option(["--debug"], is_flag=True, help=text))

    def invoke(self, ctx: click.Context) -> Any:
        debug = ctx.params.pop("debug")
        try:
            with _termination(ctx):
                return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo(f"\nInterrupted. {_what_is_saved(ctx)}", err=True)
            ctx.exit(interrupted_status())
        except Failure as error:
            error.ctx = ctx
            raise
        except Exception as error:
            message = _message(error, ctx)
            if debug or message is None:
                raise
            failure = Failure(message)
            failure.ctx = ctx
            raise failure from error


@contextlib.contextmanager
def _termination(ctx: click.Context) -> Iterator[None]:
    """Inside, SIGTERM does what Ctrl-C does, and is remembered for the exit status."""
    if threading.current_thread() is not threading.main_thread():
        yield  # no other thread may set handlers
        return

    def handle(signum: int, frame: Any) -> None:
        ctx.meta[_STATUS] = 128 + signum
        on_interrupt = signal.getsignal(signal.SIGINT)
        if callable(on_interrupt):
            on_interrupt(signal.SIGINT, frame)
        else:  # in the background of a shell script Ctrl-C is ignored
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def interrupted_status() -> int:
    """The exit status of a command that was interrupted."""
    return click.get_current_context().meta.get(_STATUS, 128 + signal.SIGINT)


def warn(message: str) -> None:
    """Says on the standard error what works, but may not be what was meant."""
    click.echo(f"warning   {message}", err=True)


def note_saved(path: Path) -> None:
    """Remembers what is saved, for the message if the command does not get further."""
    saved = click.get_current_context().meta.setdefault(_SAVED, [])
    if str(path) not in saved:
        saved.append(str(path))


def _what_is_saved(ctx: click.Context) -> str:
    saved = ctx.meta.get(_SAVED)
    return f"Saved: {', '.join(saved)}." if saved else "Nothing was saved."


def _message(error: Exception, ctx: click.Context) -> str | None:
    """What to say about an error; `None` if it is a bug of ours."""
    if isinstance(error, LoraxError):
        return in_options(str(error))
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        advice = _SMALLER.get(str(ctx.command.name), "Free some of it.")
        return f"Out of memory. {advice} {_what_is_saved(ctx)}"
    for number, text in _FULL.items():  # storage libraries have error types of theirs
        if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
            return f"{text} {_what_is_saved(ctx)}"
    if isinstance(error, BrokenPipeError):
        return None  # nobody reads on; click ends the process quietly
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}. {_what_is_saved(ctx)}"
    return None
