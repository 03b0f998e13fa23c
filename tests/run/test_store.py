"""Results that outlive a run: found by what they depend on, trimmed by use, safe for several
processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastdistill.run import store as module
from fastdistill.run.store import Store, default_folder


def test_equal_facts_have_one_result_and_others_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def make() -> int:
        made.append(len(made))
        return len(made)

    facts = {"parts": {"vae": "ab"}, "seed": 3, "sizes": (1, 2)}
    assert Store(tmp_path).cached("scores", facts, make) == 1
    assert Store(tmp_path).cached("scores", {"sizes": [1, 2], "seed": 3, "parts": {"vae": "ab"}}, make) == 1
    assert Store(tmp_path).cached("scores", {**facts, "parts": {"vae": "ac"}}, make) == 2
    assert Store(tmp_path).cached("errors", facts, make) == 3
    monkeypatch.setattr(module, "_version", lambda package: "9.0")
    assert Store(tmp_path).cached("scores", facts, make) == 4, "made by another torch"
    assert Store(tmp_path).size() > 0


def filled(folder: Path, name: str, age: int, size: int = 1000) -> Path:
    found = Store(folder).entry("drawn", {"name": name})
    (found / "data").write_bytes(bytes(size))
    stamp = 1_000_000_000 - age
    os.utime(found / "lock", (stamp, stamp))
    return found


def test_what_was_not_used_for_the_longest_time_goes_first(tmp_path: Path) -> None:
    oldest, older, newest = (filled(tmp_path, name, age) for name, age in (("a", 300), ("b", 200), ("c", 100)))
    Store(tmp_path).entry("drawn", {"name": "a"})  # used again
    total = Store(tmp_path).size()
    Store(tmp_path, total).trim()
    assert all(path.exists() for path in (oldest, older, newest))
    Store(tmp_path, total - 1).trim()
    assert [path.exists() for path in (oldest, older, newest)] == [True, False, True]
    Store(tmp_path, 0).trim()
    assert list(tmp_path.iterdir()) == []


def test_what_another_process_uses_stays(tmp_path: Path) -> None:
    used = filled(tmp_path, "used", 500)
    code = f"""
from pathlib import Path
from fastdistill.run.store import Store
store = Store(Path({str(tmp_path)!r}))
store.entry("drawn", {{"name": "used"}})
print("ready", flush=True)
input()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"ready\n"
        Store(tmp_path, 0).trim()
        assert (used / "data").exists()
        other.kill()
    Store(tmp_path, 0).trim()
    assert not used.exists()


def test_what_a_killed_process_half_removed_goes(tmp_path: Path) -> None:
    (tmp_path / f"{module.REMOVED}1").mkdir()
    Store(tmp_path).trim()
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "fastdistill"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_folder() == Path("/home/somebody/.cache/fastdistill")
