"""`python -m fastdistill.compress`: a FLUX pipeline in, a smaller stock diffusers pipeline and a
report out."""

from fastdistill.compress.config import CompressConfig
from fastdistill.run.cli import run_job


def main() -> None:
    run_job(CompressConfig, "fastdistill.compress.job:Compression", prog="python -m fastdistill.compress")


if __name__ == "__main__":
    main()
