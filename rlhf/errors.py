"""The errors a user can meet, each with the exit code that a Job's failure policy relies on."""


class RlhfError(Exception):
    """A failure with one clear line for the user; `exit_code` 1 means: try again."""

    exit_code = 1


class UsageError(RlhfError):
    """The command line is wrong."""

    exit_code = 64


class DataError(RlhfError):
    """The data is broken, empty or does not fit; names the file, the line and the reason."""

    exit_code = 65


class PrerequisiteError(RlhfError):
    """Something an earlier stage makes is missing or damaged; names the command that makes it."""

    exit_code = 66


class UnavailableError(RlhfError):
    """The machine or the cluster does not give now what is needed; it may later."""

    exit_code = 69


class ConflictError(RlhfError):
    """Something is at work where the command would put its own; says how to wait for it or to replace it."""

    exit_code = 73


class StorageError(RlhfError):
    """The volume refused a write; what was saved before is still good."""

    exit_code = 74


class StopRequested(RlhfError):
    """SIGTERM or SIGINT arrived; the state is saved and the same command continues."""

    exit_code = 75


class ConfigError(RlhfError, ValueError):
    """The configuration is wrong; names the key, the value and the remedy."""

    exit_code = 78


class DivergedError(ConfigError):
    """The numbers of the training have gone wrong for good; names the last good checkpoint and the remedy."""


PERMANENT_CODES = frozenset(error.exit_code for error in (UsageError, DataError, PrerequisiteError, ConfigError))
"""Exit codes after which trying again is of no use; a Job's failure policy ends on them."""
