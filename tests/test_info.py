"""`import fastdistill` is light, and info tells what runs where."""

import subprocess
import sys
from pathlib import Path

import pytest

import fastdistill
from fastdistill.info import InfoConfig, main, summary
from fastdistill.ops import OPERATORS, backend
from fastdistill.run.store import Store


def run(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True).stdout


def test_import_loads_neither_torch_nor_diffusers() -> None:
    heavy = run(
        "-c",
        "import fastdistill, sys; print([m for m in ('torch', 'diffusers', 'triton') if m in sys.modules])",
    )
    assert heavy.strip() == "[]"


@pytest.mark.slow
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


def test_command_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    main(InfoConfig())
    printed = capsys.readouterr().out
    assert fastdistill.__version__ in printed
    devices = len(fastdistill.info()["attention"])
    assert len(printed.splitlines()) <= 6 + 4 * devices
    assert ("all is well" in printed) == (backend.load_native() is None)


def test_the_cache_of_runs_has_a_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fastdistill.info()["cache"] == {"folder": str(tmp_path / "fastdistill"), "bytes": 0}
    entry = Store(tmp_path / "fastdistill").entry("drawn", {"seed": 1})
    (entry / "shard").write_bytes(bytes(5000))
    assert 5000 < fastdistill.info()["cache"]["bytes"] < 6000


def test_command_tells_all(capsys: pytest.CaptureFixture[str]) -> None:
    main(InfoConfig(all=True))
    printed = capsys.readouterr().out
    for name in OPERATORS:
        assert name in printed
    assert "not on triton: " in printed or "not on native: " in printed


def test_command_says_what_is_amiss(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(backend, "load_native", lambda: "the library was not compiled")
    main(InfoConfig())
    printed = capsys.readouterr().out
    assert "slower than it could be: the library was not compiled" in printed
    assert "all is well" not in printed


def test_operators_that_run_alike_share_a_line() -> None:
    def row(name: str) -> dict[str, str]:
        return {"auto": name}

    operators = {f"op{i}": {"cpu": {"float32": row("native"), "float64": row("native")}} for i in range(4)}
    operators["other"] = {"cpu": {"float32": row("native"), "float64": row("eager")}}
    facts = {"operators": operators, "attention": {"cpu": {"float32": "flash", "float64": "math"}}}
    assert summary(facts) == [
        "on cpu: 4 of 5 operators on native",
        "on cpu: other on native (float32), eager (float64)",
        "on cpu: attention on flash (float32), math (float64)",
    ]


def test_unknown_attribute() -> None:
    assert not hasattr(fastdistill, "nothing_like_this")
    assert {"ops", "info", "patched", "use_backend"} <= set(dir(fastdistill))
