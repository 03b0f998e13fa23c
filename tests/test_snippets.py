"""Every code block of README.md and docs/*.md runs, as it stands there.

Python blocks of a document run one after another in one namespace, in an empty folder. `GIVEN` has
the names that the reader brings along, and `SMALLER` the numbers that would take minutes, with
smaller ones; both have to occur. Lines for a shell are read by the parsers of the real programs:
jobs then do a dry run, with files in place of `path/to/...`. A block that is no code has a comment
before it that says so:

    <!-- not run: a diagram -->
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from PIL import Image

from fastdistill.__main__ import COMMANDS
from fastdistill.errors import Notice
from fastdistill.models.loading import embedded_folder
from fastdistill.models.sampling import SamplingDefaults
from tests.commands.conftest import COMMANDS as CALLS
from tests.tiny import tiny_flux_pipeline

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = re.compile(r"<!-- not run: .+ -->")
HUB = "black-forest-labs/FLUX.1-dev"


@dataclasses.dataclass(frozen=True)
class Block:
    document: str
    line: int
    text: str
    language: str
    """Language that a fenced block names; empty for an indented one."""
    marked: bool
    """Whether the comment before the block says that it is not to be run."""

    @property
    def is_python(self) -> bool:
        if self.language:
            return self.language == "python"
        try:
            ast.parse(self.text)
        except SyntaxError:
            return False
        return True

    @property
    def is_shell(self) -> bool:
        if self.language:
            return self.language in ("sh", "bash", "shell", "console")
        first_words = {line.split()[0] for line in self.text.splitlines() if line.strip()}
        return first_words <= {"make", "fastdistill", "python", "pip", "torchrun"}


def blocks(document: str, text: str) -> list[Block]:
    """Code blocks of Markdown: fenced, or indented by four spaces after an empty line."""
    found, lines, number = [], text.splitlines(), 0
    while number < len(lines):
        fence = re.match(r"(```+)\s*(\w*)", lines[number])
        indented = lines[number].startswith("    ") and (number == 0 or not lines[number - 1].strip())
        if not fence and not indented:
            number += 1
            continue
        first = number
        if fence:
            number = next(end for end in range(first + 1, len(lines)) if lines[end].startswith(fence[1])) + 1
            inside, language = lines[first + 1 : number - 1], fence[2]
        else:
            while number < len(lines) and (lines[number].startswith("    ") or not lines[number].strip()):
                number += 1
            inside, language = [line[4:] for line in lines[first:number]], ""
        before = [line for line in lines[:first] if line.strip()]
        marked = bool(before) and NOT_RUN.fullmatch(before[-1].strip()) is not None
        found.append(Block(document, first + 1, "\n".join(inside).strip("\n"), language, marked))
    return found


def all_blocks() -> list[Block]:
    return [
        block
        for path in DOCUMENTS
        for block in blocks(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
        if not block.marked
    ]


def commands() -> list[Any]:
    """Lines of every shell block, without comments."""
    return [
        pytest.param(words, id=f"{block.document}:{block.line + number}")
        for block in all_blocks()
        if block.is_shell
        for number, line in enumerate(block.text.splitlines())
        if (words := shlex.split(line, comments=True))
    ]


def operator_inputs() -> dict[str, Any]:
    """Tensors of a block of two heads of 16 channels, four tokens and two samples."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tokens = {name: drawn(2, 4, 32) for name in ("x", "attention")}
    modulation = {name: drawn(2, 1, 32) for name in ("gate", "scale", "shift")}
    heads = {name: drawn(2, 4, 2, 16) for name in ("q", "k")}
    weights = {name: drawn(16) for name in ("q_weight", "k_weight")}
    rotation = {name: drawn(4, 16) for name in ("cos", "sin")}
    predictions = {name: drawn(2, 4, 32) for name in ("noise", "cond", "uncond", "critic")}
    return {**tokens, **modulation, **heads, **weights, **rotation, **predictions}


def own_pipeline() -> dict[str, Any]:
    """A pipeline of the reader's own, whose images have 64 pixels and whose folder says so."""
    folder = Path("own")
    tiny_flux_pipeline().save_pretrained(folder)
    SamplingDefaults(num_inference_steps=2, height=64, width=64, max_sequence_length=8).save(folder)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.default_sample_size = 8
    return {"pipeline": pipeline}


def images_of_a_reader() -> dict[str, Any]:
    return {"images": torch.rand(2, 3, 64, 64) * 2 - 1}


GIVEN: dict[str, list[Callable[[], dict[str, Any]]]] = {
    "README.md": [operator_inputs, own_pipeline],
    "docs/distillation.md": [own_pipeline, images_of_a_reader],
    "docs/patching.md": [own_pipeline],
}
"""Names that the reader of a document brings along."""

SMALLER: dict[str, dict[str, str]] = {
    "README.md": {"says 'fast'\"])": "says 'fast'\"], points=8, steps=4)"},
    "docs/distillation.md": {"TrainConfig(steps=1000": "TrainConfig(steps=2", "batch(64,": "batch(2,"},
}
"""Numbers of a document that would take minutes, with those that are tried."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More have nothing to do on tiny models, but wait for each other where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_block_is_code_or_says_why_not(path: Path) -> None:
    for block in blocks(path.name, path.read_text(encoding="utf-8")):
        assert block.marked or block.is_python or block.is_shell, (
            f"{block.document}:{block.line} is neither Python nor lines for a shell; "
            "mark it by <!-- not run: reason --> in the line before it"
        )


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = str(path.relative_to(ROOT))
    monkeypatch.chdir(tmp_path)
    snippets = [block for block in all_blocks() if block.document == document and block.is_python]
    code = "\n\n".join(block.text for block in snippets)
    for large, small in SMALLER.get(document, {}).items():
        assert large in code, f"{document} has no {large} any more"
        code = code.replace(large, small)
    given = {name: value for make in GIVEN.get(document, []) for name, value in make().items()}
    read = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    assert given.keys() <= read, f"{document} does not read {sorted(given.keys() - read)} any more"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        exec(compile(code, document, "exec"), given)


def makes(words: list[str]) -> None:
    for target in words[1:]:
        result = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr


class Parsed(Exception):
    """The options have been read, and the work would begin."""


def parses(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a script or module until it has read its options."""
    read = tyro.cli

    def only_read(target: Any, **settings: Any) -> None:
        @functools.wraps(target)
        def nothing(*_: Any, **__: Any) -> None:
            return None

        read(target if isinstance(target, type) else nothing, **settings)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", only_read)
    name, *options = words
    try:
        if name == "-m":
            monkeypatch.setattr(sys, "argv", options)
            runpy.run_module(options[0], run_name="__main__")
        else:
            monkeypatch.setattr(sys, "argv", words)
            monkeypatch.syspath_prepend(str((ROOT / name).parent))
            runpy.run_path(str(ROOT / name), run_name="__main__")
    except Parsed:
        return
    pytest.fail(f"{shlex.join(words)} reads no options")


@pytest.fixture(scope="module")
def readers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files in place of the paths that documents name."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("path/to/pipeline", "path/to/teacher"):
        shutil.copytree(embedded_folder(), folder / name)
    shutil.copytree(embedded_folder() / "transformer", folder / "path/to/smaller")
    (folder / "path/to/images").mkdir()
    Image.new("RGB", (64, 64)).save(folder / "path/to/images" / "image.png")
    # FLUX.1-dev's config, by which a plan is made: the defaults of its class, and embedded guidance.
    config = {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True}
    for name in ("path/to", "path/to/transformer", f"{HUB}/transformer"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config))
    assert FluxTransformer2DModel.load_config(folder / HUB / "transformer")["guidance_embeds"]
    return folder


@pytest.fixture
def called(readers_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Function that calls a command of fastdistill: jobs do a dry run, and others read their
    options."""
    monkeypatch.chdir(readers_folder)
    monkeypatch.setenv("COLUMNS", "200")

    def call(words: list[str]) -> None:
        name, *options = words
        assert name in COMMANDS
        plans = name in ("compress", "distill") and not {"--help", "--dry-run"} & set(options)
        monkeypatch.setattr(sys, "argv", [name, *options, *(["--dry-run"] if plans else [])])
        if name not in ("compress", "distill"):
            module = importlib.import_module(f"fastdistill.{name}")
            tyro.cli(getattr(module, f"{name.capitalize()}Config"), args=options)
            return
        with pytest.raises(SystemExit) if "--help" in options else warnings.catch_warnings() as ended:
            CALLS[name]()
        assert ended is None or "--help" not in options or ended.value.code == 0

    return call


@pytest.mark.parametrize("words", commands())
def test_shell(words: list[str], called: Callable[[list[str]], None], monkeypatch: pytest.MonkeyPatch) -> None:
    program, *rest = words
    if program == "make":
        makes(words)
    elif program == "fastdistill":
        called(rest)
    elif program == "python" and rest[0] == "-m" and rest[1].removeprefix("fastdistill.") in COMMANDS:
        called([rest[1].removeprefix("fastdistill."), *rest[2:]])
    elif program == "python":
        parses(rest, monkeypatch)
    else:
        pytest.fail(f"{program} is a program that this test does not know")


def test_blocks_are_found() -> None:
    text = "a\n\n    x = 1\n\n    y = 2\nb\n```python\nz = 3\n```\n\n<!-- not run: a diagram -->\n\n    -> o\n"
    first, second, third = blocks("here", text)
    assert (first.text, first.line, first.is_python, first.marked) == ("x = 1\n\ny = 2", 3, True, False)
    assert (second.text, second.language) == ("z = 3", "python")
    assert third.marked
    assert not third.is_python
    assert not third.is_shell
    (shell,) = blocks("here", "\n    fastdistill info   # all is well\n")
    assert shell.is_shell
    assert not blocks("here", "- a list\n  that goes on\n      further in\n")
