"""The one exception that the command line shows without a traceback."""


class UserError(Exception):
    """Something the person at the keyboard can mend: one sentence that names the file or key and the way out."""
