"""So many requests a minute for each caller: a token bucket a key, or an address where there are no keys."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from ipaddress import IPv6Address, ip_address

from fastapi import Request

from app.problems import TOO_MANY_REQUESTS, ProblemError

MAX_CALLERS = 100_000
IPV6_NETWORK_BITS = 64
"""What one customer of an IPv6 provider has at the least; within it addresses are free to change."""


class RateLimiter:
    """Buckets that hold a minute's requests and fill up again within a minute. For one thread.

    A caller that was idle for a minute is forgotten, since its bucket is full again; beyond max_callers the one
    that was idle for longest is.
    """

    def __init__(
        self, per_minute: int, *, max_callers: int = MAX_CALLERS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_minute, self._max_callers, self._clock = per_minute, max_callers, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # what was left, and when

    def __len__(self) -> int:
        return len(self._buckets)

    def admit(self, caller: str) -> float | None:
        """Count a request; None when it may go on, else the seconds after which one may."""
        now, per_second = self._clock(), self._per_minute / 60
        left, then = self._buckets.pop(caller, (float(self._per_minute), now))
        left = min(self._per_minute, left + (now - then) * per_second)
        admitted = left >= 1
        self._buckets[caller] = (left - 1 if admitted else left, now)
        self._forget(now)
        return None if admitted else (1 - left) / per_second

    def _forget(self, now: float) -> None:
        """Buckets are in the order of their last request, so the idle ones stand first."""
        while self._buckets:
            caller, (_, then) = next(iter(self._buckets.items()))
            if now - then < 60 and len(self._buckets) <= self._max_callers:
                return
            del self._buckets[caller]


def limit_rate(per_minute: int) -> Callable[[Request], Awaitable[None]]:
    """A dependency that comes after `require_key`; 0 is no limit."""
    limiter = RateLimiter(per_minute) if per_minute else None

    async def dependency(request: Request) -> None:
        if limiter is None:
            return
        wait = limiter.admit(_caller(request))
        if wait is not None:
            detail = f"this caller may send {per_minute} requests a minute"
            raise ProblemError(TOO_MANY_REQUESTS, detail, retry_after=wait)

    return dependency


def _caller(request: Request) -> str:
    name = getattr(request.state, "key_name", None)
    if name is not None:
        return f"key {name}"
    return f"address {_network(request.client.host) if request.client else 'unknown'}"


def _network(host: str) -> str:
    try:
        address = ip_address(host)
    except ValueError:
        return host
    if isinstance(address, IPv6Address) and address.ipv4_mapped is None:
        return f"{int(address) >> (128 - IPV6_NETWORK_BITS):x}"
    return host
