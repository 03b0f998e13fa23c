"""Fixtures that several tests start from."""

import pytest

from fastdistill.distill.methods.output_kd import OutputKD, OutputKDOptions
from tests.distill.methods.toys import AffineFlow, LabelFamily, exact, train, unlabelled_draws
from tests.toy import gaussian


@pytest.fixture(scope="session")
def flow_of_the_teacher(tmp_path_factory: pytest.TempPathFactory) -> AffineFlow:
    """A network with the velocity of the Gaussian, for students and critics that start as their
    teacher."""
    student, data = AffineFlow(), gaussian()
    method = OutputKD(OutputKDOptions(), student=student, teacher=exact(data), family=LabelFamily(), steps=4)
    trainer = train(
        method,
        unlabelled_draws(data, 128),
        tmp_path_factory.mktemp("flow"),
        steps=600,
        learning_rate=1e-2,
        ema_decay=0.9,
    )
    trainer.emas["student"].copy_to(student)
    return student
