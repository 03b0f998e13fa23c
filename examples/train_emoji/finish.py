"""Step 4 of the emoji FLUX: install the pipeline in the package, and keep the training logs.

    python examples/train_emoji/finish.py --run runs/emoji

Writes `fastdistill/assets/emoji/pipeline`, `examples/train_emoji/logs/*.jsonl` and `curves.png`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import tyro

from fastdistill.data.emoji import Emoji, assets
from fastdistill.models.loading import PROMPTS_FILE
from fastdistill.models.sampling import SamplingDefaults
from fastdistill.run.files import write_text

LOGS = Path(__file__).parent / "logs"
STAGES = {"classifier": "loss", "autoencoder": "mse", "transformer": "loss"}
MAX_BYTES = 20 * 2**20


def main(run: Path, true_cfg_scale: float = 1.25) -> None:
    folder = assets() / "pipeline"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run / "pipeline", folder)
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text())
        # Where this machine had the weights concerns nobody else.
        config.pop("_name_or_path", None)
        # Without `dtype=` transformers loads what this says, and diffusers loads float32.
        if "dtype" in config:
            config["dtype"] = "float32"
        write_text(path, json.dumps(config, indent=2) + "\n")
    SamplingDefaults(true_cfg_scale=true_cfg_scale, height=64, width=64, max_sequence_length=8).save(folder)
    write_text(folder / PROMPTS_FILE, "\n".join(Emoji().captions) + "\n")
    size = sum(path.stat().st_size for path in assets().rglob("*") if path.is_file())
    print(f"assets: {size / 2**20:.1f} MiB")
    if size > MAX_BYTES:
        raise SystemExit(f"more than {MAX_BYTES // 2**20} MiB: the package would be too large")
    LOGS.mkdir(exist_ok=True)
    figure, axes = plt.subplots(1, len(STAGES), figsize=(12, 3))
    for axis, (stage, key) in zip(axes, STAGES.items(), strict=True):
        log = LOGS / f"{stage}.jsonl"
        shutil.copy(run / stage / "metrics.jsonl", log)
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        axis.plot([row["step"] for row in rows], [row[key] for row in rows], linewidth=0.8)
        axis.set(title=stage, xlabel="step", ylabel=key, yscale="log")
    figure.tight_layout()
    figure.savefig(LOGS / "curves.png", dpi=80)


if __name__ == "__main__":
    tyro.cli(main)
