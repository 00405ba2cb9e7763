"""What can end a program early: bad input, a failure, an interruption. Each is one line to the
user."""


class InputError(Exception):
    """Bad input from the user (config, data, directory): one line naming value, place and fix; exit
    code 2."""

    def __init__(self, message: str, reason: str = "unusable") -> None:
        """`reason` is what a row that is refused is counted under, where such rows are skipped."""
        super().__init__(message)
        self.reason = reason


# Exit code (EX_TEMPFAIL): stopped by a signal, state saved; the same command goes on.
INTERRUPTED = 75


class Failure(Exception):
    """The run cannot go on (numbers that are not finite, a full disk): one line, exit code 1."""


class Interrupted(BaseException):
    """A signal asked the run to stop, and its state is saved.

    No Exception, as KeyboardInterrupt is none: `except Exception` in the code of others must not
    swallow it.
    """
