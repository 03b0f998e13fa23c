"""Timing of contenders in turns: a machine that speeds up or slows down does so for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def take_turns(contenders: dict[str, Callable[[], object]], rounds: int, warmup: int) -> dict[str, list[float]]:
    """Quartiles in milliseconds of every contender."""
    for run in contenders.values():
        for _ in range(warmup):
            run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            times[name].append(_milliseconds(run))
    return {name: torch.tensor(ms).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist() for name, ms in times.items()}


def _milliseconds(run: Callable[[], object]) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def peak_mib(run: Callable[[], object]) -> float | None:
    """Peak GPU memory of one run in MiB, beyond the memory in use before it; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
