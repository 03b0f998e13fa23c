"""`fastdistill`, the one name of all commands."""

import resource
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec

import pytest

import fastdistill
from fastdistill import __main__ as entry


def run(*arguments: str, module: str = "fastdistill") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)


def called(monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str]) -> int:
    monkeypatch.setattr(sys, "argv", ["fastdistill", *arguments])
    monkeypatch.delitem(sys.modules, "fastdistill.info", raising=False)  # of another test; runpy would warn
    try:
        entry.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_help_names_every_command_at_once() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = run("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.returncode == 0
    # Seconds of a core, which other processes on the machine do not lengthen as they do those of a
    # clock.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    lines = ended.stdout.splitlines()
    for name in entry.COMMANDS:
        assert sum(line.split()[:1] == [name] for line in lines) == 1
        assert find_spec(f"fastdistill.{name}") is not None


def test_help_imports_no_package_of_others() -> None:
    code = (
        "import sys; before = set(sys.modules); from fastdistill.__main__ import main; sys.argv = ['fastdistill', "
        "'-h']; main();"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "['fastdistill']"


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(monkeypatch, ["--version"]) == 0
    assert capsys.readouterr().out == f"fastdistill {fastdistill.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["comprss"], "error: no command comprss; did you mean compress?"),
        (["zzz"], "error: no command zzz; there are compress, distill, sample, evaluate, info"),
        ([], "usage: fastdistill COMMAND"),
    ],
)
def test_without_a_known_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert called(monkeypatch, arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


@pytest.mark.parametrize("name", entry.COMMANDS)
def test_a_command_is_the_module_of_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert called(monkeypatch, [name, "--no-such-option"]) == 2
    assert f"fastdistill {name} --help" in capsys.readouterr().err


def test_a_command_gets_its_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(monkeypatch, ["info", "--json"]) == 0
    assert f'"fastdistill": "{fastdistill.__version__}"' in capsys.readouterr().out


def test_a_command_that_was_called_as_a_module_says_so() -> None:
    ended = run("--no-such-option", module="fastdistill.info")
    assert ended.returncode == 2
    assert "python -m fastdistill.info --help" in ended.stderr
