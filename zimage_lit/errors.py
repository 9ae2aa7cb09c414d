"""The one exception that the command line shows without a traceback, and the check that most settings need."""


class UserError(Exception):
    """Something the person at the keyboard can mend: one sentence that names the file or key and the way out."""


class SharedError(UserError):
    """One that every process of a run meets at the same moment: it is enough that the first one says it."""


def at_least_one(name: str, value: int) -> int:
    """The value of the setting `name`, if it is a positive number."""
    if value < 1:
        raise UserError(f"{name} must be at least 1, not {value}.")
    return value
