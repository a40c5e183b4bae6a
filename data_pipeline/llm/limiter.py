"""How fast a server may be asked: requests and tokens a minute, and how many at a time.

Two token buckets refill continuously; the number of requests in flight halves when the server says
that it is overloaded and grows by one for each round that goes well (additive increase,
multiplicative decrease, as TCP does). A pause that the server asks for is kept by every request.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable

from data_pipeline.llm.options import Sending

BURST_SECONDS = 1.0  # a bucket holds what accrues in this: providers enforce limits per second


class _Bucket:
    """What may be spent at a rate per minute; a charge may overdraw it and is then waited for."""

    def __init__(self, per_minute: float, now: float) -> None:
        self._rate = per_minute / 60
        self._room = max(self._rate * BURST_SECONDS, 1.0)
        self._level = self._room
        self._time = now

    def wait(self, now: float) -> float:
        """Seconds until something may be taken out, which is once the level is positive again."""
        self._level = min(self._room, self._level + (now - self._time) * self._rate)
        self._time = now
        return 0.0 if self._level > 0 else (1e-6 - self._level) / self._rate

    def take(self, amount: float) -> None:
        self._level -= amount


class Limiter:
    """Admission of requests; one event loop.

    Args:
        requests_per_minute: None for no limit.
        tokens_per_minute: prompt and completion together, None for no limit.
        max_in_flight: requests at a time.
        clock: seconds; replaced in tests.
        sleep: likewise.

    Attributes:
        in_flight: requests admitted and not released.
        allowed: how many may be in flight now.
    """

    def __init__(
        self,
        *,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        max_in_flight: int = Sending.in_flight,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        for name, value in (
            ("requests_per_minute", requests_per_minute),
            ("tokens_per_minute", tokens_per_minute),
            ("in_flight", max_in_flight),
        ):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"`{name}` {value}: must be above 0")
        now = clock()
        self._requests = None if requests_per_minute is None else _Bucket(requests_per_minute, now)
        self._tokens = None if tokens_per_minute is None else _Bucket(tokens_per_minute, now)
        self._max = max_in_flight
        self._clock = clock
        self._sleep = sleep
        self._resume_at = now
        self._turn = asyncio.Lock()  # first come, first served
        self._freed = asyncio.Event()
        self.allowed = float(max_in_flight)
        self.in_flight = 0

    async def acquire(self, tokens: int) -> None:
        """Wait until a request of at most `tokens` tokens may start."""
        async with self._turn:
            while True:
                if self.in_flight >= max(1, int(self.allowed)):
                    self._freed.clear()
                    await self._freed.wait()
                    continue
                now = self._clock()
                wait = self._resume_at - now
                for bucket in (self._requests, self._tokens):
                    if bucket is not None:
                        wait = max(wait, bucket.wait(now))
                if wait <= 0:
                    break
                await self._sleep(wait)
            if self._requests is not None:
                self._requests.take(1)
            if self._tokens is not None:
                self._tokens.take(tokens)
            self.in_flight += 1

    def release(self, unused_tokens: int = 0) -> None:
        """A request is over; what it reserved and did not use goes back."""
        self.in_flight -= 1
        if self._tokens is not None and unused_tokens > 0:
            self._tokens.take(-unused_tokens)
        self._freed.set()

    def succeeded(self) -> None:
        """The server answered: allow a little more."""
        self.allowed = min(float(self._max), self.allowed + 1 / max(self.allowed, 1.0))
        self._freed.set()

    def back_off(self, seconds: float) -> None:
        """The server is overloaded: nothing starts for so long, then half as much at a time.

        Answers to requests that were in flight together count as one complaint.
        """
        now = self._clock()
        if now >= self._resume_at:
            self.allowed = max(1.0, self.allowed / 2)
        self._resume_at = max(self._resume_at, now + seconds)
