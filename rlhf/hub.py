"""Names on the Hugging Face Hub: told from local paths, downloaded, and failures put into one line.

Only the `fetch` stage calls this; nothing here runs code from a repository.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.errors import DataError, PrerequisiteError, RlhfError
from rlhf.quoting import one_line
from rlhf.storage import storage_errors
from rlhf.weights import CONVERT, PICKLES, SAFETENSORS

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
_SMALL_FILES = ["*.json", "*.txt", "*.model"]


def is_hub_name(name: str) -> bool:
    """Whether this can be a repository's name; whether one exists is not looked up."""
    return bool(_HUB_NAME.fullmatch(name)) and ".." not in name


def is_directory(name: str) -> bool:
    """Whether this names a directory here; a name that none can have does not."""
    return _is(Path.is_dir, name)


def is_file(name: str) -> bool:
    """Whether this names a file here; a name that none can have does not."""
    return _is(Path.is_file, name)


def _is(kind: Callable[[Path], bool], name: str) -> bool:
    try:
        return bool(name) and kind(Path(name))
    except (OSError, ValueError):  # too long, no permission, half a surrogate pair
        return False


def model_directory(key: str, name: str, *, with_weights: bool, pickled: bool = False) -> Path:
    """The local directory of a model or tokenizer, downloaded first when `name` is one on the Hub.

    Weights are taken as safetensors; a repository without them is refused, or, where pickled ones are to be
    converted, brought with those. Raises PrerequisiteError naming the key when there is none.
    """
    if is_directory(name):
        return Path(name)
    if is_file(name):
        raise PrerequisiteError(f"{key}={name} is a file; give the directory that holds the model's files")
    if not is_hub_name(name):
        raise PrerequisiteError(f"{key}={one_line(name)}: no such directory; give a local directory or a Hub name")
    with reaching_hub(key, name, missing=PrerequisiteError):
        directory = _download(name, weights=SAFETENSORS if with_weights else None)
        if not with_weights or any(directory.glob(SAFETENSORS)):
            return directory
        if pickled:
            return _download(name, weights=PICKLES)
    raise PrerequisiteError(f"{key}={name} has no safetensors on the Hub, and pickled weights can run code; {CONVERT}")


def _download(name: str, *, weights: str | None) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=[*_SMALL_FILES, *([weights] if weights else [])]))


@contextmanager
def reaching_hub(key: str, name: str, *, missing: type[RlhfError] = DataError) -> Iterator[None]:
    """Turn whatever the Hub's libraries raise into one line that names the key and the remedy.

    A name that does not exist raises `missing`; a Hub that cannot be reached raises RlhfError, whose
    exit code means: try again.
    """
    from huggingface_hub import constants

    try:
        with storage_errors(Path(constants.HF_HOME)):
            yield
    except RlhfError:
        raise
    except Exception as error:  # the libraries document no closed set: httpx, OSError, ValueError, their own
        raise _explained(key, name, error, missing) from error


def _explained(key: str, name: str, error: Exception, missing: type[RlhfError]) -> RlhfError:
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import errors

    causes = list(_causes(error))

    def among(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    reason = one_line(str(error))[:200] or type(error).__name__
    if among(errors.RepositoryNotFoundError, errors.RevisionNotFoundError, DatasetNotFoundError):
        return missing(
            f"{key}={name}: neither a local path nor a repository on the Hub that may be read; check the name, "
            "or log in (HF_TOKEN) where it is gated"
        )
    unreachable = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError)
    if among(*unreachable, errors.HfHubHTTPError):
        return RlhfError(
            f"{key}={name}: no such local path, and the Hub cannot be reached ({reason}); "
            f"run again with the network on, or give {key} a local path"
        )
    return missing(f"{key}={name} cannot be loaded: {reason}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
