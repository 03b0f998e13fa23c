"""Versions and times for the end of a report."""

from __future__ import annotations

import platform

import diffusers
import torch
import transformers

from fastdistill import __version__

CLOSING = """\
| stage | seconds |
|---|---|
{% for stage, seconds in seconds.items() -%}
| {{ stage }} | {{ "{:.0f}".format(seconds) }} |
{% endfor %}
fastdistill {{ versions.fastdistill }}, diffusers {{ versions.diffusers }}, torch {{ versions.torch }}, \
{{ versions.machine }}.
"""
"""End of every report: a template of `seconds`, by stage, and `versions`."""


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on, and the kind of machine."""
    return {
        "fastdistill": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }
