"""Fused operators of diffusion transformers: tensors in, tensors out, with gradients.

The operators run on CPU and GPU, in plain PyTorch, C++, CUDA or Triton. They are differentiable in
reverse and in forward mode (`torch.autograd.forward_ad`), and under the transforms of `torch.func`.

A new operator is its file and one line here. The line exports its function, and importing the file
enters the operator in `OPERATORS`, which tests, benchmarks and `fastdistill.info()` loop over.
"""

from fastdistill.ops.activation_concat import activation_concat as activation_concat
from fastdistill.ops.backend import use_backend as use_backend
from fastdistill.ops.block_statistics import BlockStatistics as BlockStatistics
from fastdistill.ops.block_statistics import block_statistics as block_statistics
from fastdistill.ops.dmd_loss import dmd_loss as dmd_loss
from fastdistill.ops.feature_kd_loss import feature_kd_loss as feature_kd_loss
from fastdistill.ops.gated_residual import gated_residual as gated_residual
from fastdistill.ops.gated_residual_modulate import gated_residual_modulate as gated_residual_modulate
from fastdistill.ops.joint_qk_norm_rope import joint_qk_norm_rope as joint_qk_norm_rope
from fastdistill.ops.modulate import modulate as modulate
from fastdistill.ops.modulate import modulate_for_two as modulate_for_two
from fastdistill.ops.op import OPERATORS as OPERATORS
from fastdistill.ops.qk_norm_rope import qk_norm_rope as qk_norm_rope
from fastdistill.ops.rope_attention import rope_attention as rope_attention
