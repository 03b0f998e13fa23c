"""Fused operators of diffusion transformers: tensors in, tensors out, with gradients, on CPU and GPU."""

from fastdistill.ops.activation_concat import ACTIVATION_CONCAT, activation_concat
from fastdistill.ops.backend import use_backend
from fastdistill.ops.block_statistics import BLOCK_STATISTICS, BlockStatistics, block_statistics
from fastdistill.ops.dmd_loss import DMD_LOSS, dmd_loss
from fastdistill.ops.feature_kd_loss import FEATURE_KD_LOSS, feature_kd_loss
from fastdistill.ops.gated_residual import GATED_RESIDUAL, gated_residual
from fastdistill.ops.gated_residual_modulate import GATED_RESIDUAL_MODULATE, gated_residual_modulate
from fastdistill.ops.joint_qk_norm_rope import JOINT_QK_NORM_ROPE, joint_qk_norm_rope
from fastdistill.ops.modulate import MODULATE, MODULATE_FOR_TWO, modulate, modulate_for_two
from fastdistill.ops.op import Operator
from fastdistill.ops.qk_norm_rope import QK_NORM_ROPE, qk_norm_rope
from fastdistill.ops.rope_attention import ROPE_ATTENTION, rope_attention

# The one table that tests, benchmarks and `fastdistill.info()` loop over. A new operator is one line here.
OPERATORS: dict[str, Operator] = {
    op.name: op
    for op in (
        MODULATE,
        MODULATE_FOR_TWO,
        GATED_RESIDUAL,
        GATED_RESIDUAL_MODULATE,
        QK_NORM_ROPE,
        ROPE_ATTENTION,
        JOINT_QK_NORM_ROPE,
        ACTIVATION_CONCAT,
        DMD_LOSS,
        FEATURE_KD_LOSS,
        BLOCK_STATISTICS,
    )
}

__all__ = [
    "OPERATORS",
    "BlockStatistics",
    "activation_concat",
    "block_statistics",
    "dmd_loss",
    "feature_kd_loss",
    "gated_residual",
    "gated_residual_modulate",
    "joint_qk_norm_rope",
    "modulate",
    "modulate_for_two",
    "qk_norm_rope",
    "rope_attention",
    "use_backend",
]
