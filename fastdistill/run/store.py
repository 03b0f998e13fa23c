"""Results that outlive a run: each lies in a folder that is named by everything it depends on."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from fastdistill.run.files import digest, folder_bytes, read_json, write_json

FORMAT = 1
"""Counts the changes of this package after which earlier results are no longer what it would make."""
COMPUTE = ("torch", "diffusers", "transformers")
"""Packages whose versions change numbers."""
FACTS, LOCK = "facts.json", "lock"
REMOVED = ".removed-"
OFF = "none"
"""Value of `--cache` that keeps nothing for other runs."""


class Store:
    """Folder of results that other runs can use.

    A result is whatever files its maker writes, each whole or not at all, to the folder that
    `entry` returns. Several processes may use one store, and make the same result at the same time:
    they write the same content. A folder that a process has asked for stays until the process ends.

    Args:
        folder: made when the first result is kept.
        limit: bytes above which `trim` removes results; None: no limit.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder, self.limit = folder, limit
        self._used: dict[Path, IO[str]] = {}

    def entry(self, kind: str, facts: Mapping[str, Any]) -> Path:
        """Folder for a result, or with one that was made before.

        Args:
            kind: beginning of the folder's name, such as `calibration`.
            facts: all that the result depends on, as JSON: digests of the networks
                (`fastdistill.models.digest`), prompts, sampling, seed, amounts. The versions of the
                packages that compute are added here.

        Raises:
            OSError: the folder cannot be written.
        """
        folder, known = self._place(kind, facts)
        while folder not in self._used:
            folder.mkdir(parents=True, exist_ok=True)
            # Locked until the process ends, so that no other process trims the folder.
            try:
                file = (folder / LOCK).open("a")
            except FileNotFoundError:
                continue
            _lock(file, fcntl.LOCK_SH)
            if not (folder / LOCK).exists():  # trimmed meanwhile
                file.close()
                continue
            os.utime(folder / LOCK)
            self._used[folder] = file
            if not (folder / FACTS).exists():
                write_json(folder / FACTS, known)
        return folder

    def find(self, kind: str, facts: Mapping[str, Any]) -> Path | None:
        """Folder that `entry` would return if it is there, and None if it would be made."""
        folder = self._place(kind, facts)[0]
        return self.entry(kind, facts) if (folder / FACTS).exists() else None

    def cached(self, kind: str, facts: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """Return the JSON value of a result: read if it is there, else made and kept.

        `facts` are those of `entry`.
        """
        path = self.entry(kind, facts) / "value.json"
        if not path.exists():
            write_json(path, make())
        return read_json(path)

    def size(self) -> int:
        """Bytes of all results."""
        return sum(map(folder_bytes, self._entries()))

    def trim(self) -> None:
        """Remove the results that were not used for the longest time, down to the limit.

        What a process uses stays.
        """
        for folder in self.folder.glob(f"{REMOVED}*"):  # by a process that was killed over it
            shutil.rmtree(folder, ignore_errors=True)
        if self.limit is None:
            return
        sizes = {folder: folder_bytes(folder) for folder in self._entries()}
        total = sum(sizes.values())
        for folder in sorted(sizes, key=_last_used):
            if total <= self.limit:
                return
            if folder not in self._used and _remove(folder):
                total -= sizes[folder]

    def _place(self, kind: str, facts: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
        packages = {name: _version(name) for name in COMPUTE}
        known = {"kind": kind, "format": FORMAT, "packages": packages, "facts": facts}
        known = json.loads(json.dumps(known, default=str))
        return self.folder / f"{kind}-{digest(known)}", known

    def _entries(self) -> Iterator[Path]:
        return (path for path in self.folder.glob("*") if (path / LOCK).exists() and not path.name.startswith("."))


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/fastdistill`, or `~/.cache/fastdistill`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "fastdistill"


def _last_used(folder: Path) -> float:
    try:
        return (folder / LOCK).stat().st_mtime
    except OSError:  # removed by another process
        return 0.0


def _remove(folder: Path) -> bool:
    """Remove a result, unless a process uses it."""
    try:
        with (folder / LOCK).open("rb") as file:
            if not _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
                return False
            # First its name: nobody finds half of a result.
            removed = folder.with_name(f"{REMOVED}{uuid4().hex}")
            folder.rename(removed)
    except FileNotFoundError:
        return True
    shutil.rmtree(removed, ignore_errors=True)
    return True


def _lock(file: IO[Any], how: int) -> bool:
    """Whether `file` could be locked, or is on a disk that knows no locks."""
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
