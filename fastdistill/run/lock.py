"""A lock that one process holds on a folder, so that no other process works in it."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
from pathlib import Path
from typing import IO, Any

import psutil

from fastdistill.errors import UserError
from fastdistill.run.files import read_json

FILE = "lock"
CLOCKS_AGREE = 2.0
"""Seconds by which the start of one process may differ when two processes look at it."""


class Lock:
    """Hold on a folder, from when it is made to `release`, or to the end of the process.

    A file in the folder names the process, its host and when it began. The kernel lets go of the
    file when the process ends, however it ends. A disk that knows no such locks, as some network
    file systems do, is served by the names alone. A lock of another host is never broken: nobody
    here can see whether its process is alive.

    Raises:
        UserError: another process holds the folder.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._file = self._locked()
        if (owner := _owner(self.path)) is not None and _may_run(owner):
            self._file.close()
            raise _in_use(self.path, owner)
        self._file.truncate(0)
        self._file.write(json.dumps(_this_process()))
        self._file.flush()

    def release(self) -> None:
        """Let go of the folder, and remove the file."""
        if not self._file.closed:
            if _is(self._file, self.path):
                self.path.unlink()
            self._file.close()

    def _locked(self) -> IO[str]:
        while True:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                file = self.path.open("a")
            except FileNotFoundError:  # a process that has ended removed the folder
                continue
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise _in_use(self.path, _owner(self.path, patience=1.0)) from None
            except OSError:
                return file
            if _is(file, self.path):
                return file
            file.close()  # a process that has ended removed it


def refuse_if_held(folder: Path) -> None:
    """Raise `UserError` if another process holds `folder`; write nothing."""
    path = folder / FILE
    if (owner := _owner(path)) is not None and _may_run(owner):
        raise _in_use(path, owner)


def _this_process() -> dict[str, Any]:
    began = psutil.Process().create_time()
    return {"pid": os.getpid(), "host": platform.node(), "began": began}


def _owner(path: Path, *, patience: float = 0.0) -> dict[str, Any] | None:
    """Process that `path` names; None without one. A process writes its name just after it has
    locked the file, and is waited for with `patience`, in seconds."""
    until = time.monotonic() + patience
    while (owner := _named(path)) is None and time.monotonic() < until:
        time.sleep(0.01)
    return owner


def _named(path: Path) -> dict[str, Any] | None:
    try:
        owner = read_json(path)
        return {name: owner[name] for name in ("pid", "host", "began")}
    except (UserError, TypeError, KeyError):
        return None


def _may_run(owner: dict[str, Any]) -> bool:
    """Whether a process may be alive that is not this one."""
    if owner["host"] != platform.node():
        return True
    if owner["pid"] == os.getpid():
        return False
    try:
        process = psutil.Process(owner["pid"])
        # The number may have been given to another process since.
        same = abs(process.create_time() - owner["began"]) < CLOCKS_AGREE
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def _in_use(path: Path, owner: dict[str, Any] | None) -> UserError:
    if owner is None:
        return UserError(f"{path.parent} is in use by another process; wait until it ends, or choose another folder")
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["began"]))
    who = f"process {owner['pid']} on {owner['host']}, which began at {since}"
    if owner["host"] == platform.node():
        return UserError(f"{path.parent} is in use by {who}; wait until it ends, or choose another folder")
    return UserError(
        f"{path.parent} is in use by {who}; if that process has ended, remove {path} and give the command again"
    )


def _is(file: IO[str], path: Path) -> bool:
    """Whether `path` is still the open `file`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
