"""Commands print a notice as one line, and leave other warnings to Python."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass

import pytest

from fastdistill.errors import Notice, notice
from fastdistill.run import cli


@dataclass(frozen=True)
class Nothing:
    """Options of a command that has none."""


def test_a_notice_is_a_line_and_a_warning_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(_: Nothing) -> None:
        notice("3 of 40 prompts are long")
        notice("3 of 40 prompts are short")
        warnings.warn("something old", FutureWarning, stacklevel=1)

    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.warns(FutureWarning, match="something old"):
        cli.run(Nothing, main, prog="python -m command")
    assert capsys.readouterr().err.splitlines() == ["note: 3 of 40 prompts are long", "note: 3 of 40 prompts are short"]


def test_python_sees_a_notice_where_it_called() -> None:
    def called() -> None:
        notice("one part is a variant")

    with pytest.warns(Notice, match="one part is a variant") as seen:
        called()
    assert seen[0].filename == __file__
