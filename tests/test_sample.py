"""Options of the command that draws a grid."""

from pathlib import Path

import pytest

from fastdistill.errors import UserError
from fastdistill.sample import SampleConfig


@pytest.mark.parametrize("name", ["grid.jpg", "grid"])
def test_a_file_that_is_no_png_is_refused_before_the_work(name: str) -> None:
    with pytest.raises(UserError, match="PNG file"):
        SampleConfig(output=Path(name))
