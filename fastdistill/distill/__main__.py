"""`python -m fastdistill.distill`: a FLUX pipeline in, its few-step student as a stock diffusers
pipeline and a report out."""

from __future__ import annotations

import sys

from fastdistill.distill.config import config_of
from fastdistill.run.cli import run_job

PROGRAM = "python -m fastdistill.distill"
JOB = "fastdistill.distill.job:FewStepStudent"

if __name__ == "__main__":
    run_job(config_of(sys.argv[1:]), JOB, prog=PROGRAM)
