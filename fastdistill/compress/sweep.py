"""One run for every size that is asked for: several smaller models of one full model, compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console

from fastdistill.compress.choice.choose import limit_of, requested
from fastdistill.compress.config import CompressConfig, plain
from fastdistill.compress.job import Compression
from fastdistill.compress.plan import plan
from fastdistill.compress.report import MEGABYTE, faster, quality
from fastdistill.compress.stages import percent
from fastdistill.errors import UserError
from fastdistill.run.files import read_json, write_json, write_text
from fastdistill.run.store import OFF
from fastdistill.run.workspace import Workspace

REPORT = """\
# {{ model }} in {{ models|length }} sizes

| asked for | without | parameters | on disk | a forward pass is | difference of the images | not surpassed |
|---|---|---|---|---|---|---|
{% for row in table -%}
| {{ row|join(" | ") }} |
{% endfor %}
The difference of the images is that to the full model's, of equal prompts and noise; 0 % is the same image. A model \
is not surpassed if no other one is as small and as close.

{% for name, files in models.items() -%}
- `{{ name }}`: [report]({{ files.folder }}/report.md), [images]({{ files.folder }}/grid.png), \
model in `{{ output }}/{{ files.folder }}/model`
{% endfor %}
## Quality

The model that is saved, for every size.

| | full | {{ models|join(" | ") }} |
|---|---|{% for _ in models %}---|{% endfor %}
{% for name, values in measured -%}
| {{ name }} | {{ values|join(" | ") }} |
{% endfor %}
"""


class Sweep:
    """Compression to every size of a config: a folder in `OUTPUT` for each, and a report for all.

    What does not depend on the size is done once: all runs use one store. A config of one size is
    that run alone, in `OUTPUT` itself.
    """

    result = "sweep.json"

    def __init__(self, config: CompressConfig, *, console: Console | None = None, command: str = "") -> None:
        self.config, self.command = config, command
        self.console = Console(quiet=True) if console is None else console

    @classmethod
    def check_config(cls, config: CompressConfig) -> None:
        """Refuse what is wrong whatever the model and the size are (`Job.check_config`)."""
        Compression.check_config(config)

    @classmethod
    def check_inputs(cls, config: CompressConfig) -> None:
        """Refuse prompts and images that cannot be read (`Job.check_inputs`)."""
        Compression.check_inputs(config)

    @classmethod
    def plan(cls, config: CompressConfig) -> str:
        return "\n\n".join(plan(config.of_size(words, Path(), None)) for words in config.sizes)

    def run(self) -> None:
        """Run what is not finished yet.

        Raises:
            UserError: as `Compression`, for any of the sizes and before the work on the first.
        """
        if len(self.config.sizes) == 1:
            Compression(self.config, console=self.console, command=self.command).run()
            return
        output = self.config.run.output or Path("runs") / self.config.name
        workspace = Workspace(output, self.config.settings(), self.result)
        cache = workspace.work / "cache" if str(self.config.run.cache) == OFF else self.config.run.cache
        # Folders of the models by the words that ask for them.
        folders = {" ".join(words): plain("-".join(words)) for words in self.config.sizes}
        configs = {
            name: self.config.of_size(words, output / folders[name], cache)
            for name, words in zip(folders, self.config.sizes, strict=True)
        }
        workspace.claim({})
        with workspace.released():
            open_ = [name for name in configs if not (output / folders[name] / Compression.result).exists()]
            for number, name in enumerate(open_):
                self.console.print(f"model {list(configs).index(name) + 1} of {len(configs)}: {configs[name].asked}")
                job = Compression(configs[name], console=self.console, command=self.command)
                if number == 0:
                    try:
                        check_sizes(job, [configs[later] for later in open_[1:]])
                    except UserError:
                        # Nothing has been done yet, and other sizes should find the folder free.
                        for claimed in (job.workspace, workspace):
                            claimed.finish()
                        job.output.rmdir()
                        raise
                job.run()
            records = {name: read_json(output / folders[name] / Compression.result) for name in folders}
            self._write(output, records, folders)
            workspace.finish()

    def _write(self, output: Path, records: Mapping[str, Any], folders: Mapping[str, str]) -> None:
        """Write the comparison, and say it."""
        table = comparison(records)
        summary = {
            "format": 1,
            "command": self.command,
            "model": self.config.run.model,
            "models": {
                name: {
                    "folder": folders[name],
                    **{key: record[key] for key in ("saved", "parameters", "disk", "speed")},
                    "distance": record["distances"][record["saved"]],
                    "not_surpassed": name in front(records),
                }
                for name, record in records.items()
            },
        }
        first = next(iter(records.values()))
        evaluations = [record["evaluation"].get(record["saved"], {}) for record in records.values()]
        text = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(REPORT)
        write_text(
            output / "report.md",
            text.render(
                **summary, table=table, output=output, measured=quality([first["evaluation"]["full"], *evaluations])
            ),
        )
        write_json(output / self.result, summary)
        for asked, without, parameters, _, speed, difference, _ in table:
            self.console.print(
                f"{asked} (without {without}): {parameters} parameters, {speed}, images differ by {difference}",
                soft_wrap=True,
            )
        self.console.print(f"models:   {output}\nreport:   {output / 'report.md'}", soft_wrap=True)


def check_sizes(job: Compression, later: Sequence[CompressConfig]) -> None:
    """Raise `UserError` for a size that the model of `job` cannot have, as far as that is known."""
    for config in later:
        budget = config.parsed_budget()
        requested(config.drop_blocks, budget, job.teacher, job.family)
        if budget and budget.quantity in job.costs:
            limit_of(budget, job.costs[budget.quantity])


def comparison(records: Mapping[str, Any]) -> list[list[str]]:
    """A row for each model, by what was asked for."""
    best = front(records)
    return [
        [
            name,
            record["choice"]["dropped"],
            f"{record['parameters']['compressed'] / 1e6:.2f} M",
            f"{record['disk']['compressed'] / MEGABYTE:.1f} MB",
            faster(record["speed"]),
            percent(record["distances"][record["saved"]]),
            "yes" if name in best else "",
        ]
        for name, record in records.items()
    ]


def front(records: Mapping[str, Any]) -> list[str]:
    """Models to which no other is equal or better in size and closeness, and better in one of them."""

    def place(record: Mapping[str, Any]) -> tuple[float, float]:
        return record["parameters"]["compressed"], record["distances"][record["saved"]]

    def surpassed(own: tuple[float, float]) -> bool:
        return any(other != own and other[0] <= own[0] and other[1] <= own[1] for other in map(place, records.values()))

    return [name for name, record in records.items() if not surpassed(place(record))]
