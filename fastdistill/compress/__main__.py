"""`python -m fastdistill.compress`: a FLUX pipeline in, a smaller stock diffusers pipeline and a
report out."""

from fastdistill.compress.config import CompressConfig
from fastdistill.run.cli import run_job

PROGRAM = "python -m fastdistill.compress"
JOB = "fastdistill.compress.sweep:Sweep"

if __name__ == "__main__":
    run_job(CompressConfig, JOB, prog=PROGRAM)
