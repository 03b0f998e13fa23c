"""Last checkpoint of a finished run, kept in the store to train the run on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdistill.run.store import Store

KIND, FOLDER = "trained", "training"


def keep(store: Store, facts: Mapping[str, Any], training: Path) -> int | None:
    """Keep the folder of a finished training; return its bytes, or None if the store is too small."""
    size = sum(path.stat().st_size for path in training.rglob("*") if path.is_file())
    if store.limit is not None and size > store.limit:
        return None
    _copy(training, store.entry(KIND, facts) / FOLDER)
    return size


def find(store: Store, facts: Mapping[str, Any]) -> Path | None:
    """Folder of a finished training that was kept."""
    entry = store.find(KIND, facts)
    return entry / FOLDER if entry is not None and (entry / FOLDER).exists() else None


def take_up(kept: Path, training: Path) -> None:
    """Begin the folder of a training with what was kept, whole or not at all."""
    if not training.exists():
        _copy(kept, training)


def _copy(source: Path, target: Path) -> None:
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    # Files of a training are replaced and never changed, but for the log, which is appended to.
    shutil.copytree(source, partial, copy_function=_link, ignore=shutil.ignore_patterns("lock"))
    partial.rename(target)


def _link(source: str, target: str) -> None:
    if not source.endswith(".jsonl"):
        try:
            os.link(source, target)
            return
        except OSError:  # another disk, or one without links
            pass
    shutil.copy2(source, target)
