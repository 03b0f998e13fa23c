"""Words to the user: the error that the user can do something about, and the line that the user
should know."""

from __future__ import annotations

import warnings


class UserError(ValueError):
    """Wrong input. The message says what is wrong and what to do; commands print it without a
    traceback."""


class Notice(UserWarning):
    """Fact about the input that changes nothing, and that a user should know.

    Commands print it as one line; Python shows it as any other warning, once.
    """


def first_line(error: BaseException) -> str:
    """First line of what a library's error says, or else its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def notice(text: str) -> None:
    """Tell the user `text`, as a `Notice`."""
    warnings.warn(text, Notice, stacklevel=3)
