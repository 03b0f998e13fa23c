"""What every command does around its work: read the options, and say in one line what went wrong."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

import tyro

from fastdistill.errors import UserError

ConfigT = TypeVar("ConfigT")

DISK_FULL = "error: the disk is full; free some space and give the same command again to continue"
MEMORY_FULL = "error: the GPU's memory is full; lower --batch (and for training --gradient-checkpointing) and give the command again"


def run(config_type: type[ConfigT], main: Callable[[ConfigT], None], *, prog: str) -> None:
    """Parse ``config_type`` from the command line and call ``main``.

    Exit codes: 2 wrong input, 1 a file that cannot be read or written, 130 Ctrl-C.
    """
    # The libraries read their verbosity when they are imported; at their default they talk of optional packages that nothing needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    try:
        main(tyro.cli(config_type, prog=_as_called(prog)))
    except UserError as error:
        _leave(f"error: {error}", 2)
    except KeyboardInterrupt:
        _leave("interrupted; what was finished is kept, the same command continues", 130)
    except BrokenPipeError:
        # The reader, `head` perhaps, has gone; the interpreter would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _leave(DISK_FULL, 1)
        _leave(f"error: {error}", 1)
    except Exception as error:
        # By name and text: torch and safetensors, whose errors these are, may not have been imported.
        if type(error).__name__ == "OutOfMemoryError":
            _leave(MEMORY_FULL, 1)
        if type(error).__name__ == "SafetensorError" and os.strerror(errno.ENOSPC) in str(error):
            _leave(DISK_FULL, 1)
        raise


def _as_called(prog: str) -> str:
    """`fastdistill compress` for the program `python -m fastdistill.compress` where `fastdistill` has dispatched to it."""
    module = prog.split()[-1]
    return prog if module in sys.orig_argv else module.replace(".", " ")


def _leave(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(code)
