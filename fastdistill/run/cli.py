"""The frame of every command: read the options, and say in one line what went wrong."""

from __future__ import annotations

import errno
import io
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pkgutil import resolve_name
from typing import Any, NoReturn, TypeVar

import tyro

from fastdistill.errors import Notice, UserError
from fastdistill.run.options import JobConfig
from fastdistill.run.signals import Stopped, stopping_in_order

ConfigT = TypeVar("ConfigT")

DISK_FULL = "error: the disk is full; free some space and give the same command again to continue"
MEMORY_FULL = (
    "error: the GPU's memory is full; lower --batch (and for training --gradient-checkpointing) and give the "
    "command again"
)


def run(config_type: type[ConfigT], main: Callable[[ConfigT], None], *, prog: str) -> None:
    """Parse `config_type` from the command line and call `main`.

    Exit codes: 2 wrong input, 1 a file that cannot be read or written, 128 and the number of a
    signal that ended it in order: 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP.
    """
    with _errors_in_a_line():
        main(_parsed(config_type, _as_called(prog)))


def run_job(config_type: type[JobConfig], job: str, *, prog: str) -> None:
    """Parse `config_type` from the command line and run a job of it, or with `--dry-run` print its
    plan.

    Args:
        job: `module:class` of a `fastdistill.job.Job`, imported once the options are known to be
            right: `--help` and a mistyped option should not wait for torch.
        prog: how the command is called, as in `python -m fastdistill.compress`.

    Exit codes are those of `run`.
    """
    with _errors_in_a_line():
        prog = _as_called(prog)
        config = _parsed(config_type, prog)
        job_class = resolve_name(job)
        if config.run.dry_run:
            job_class.check_config(config)
            job_class.check_inputs(config)
            print(job_class.plan(config))
            return
        from rich.console import Console

        console = Console(stderr=True, highlight=False)
        job_class(config, console=console, command=f"{prog} {shlex.join(sys.argv[1:])}").run()


def _parsed(config_type: type[ConfigT], prog: str) -> ConfigT:
    """The config of the command line.

    Raises:
        UserError: the config refuses its values.
        SystemExit: an option is unknown or cannot be read, or `--help` was given.
    """
    # tyro takes a ValueError of a config for an option that cannot be read, and breaks its lines in
    # a frame.
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(config_type, prog=prog)
    except SystemExit as stop:
        cause: BaseException | None = stop
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__context__
        if cause is not None:
            raise cause from None
        sys.stderr.write(said.getvalue())
        raise


@contextmanager
def _errors_in_a_line() -> Iterator[None]:
    # The libraries read their verbosity when they are imported; at their default they talk of
    # optional packages that nothing needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    # bitsandbytes warns at its import, which diffusers does, of a kernel that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        _check_one_process()
        with _notices_in_a_line(), stopping_in_order():
            yield
    except UserError as error:
        _leave(f"error: {error}", 2)
    except KeyboardInterrupt as stop:
        code = stop.exit_code if isinstance(stop, Stopped) else 130
        _leave("interrupted; what was finished is kept, the same command continues", code)
    except BrokenPipeError:
        # The reader, `head` perhaps, has gone; the interpreter would complain once more when it
        # flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _leave(
                DISK_FULL.replace("the disk", f"the disk of {error.filename}", 1) if error.filename else DISK_FULL, 1
            )
        _leave(f"error: {error}", 1)
    except Exception as error:
        # By name and text: torch and safetensors, whose errors these are, may not have been
        # imported.
        if type(error).__name__ == "OutOfMemoryError":
            _leave(MEMORY_FULL, 1)
        if type(error).__name__ == "SafetensorError" and os.strerror(errno.ENOSPC) in str(error):
            _leave(DISK_FULL, 1)
        raise


@contextmanager
def _notices_in_a_line() -> Iterator[None]:
    """Print a `Notice` as one line, and other warnings as Python does."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_notice(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, Notice):
                print(f"note: {message}", file=sys.stderr)
            else:
                show(message, category, *where, **more)

        warnings.showwarning = show_notice
        warnings.simplefilter("always", Notice)
        yield


def _check_one_process() -> None:
    """Raise `UserError` if torchrun started several processes of a command; all but the first end
    without a word."""
    count = os.environ.get("WORLD_SIZE", "1")
    if not count.isdigit() or int(count) < 2:
        return
    if os.environ.get("RANK", "0") != "0":
        raise SystemExit(2)
    raise UserError(
        f"this command runs in one process, and WORLD_SIZE is {count}; give it without torchrun, or share out the "
        "training of a method over processes from Python (fastdistill.train.trainer.Trainer)"
    )


def _as_called(prog: str) -> str:
    """`fastdistill compress` for the program `python -m fastdistill.compress` where `fastdistill`
    has dispatched to it."""
    module = prog.split()[-1]
    return prog if module in sys.orig_argv else module.replace(".", " ")


def _leave(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(code)
