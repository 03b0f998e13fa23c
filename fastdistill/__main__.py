"""`fastdistill COMMAND`, or `python -m fastdistill COMMAND`: every command under one name.

Imports nothing of a command before that command is chosen, so that `--help` answers at once.
"""

from __future__ import annotations

import runpy
import sys
from typing import NoReturn

from fastdistill import __version__

COMMANDS = {
    "compress": "cut blocks out of a diffusion transformer, repair it and train away the damage",
    "distill": "train a student that draws in few steps, or without the second call of guidance",
    "sample": "draw images with a pipeline, as one labelled grid",
    "evaluate": "measure a pipeline against known truth, or against another pipeline",
    "info": "say what this installation can do: versions, devices, backends of the operators",
}
"""Purpose of each command. `fastdistill NAME` runs the module `fastdistill.NAME` as a program."""


def main() -> None:
    """Run the command that the first argument names, with the arguments that follow it.

    Exit codes: 2 without a known command, otherwise the command's own.
    """
    name, *arguments = sys.argv[1:] or [""]
    if name in COMMANDS:
        sys.argv = [name, *arguments]
        runpy.run_module(f"fastdistill.{name}", run_name="__main__", alter_sys=True)
    elif name in ("-h", "--help"):
        print(_help())
    elif name == "--version":
        print(f"fastdistill {__version__}")
    else:
        _refuse(name)


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = [f"  {name:{width}}  {purpose}" for name, purpose in COMMANDS.items()]
    usage = ["usage: fastdistill COMMAND [OPTIONS]", "       fastdistill --help | --version"]
    return "\n".join([*usage, "", "commands:", *commands, "", "Options of a command: fastdistill COMMAND --help"])


def _refuse(name: str) -> NoReturn:
    import difflib

    if not name:
        print(_help(), file=sys.stderr)
    else:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        advice = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(COMMANDS)}"
        print(f"error: no command {name}; {advice}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
