"""A folder belongs to one process, for as long as that process lives."""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fastdistill.errors import UserError
from fastdistill.run import lock as module
from fastdistill.run.lock import Lock, refuse_if_held

HOLD = """
import sys, time
from pathlib import Path
from fastdistill.errors import UserError
from fastdistill.run.lock import Lock
print("ready", flush=True)
begin = float(input())
time.sleep(max(0, begin - time.time()))
try:
    held = Lock(Path(sys.argv[1]))
except UserError as error:
    print(error, flush=True)
else:
    print("held", flush=True)
input()
"""


class Other:
    """Another process that tries to hold `folder`."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.line() == "ready"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def begin(self, at: float = 0.0) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{at}\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def test_of_processes_that_begin_together_one_holds_the_folder(tmp_path: Path) -> None:
    others = [Other(tmp_path / "run") for _ in range(4)]
    try:
        together = time.time() + 0.3
        for other in others:
            other.begin(together)
        lines = [other.line() for other in others]
        holder = others[lines.index("held")].process.pid
        refused = [line for line in lines if line != "held"]
        assert len(refused) == 3
        for line in refused:
            assert f"in use by process {holder} on {platform.node()}, which began at 20" in line
            assert "choose another folder" in line
    finally:
        for other in others:
            other.kill()
    Lock(tmp_path / "run").release()  # at once after SIGKILL
    assert list((tmp_path / "run").iterdir()) == []


def written(folder: Path, **changes: object) -> None:
    folder.mkdir(exist_ok=True)
    owner = {"pid": os.getppid(), "host": platform.node(), "began": psutil.Process(os.getppid()).create_time()}
    (folder / module.FILE).write_text(json.dumps({**owner, **changes}))


@pytest.mark.parametrize("act", [Lock, refuse_if_held])
def test_a_name_alone_serves_where_the_disk_knows_no_locks(tmp_path: Path, act: object) -> None:
    written(tmp_path / "run")
    with pytest.raises(UserError, match=f"in use by process {os.getppid()} on"):
        act(tmp_path / "run")  # type: ignore[operator]


def test_a_number_that_another_process_has_now_holds_nothing(tmp_path: Path) -> None:
    written(tmp_path / "run", began=psutil.Process(os.getppid()).create_time() - 1000)
    refuse_if_held(tmp_path / "run")
    Lock(tmp_path / "run").release()
    gone = subprocess.Popen(["true"])
    gone.wait()
    written(tmp_path / "run", pid=gone.pid)
    Lock(tmp_path / "run").release()


def test_a_process_of_another_host_is_asked_about(tmp_path: Path) -> None:
    written(tmp_path / "run", host="elsewhere", pid=7)
    with pytest.raises(UserError, match=rf"process 7 on elsewhere, .* remove {tmp_path / 'run' / module.FILE} and"):
        Lock(tmp_path / "run")


def test_one_process_does_not_hold_a_folder_twice_but_again(tmp_path: Path) -> None:
    first = Lock(tmp_path / "run")
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        Lock(tmp_path / "run")
    first.release()
    second = Lock(tmp_path / "run")
    first.release()
    assert (tmp_path / "run" / module.FILE).exists(), "not the lock of another"
    second.release()
    # A run whose object was dropped.
    written(tmp_path / "run", pid=os.getpid(), began=psutil.Process().create_time())
    Lock(tmp_path / "run").release()


def test_half_a_name_is_no_name(tmp_path: Path) -> None:
    (tmp_path / module.FILE).write_text('{"pid": 1')
    Lock(tmp_path).release()
