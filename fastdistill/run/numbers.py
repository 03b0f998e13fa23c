"""Whole numbers that Python code hands over, of whatever type."""

from __future__ import annotations

import operator
from typing import Any

from fastdistill.errors import UserError


def whole(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """The argument `name` as an int: from Python, numpy, or a tensor with no dimensions.

    Raises:
        UserError: the value is no whole number, such as True, 2.5, 2.0 or "2", or out of range.
    """
    wanted = "a whole number" if least is None else f"a whole number of at least {least}"
    try:
        if "bool" in str(getattr(value, "dtype", type(value).__name__)) or getattr(value, "shape", ()) != ():
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise UserError(f"{name} must be {wanted}, got {value!r}") from None
    if least is not None and number < least:
        raise UserError(f"{name} must be at least {least}, got {number}")
    if most is not None and number > most:
        raise UserError(f"{name} must be at most {most}, got {number}")
    return number
