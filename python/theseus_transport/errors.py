"""Errors a user can act on; each carries the exit code of the command."""


class TheseusError(Exception):
    """Base of every error raised on purpose; the message names the value and the cure."""

    exit_code = 1


class InputRefused(TheseusError):
    """An input is malformed, unsupported, hostile or does not fit the others."""

    exit_code = 3


class ResourceError(TheseusError):
    """Memory or disk does not suffice."""

    exit_code = 4


class ReadFailed(ResourceError):
    """An input cannot be read any more."""


class NumericalError(TheseusError):
    """A result is not finite, or a decomposition failed its certificate."""

    exit_code = 5


class AlreadyDone(TheseusError):
    """What is asked for lies there, whole, from an earlier run."""

    exit_code = 0


class Terminated(KeyboardInterrupt):
    """SIGTERM, which a scheduler sends; as Ctrl-C."""

    exit_code = 143


class HungUp(KeyboardInterrupt):
    """SIGHUP, of a terminal that closed; as Ctrl-C."""

    exit_code = 129
