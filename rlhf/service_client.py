"""One kind of request to the service, over a pool of connections, tried again while there is hope."""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

import urllib3
from urllib3.exceptions import HTTPError, InvalidHeader, LocationParseError
from urllib3.util import parse_url

from rlhf.errors import ConfigError, UnavailableError

logger = logging.getLogger(__name__)

MAY_PASS = frozenset(
    {
        HTTPStatus.REQUEST_TIMEOUT,
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.INTERNAL_SERVER_ERROR,
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT,
    }
)
"""Answers after which the same request may succeed."""

CONNECT_SECONDS = 10.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 20.0
HEED_SECONDS = 0.2
"""How often a pause looks whether somebody wants it to end."""


class ServiceAway(UnavailableError):
    """The service has not answered for as long as it may be waited for; it may be back later."""


class Refused(Exception):
    """An answer that another try would not change.

    fields names what the service found wrong with the request, by field; none where it says nothing of fields.
    """

    def __init__(self, status: int, told: str, fields: tuple[str, ...]) -> None:
        super().__init__(told)
        self.status, self.fields = status, fields


class Patience:
    """How long tries go on: until no request has been answered for `seconds`, or somebody wants them to end.

    For the threads of one call; each of them says when it was answered.
    """

    def __init__(self, seconds: float, stopped: Callable[[], bool]) -> None:
        self._seconds, self._stopped = seconds, stopped
        self._since = time.monotonic()
        self._ended = threading.Event()

    def answered(self) -> None:
        """The service is there: time begins anew."""
        self._since = time.monotonic()

    def end(self) -> None:
        """Have all pauses end, and no further tries."""
        self._ended.set()

    def pause(self, seconds: float) -> bool:
        """Wait before the next try; false, at once, where there is to be none."""
        until = time.monotonic() + seconds
        if until > self._since + self._seconds:
            return False
        while (rest := until - time.monotonic()) > 0:
            if self._stopped() or self._ended.wait(min(rest, HEED_SECONDS)):
                return False
        return True


class _TryAgain(Exception):
    def __init__(self, reason: str, after_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.after_seconds = reason, after_seconds


class ServiceClient:
    """POSTs JSON to a service; safe to use from several threads."""

    def __init__(self, url: str, *, api_key_file: str | None, timeout_seconds: float, connections: int) -> None:
        """Does not connect yet. Raises ConfigError for an address that is none."""
        self.url = _checked(url)
        self._api_key_file = Path(api_key_file) if api_key_file else None
        timeout = urllib3.Timeout(total=timeout_seconds, connect=min(CONNECT_SECONDS, timeout_seconds))
        self._pool = urllib3.PoolManager(maxsize=connections, block=True, timeout=timeout, retries=False)
        # Of its own: the seeded ones belong to the training, and what they give must not depend on a service.
        self._chance = random.Random()

    def post(self, path: str, body: dict[str, Any], patience: Patience) -> Any:
        """The JSON of a good answer.

        Raises ServiceAway when patience ends, Refused for an answer that stays the same, and ConfigError for a key
        that cannot be read and for an answer that is no JSON.
        """
        content, pause = json.dumps(body).encode(), FIRST_PAUSE_SECONDS
        warned = False
        while True:
            try:
                answer = self._try(path, content)
            except _TryAgain as failure:
                seconds = max(failure.after_seconds, pause * self._chance.uniform(0.5, 1.0))
                if not patience.pause(seconds):
                    raise ServiceAway(f"{self.url} gives no answer to work with: {failure.reason}") from failure
                if not warned:
                    logger.warning("%s: %s; trying again", self.url, failure.reason)
                warned, pause = True, min(2 * pause, LONGEST_PAUSE_SECONDS)
            else:
                patience.answered()
                return answer

    def _try(self, path: str, content: bytes) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"} | self._authorization()
        try:
            response = self._pool.request("POST", self.url + path, body=content, headers=headers, redirect=False)
        except HTTPError as error:
            raise _TryAgain(_in_words(error)) from error
        if response.status == HTTPStatus.OK:
            return self._json(response.data)
        told, fields = _told(response)
        if response.status in MAY_PASS:
            raise _TryAgain(told, _retry_after(response))
        raise Refused(response.status, told, fields)

    def _authorization(self) -> dict[str, str]:
        """Read at each request: keys change while a training runs."""
        if self._api_key_file is None:
            return {}
        try:
            key = self._api_key_file.read_text(encoding="ascii").strip()
        except (OSError, ValueError) as error:
            raise ConfigError(f"the API key in {self._api_key_file} cannot be read: {error}") from error
        if not key or not key.isprintable() or " " in key:
            raise ConfigError(f"{self._api_key_file} does not hold an API key, on one line and nothing else")
        return {"Authorization": f"Bearer {key}"}

    def _json(self, data: bytes) -> Any:
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{self.url} answers with something that is not JSON; is it the service?") from error


def _checked(url: str) -> str:
    try:
        parts = parse_url(url)
    except LocationParseError:
        parts = None
    if parts is None or parts.scheme not in ("http", "https") or not parts.host or parts.query or parts.fragment:
        raise ConfigError(f"{url!r} is not the address of a service; write it like http://rlhf-api:8000")
    return url.rstrip("/")


def _retry_after(response: urllib3.BaseHTTPResponse) -> float:
    """Seconds that the service wants to be left alone, told as a number or a date; 0 where it says nothing."""
    try:
        return urllib3.Retry().get_retry_after(response) or 0.0
    except InvalidHeader:
        return 0.0


def _told(response: urllib3.BaseHTTPResponse) -> tuple[str, tuple[str, ...]]:
    """What an answer says is wrong, in a line, and with which fields; a proxy's page says its status alone."""
    try:
        problem = json.loads(response.data)
        text = f"HTTP {response.status}, {problem['title']}: {problem['detail']}"
        fields = tuple(str(error["field"]) for error in problem.get("errors") or ())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"HTTP {response.status} {response.reason or ''}".rstrip(), ()
    return " ".join(text.split())[:500], fields


def _in_words(error: HTTPError) -> str:
    """The innermost cause, without the addresses of Python's objects."""
    cause: BaseException = error
    while isinstance(cause.__cause__ or cause.__context__, Exception):
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    return f"{type(error).__name__} ({cause})" if str(cause) else type(error).__name__
