"""`import fastdistill` is light, and info tells what runs where."""

import subprocess
import sys

import pytest

import fastdistill
from fastdistill.info import InfoConfig, main
from fastdistill.ops import OPERATORS, backend


def run(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True).stdout


def test_import_loads_neither_torch_nor_diffusers() -> None:
    heavy = run(
        "-c",
        "import fastdistill, sys; print([m for m in ('torch', 'diffusers', 'triton') if m in sys.modules])",
    )
    assert heavy.strip() == "[]"


def test_ops_import_leaves_triton_alone() -> None:
    assert run("-c", "import fastdistill.ops, sys; print('fastdistill.ops.triton' in sys.modules)").strip() == "False"


def test_info_names_a_backend_for_every_operator() -> None:
    operators = fastdistill.info()["operators"]
    assert set(operators) == set(OPERATORS)
    for devices in operators.values():
        for dtypes in devices.values():
            for row in dtypes.values():
                assert row["auto"] not in row["refused"]
                assert set(row["refused"]) <= set(backend.BACKENDS)


@pytest.mark.parametrize("code", ["import fastdistill.info", "from fastdistill.info import info", "import fastdistill"])
def test_info_is_a_function_however_it_is_imported(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.delitem(sys.modules, "fastdistill.info", raising=False)
    monkeypatch.delattr(fastdistill, "info", raising=False)
    exec(code, {})
    assert "modulate" in fastdistill.info()["operators"]


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(InfoConfig())
    printed = capsys.readouterr().out
    assert fastdistill.__version__ in printed
    for name in OPERATORS:
        assert name in printed
    if backend.load_native() is None:
        assert "native" in printed


def test_unknown_attribute() -> None:
    assert not hasattr(fastdistill, "nothing_like_this")
    assert {"ops", "info", "patched", "use_backend"} <= set(dir(fastdistill))
