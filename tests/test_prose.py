"""Docstrings keep what CONTRIBUTING's style sheet says, as far as a machine can tell."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path
    for folder in ("fastdistill", "tests", "benchmarks", "examples")
    for path in (ROOT / folder).rglob("*.py")
    if "assets" not in path.parts
)
# A reader who sees the docstring alone, in an editor or an API page, has to know what it speaks of.
OPENINGS = re.compile(r"(Of|Those|These|That of|The same|What|Where|How)\b")
OTHER_MARKUP = re.compile(r"``|:\w+:`")
LONGEST = 100


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring, those of attributes too."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            value = getattr(statement, "value", None)
            if isinstance(statement, ast.Expr) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield statement.lineno, value.value


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_follow_the_style_sheet(path: Path) -> None:
    for line, text in docstrings(path):
        assert not OPENINGS.match(text.strip()), f"line {line} begins with {text.split()[0]!r}"
        assert not OTHER_MARKUP.search(text), f"line {line}: single backquotes are the only markup"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_wraps_at_a_hundred_columns(path: Path) -> None:
    lines = path.read_text().splitlines()
    for line, text in docstrings(path):
        for number in range(line, line + text.count("\n") + 1):
            found = lines[number - 1]
            assert len(found.rstrip(chr(34))) <= LONGEST or "|" in found or "  " in found.strip(), (
                f"line {number} has {len(found)} columns"
            )
