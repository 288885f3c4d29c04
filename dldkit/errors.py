"""Errors that the user can mend, reported without a stack trace."""

import functools
import sys
from typing import Callable


class UserError(RuntimeError):
    """Wrong input: the message says what was wrong, where, and what to do."""


def report_user_errors(main: Callable) -> Callable:
    """Make a command's `main` print a UserError on one line and exit with 1.

    So it does with a file that can not be read or written, whichever it is.
    """

    @functools.wraps(main)
    def reporting(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            # a DataLoader puts the traceback of its worker in front
            message = str(error).rpartition(f"{UserError.__qualname__}: ")[2]
            lines = [line.strip() for line in message.splitlines()]
            print(f"error: {' '.join(lines)}", file=sys.stderr)
            sys.exit(1)
        except OSError as error:
            if error.filename is None:
                raise
            print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
            sys.exit(1)

    return reporting
