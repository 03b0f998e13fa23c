"""The Makefile's own logic: every program that it calls is a stand-in that writes down how it was
called."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = ("Makefile", "pyproject.toml", "setup.py", "CMakeLists.txt", "constraints.txt")
PROGRAM = """#!/bin/sh
echo "$(basename "$0") $*" >> calls
"""
INTERPRETER = """#!/bin/sh
mkdir -p .venv/bin
cp program .venv/bin/python
cp program .venv/bin/pip
"""

pytestmark = [
    pytest.mark.skipif(shutil.which("make") is None, reason="needs make"),
    pytest.mark.skipif(not (ROOT / "Makefile").exists(), reason="needs the sources"),
]


class House:
    """A copy of what the Makefile reads, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in FILES:
            shutil.copy(ROOT / name, folder / name)
        for name, text in (("program", PROGRAM), ("interpreter", INTERPRETER)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    def make(self, *arguments: str) -> str:
        """Output of `make`. All files are then a minute old, so that the next change is a newer
        one."""
        command = ["make", "--no-print-directory", "PYTHON=./interpreter", *arguments]
        # Of an outer make, which may run this test, nothing is to be inherited.
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        run = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr
        for path in self.folder.rglob("*"):
            os.utime(path, (time.time() - 60, path.stat().st_mtime - 60))
        return run.stdout

    def calls(self) -> list[str]:
        """Calls since the last look."""
        log = self.folder / "calls"
        calls = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return calls

    def replace(self, name: str, old: str, new: str) -> None:
        text = (self.folder / name).read_text()
        assert old in text
        (self.folder / name).write_text(text.replace(old, new))


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def test_make_alone_lists_every_target(house: House) -> None:
    phony = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith(".PHONY: "))
    lines = house.make().splitlines()
    assert [line.split()[1] for line in lines] == phony.split()[1:]
    assert all(len(line.split(maxsplit=2)) == 3 for line in lines), "a target without a purpose"
    assert house.calls() == []


def test_demo_goes_on_in_one_folder_until_it_is_finished(house: House) -> None:
    command = "python -m fastdistill.compress --drop-blocks 4 --output runs/demo"
    house.make("demo")
    installed = house.calls()
    assert installed == ["pip install --quiet torch", "pip install --quiet --editable .", command]
    house.make("demo")
    assert house.calls() == [command]
    (house.folder / "runs/demo").mkdir(parents=True)
    (house.folder / "runs/demo/compress.json").write_text("{}")
    printed = house.make("demo")
    assert house.calls() == []
    assert "runs/demo/grid.png" in printed
    assert "make demo OUTPUT=" in printed
    house.make("demo", "OUTPUT=runs/a second")
    assert house.calls() == ["python -m fastdistill.compress --drop-blocks 4 --output runs/a second"]


def test_fast_tests_are_those_that_are_not_slow(house: House) -> None:
    house.make("test")
    house.make("test-fast")
    tests = [call for call in house.calls() if "pytest" in call]
    assert tests == [tests[0], f"{tests[0]} -m not slow"]


def test_only_what_concerns_the_package_builds_it_again(house: House) -> None:
    build, developers = "pip install --quiet --editable .", "pip install --quiet --group dev"
    house.make("test")
    assert [call for call in house.calls() if call in (build, developers)] == [build, developers]
    # As the tests of the build leave it, which import the backend.
    (house.folder / "_build/__pycache__").mkdir(parents=True)
    (house.folder / "_build/__pycache__/native.pyc").touch()
    house.make("demo")
    assert build not in house.calls()
    house.replace("pyproject.toml", '"pytest-xdist"', '"pytest-xdist", "another"')
    house.make("demo")
    assert build not in house.calls()
    house.make("test")
    calls = house.calls()
    assert build not in calls
    assert developers in calls
    house.replace("pyproject.toml", '"safetensors"', '"safetensors", "another"')
    house.make("demo")
    assert build in house.calls()
    house.replace("setup.py", "import", "import ")
    house.make("demo")
    assert build in house.calls()
