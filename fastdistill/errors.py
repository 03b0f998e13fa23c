"""The error that a user can do something about."""


class UserError(ValueError):
    """Wrong input. The message says what is wrong and what to do; commands print it without a
    traceback."""
