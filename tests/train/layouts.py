"""The runs that several layouts have to agree on:
`[torchrun --nproc-per-node 2] -m tests.train.layouts FOLDER`.
"""

import copy
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from fastdistill.compress.recovery import Recovery, RecoveryWeights
from fastdistill.compress.surgery import CutModel, boundary_map, cut
from fastdistill.data.latents import LatentBatch
from fastdistill.models.blocks import block_ids
from fastdistill.models.families import family_of
from fastdistill.models.families.family import BlockId
from fastdistill.models.patch import patched
from fastdistill.train import parallel
from fastdistill.train.config import TrainConfig
from fastdistill.train.trainer import Trainer
from fastdistill.train.watch import Evaluation, SampleGrid
from tests.tiny import mixing_transformer, tiny_inputs
from tests.train.rivals import Rivals, batches, rivals_config, weights

FLUX = TrainConfig(
    steps=3, learning_rate=1e-3, warmup_steps=1, clip_norm=0.5, micro_batches=2, checkpoint_every=2, log_every=1
)


def flux(run: Path) -> Trainer:
    """Recovery of a cut FLUX: fused blocks in the student and stock ones in the teacher, features,
    recomputed activations.
    """
    teacher = mixing_transformer()
    family = family_of(teacher)
    dropped = [BlockId(stack="single_transformer_blocks", index=1)]
    student = cut(teacher, dropped).train()
    student.enable_gradient_checkpointing()
    patched(student)
    boundaries = boundary_map(block_ids(teacher, family), dropped)
    method = Recovery(
        CutModel(student=student, teacher=copy.deepcopy(teacher), family=family, boundaries=boundaries),
        RecoveryWeights(task=1, out=1, feat=1),
    )
    latents, _, conditioning = tiny_inputs(teacher, batch=4)
    return Trainer(method, lambda step, rng: LatentBatch(latents=latents, conditioning=conditioning), FLUX, run)


def rivals(run: Path) -> Trainer:
    method = Rivals()
    probe = torch.linspace(-1, 1, 12).view(4, 3)

    def evaluate() -> dict[str, float]:
        return {"error": float((method.networks["student"](probe) - method.networks["teacher"](probe)).square().mean())}

    def draw() -> dict[str, torch.Tensor]:
        return {"student": method.networks["student"](probe).tanh()[:, :, None, None]}

    evaluation = Evaluation(evaluate=evaluate, every=4, monitor="error")
    observers = [SampleGrid(every=4, draw=draw)]
    return Trainer(method, batches, rivals_config(keep_checkpoints=10), run, observers, evaluation)


def finish(trainer: Trainer) -> None:
    trainer.fit()
    whole = parallel.gathered(weights(trainer.method, trainer.emas))
    if parallel.rank() == 0:
        save_file({name: value.detach().clone() for name, value in whole.items()}, trainer.run / "result.safetensors")


def main(folder: Path) -> None:
    """`rivals` and `flux` from their beginning, `continued` from the checkpoint that it has."""
    torch.set_num_threads(1)
    with parallel.processes():
        finish(rivals(folder / "rivals"))
        finish(rivals(folder / "continued"))
        finish(flux(folder / "flux"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
