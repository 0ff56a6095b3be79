"""API keys: a file of names and hashes, re-read when it changes; FastAPI dependencies that ask for one."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

from fastapi import Request, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from app.problems import FORBIDDEN, UNAUTHORIZED, ProblemError
from rlhf.errors import ConfigError, UsageError

logger = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
LINE = re.compile(rf"({NAME.pattern}):([0-9a-f]{{64}})")
BEARER = HTTPBearer(auto_error=False, description="a key that `python -m app new-key NAME` made")
HEADER = APIKeyHeader(name="X-API-Key", auto_error=False, description="the same key, where Authorization is taken")
Bearer = Annotated[HTTPAuthorizationCredentials | None, Security(BEARER)]
Header = Annotated[str | None, Security(HEADER)]
KeyDependency = Callable[[Request, Bearer, Header], Awaitable[None]]


def new_key(name: str) -> tuple[str, str]:
    """A fresh random key, to be shown once, and its line for the file; UsageError for a name that will not do."""
    if not NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no name for a key; use 1 to 64 of A-Z a-z 0-9 . _ -")
    key = "rlhf_" + secrets.token_urlsafe(32)
    return key, f"{name}:{_digest(key).hex()}"


class KeyRing:
    """The keys of one file; a name may have several, so that a key can be replaced without a gap.

    The hashes are plain sha256 because the keys are random: there is no dictionary to try. Raises ConfigError
    when the file is missing or broken at the start; later, the keys that were read last stay.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._version = _version(path)
        self._keys = read_keys(path)

    def identify(self, key: str) -> str | None:
        """The name of the key, or None; takes as long for a wrong key as for a right one."""
        self._read_again_if_changed()
        digest, found = _digest(key), None
        for name, known in self._keys:
            if hmac.compare_digest(digest, known):
                found = name
        return found

    def _read_again_if_changed(self) -> None:
        version = _version(self._path)
        if version == self._version:
            return
        self._version = version
        try:
            self._keys = read_keys(self._path)
        except ConfigError as error:
            logger.error("keeping the keys read before: %s", error)
        else:
            logger.info("read keys path=%s count=%d", self._path, len(self._keys))


def read_keys(path: Path) -> tuple[tuple[str, bytes], ...]:
    """Names and hashes from lines `name:sha256`, # beginning a comment; ConfigError names the file and the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the keys in {path}: {error}; `python -m app new-key NAME` makes one") from error
    keys = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = LINE.fullmatch(text)
        if match is None:
            # The line itself is not told: it may be a key that somebody put in unhashed.
            raise ConfigError(
                f"{path} line {number} is not name:sha256; `python -m app new-key NAME` prints such a line"
            )
        keys.append((match[1], bytes.fromhex(match[2])))
    if not keys:
        raise ConfigError(f"{path} holds no key; `python -m app new-key NAME` prints a line for it")
    return tuple(keys)


def require_key(keys: KeyRing | None) -> KeyDependency:
    """A dependency for what callers with a key may do; everybody may when there are no keys.

    It leaves the key's name in `request.state.key_name`, which the log and the rate limit use.
    """

    async def dependency(request: Request, bearer: Bearer, header: Header) -> None:
        if keys is not None:
            request.state.key_name = _authenticate(keys, bearer, header)

    return dependency


def require_admin_key(keys: KeyRing | None) -> KeyDependency:
    """A dependency for /admin: closed when it has no keys of its own."""

    async def dependency(request: Request, bearer: Bearer, header: Header) -> None:
        if keys is None:
            raise ProblemError(FORBIDDEN, "/admin is closed; set APP_ADMIN_KEYS_FILE to a file of keys for it")
        request.state.key_name = _authenticate(keys, bearer, header)

    return dependency


def _authenticate(keys: KeyRing, bearer: Bearer, header: Header) -> str:
    key = bearer.credentials if bearer is not None else header
    if not key:
        raise ProblemError(UNAUTHORIZED, "the request has no key; send Authorization: Bearer KEY")
    name = keys.identify(key)
    if name is None:
        raise ProblemError(UNAUTHORIZED, "the key is not one of those that may do this")
    return name


def _version(path: Path) -> tuple[int, int, int] | None:
    """What changes whenever the file does; None when it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
