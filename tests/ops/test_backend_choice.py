"""Argument over context manager over auto; a named backend runs or raises; only auto falls back."""

import logging

import pytest
import torch

from fastdistill import ops, use_backend
from fastdistill.ops import backend as backends
from fastdistill.ops.modulate import MODULATE


@pytest.fixture
def arguments() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 8), torch.randn(2, 8), torch.randn(2, 8)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-in for a machine without a compiler."""
    monkeypatch.setattr(backends, "load_native", lambda: "the compiled library is not installed")
    monkeypatch.setattr(backends, "_CHOICES", {})
    backends.why_not.cache_clear()
    yield
    backends.why_not.cache_clear()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Backends that served calls of `modulate`, in order."""
    names: list[str] = []
    for name, run in MODULATE._run.items():
        monkeypatch.setitem(MODULATE._run, name, lambda *a, name=name, run=run: (names.append(name), run(*a))[1])
    return names


@pytest.mark.skipif(backends.load_native() is not None, reason="installed without a C++ compiler")
def test_precedence(arguments, ran) -> None:
    ops.modulate(*arguments)
    with use_backend("eager"):
        ops.modulate(*arguments)
        ops.modulate(*arguments, backend="native")
        with use_backend("native"):
            ops.modulate(*arguments)
        ops.modulate(*arguments)
    ops.modulate(*arguments)
    assert ran == ["native", "eager", "native", "native", "eager", "native"]


def test_restored_after_an_error(arguments, ran) -> None:
    with pytest.raises(KeyError), use_backend("eager"):
        raise KeyError
    assert backends.requested() == "auto"


def test_named_backend_says_why_it_cannot_run(arguments, no_library) -> None:
    with pytest.raises(RuntimeError, match="backend 'native' was asked for, but the compiled library is not installed"):
        ops.modulate(*arguments, backend="native")
    with pytest.raises(RuntimeError, match="float64"):
        ops.modulate(*(a.double() for a in arguments), backend="triton")


def test_auto_falls_back_and_says_so_once(arguments, no_library, caplog) -> None:
    with caplog.at_level(logging.INFO, "fastdistill"):
        for _ in range(3):
            out = ops.modulate(*arguments)
    assert torch.equal(out, ops.modulate(*arguments, backend="eager"))
    assert len(caplog.records) == 1
    assert "runs on eager: the compiled library is not installed" in caplog.text


def test_unknown_backend(arguments) -> None:
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        ops.modulate(*arguments, backend="cuda")
    with pytest.raises(ValueError, match="unknown backend 'fast'"), use_backend("fast"):
        pass


@pytest.mark.skipif(backends.load_native() is not None, reason="installed without a C++ compiler")
def test_compiled_function_follows_the_context_manager(arguments) -> None:
    torch._dynamo.reset()
    graphs = []

    def spy(graph, example_inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    compiled = torch.compile(lambda *a: ops.modulate(*a), backend=spy, fullgraph=True)
    compiled(*arguments)
    with use_backend("eager"):
        compiled(*arguments)
    assert any("fastdistill.modulate" in target for target in graphs[0])
    assert not any("fastdistill.modulate" in target for target in graphs[1])
