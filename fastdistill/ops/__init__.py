"""Fused operators of diffusion transformers: tensors in, tensors out, with gradients, on CPU and GPU."""

from fastdistill.ops.backend import use_backend
from fastdistill.ops.modulate import MODULATE, modulate
from fastdistill.ops.op import Operator

# The one table that tests, benchmarks and `fastdistill.info()` loop over. A new operator is one line here.
OPERATORS: dict[str, Operator] = {op.name: op for op in (MODULATE,)}

__all__ = ["OPERATORS", "modulate", "use_backend"]
