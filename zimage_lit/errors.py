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


def root_of(error: BaseException) -> BaseException:
    """Why an exception was raised in the end: a part's own sentence, where it has one, lies below a parser's long one.

    That is the first UserError among the exception and its causes, else the last of them.
    """
    causes = [error]
    while not isinstance(causes[-1], UserError) and (causes[-1].__cause__ or causes[-1].__context__):
        causes.append(causes[-1].__cause__ or causes[-1].__context__)  # type: ignore[arg-type]
    return causes[-1]
