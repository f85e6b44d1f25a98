"""The one exception a user may cause; the command line prints it as one line and exits with status 2."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can mend: the message says what was found, what was expected and what to do."""


@contextmanager
def needs_extra(option: str, extra: str) -> Iterator[None]:
    """Import here what an option needs beyond the package itself; what is missing is named, and where it comes from."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{option} needs {error.name}: pip install 'ffn-fusion[{extra}]'") from None
