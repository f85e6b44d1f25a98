"""The one exception a user may cause; the command line prints it as one line and exits with status 2."""


class UserError(Exception):
    """Something the user can mend: the message says what was found, what was expected and what to do."""
