"""The limiter keeps to its rates, on a clock that only its own sleeps move."""

import asyncio

import pytest

from data_pipeline.llm.limiter import Limiter


class Clock:
    """Time passes when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def read(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


def starts(limiter: Limiter, clock: Clock, count: int, tokens: int) -> list[float]:
    """Times at which requests are admitted that end at once."""

    async def work() -> list[float]:
        times = []
        for _ in range(count):
            await limiter.acquire(tokens)
            times.append(clock.now)
            limiter.release()
        return times

    return asyncio.run(work())


def test_requests_per_minute() -> None:
    clock = Clock()
    limiter = Limiter(requests_per_minute=120, clock=clock.read, sleep=clock.sleep)
    times = starts(limiter, clock, 241, 1)
    assert 240 / 2 - 2 <= times[-1] - times[0] <= 240 / 2 + 0.1
    # No minute holds more than the limit and one second's burst.
    for first, time in enumerate(times):
        assert sum(time <= other < time + 60 for other in times[first:]) <= 122


def test_tokens_per_minute_and_what_goes_back() -> None:
    clock = Clock()
    limiter = Limiter(tokens_per_minute=6000, clock=clock.read, sleep=clock.sleep)
    times = starts(limiter, clock, 31, 200)
    assert times[-1] - times[0] == pytest.approx(60, abs=3)

    async def generous() -> float:
        begin = clock.now
        for _ in range(30):
            await limiter.acquire(200)
            limiter.release(unused_tokens=150)
        return clock.now - begin

    assert asyncio.run(generous()) == pytest.approx(15, abs=4)


def test_backing_off_halves_once_for_one_burst_and_recovers() -> None:
    clock = Clock()
    limiter = Limiter(max_in_flight=16, clock=clock.read, sleep=clock.sleep)

    async def work() -> None:
        for _ in range(16):
            await limiter.acquire(1)
        waiting = asyncio.create_task(limiter.acquire(1))
        await asyncio.sleep(0)
        for _ in range(16):  # all that were in flight are told so
            limiter.back_off(5)
            limiter.release()
        await waiting
        limiter.release()

    asyncio.run(work())
    assert limiter.allowed == 8
    assert clock.now >= 105, "nothing starts during the pause"
    for _ in range(200):
        limiter.succeeded()
    assert limiter.allowed == 16


def test_no_more_in_flight_than_allowed() -> None:
    limiter = Limiter(max_in_flight=3)
    most = 0

    async def one() -> None:
        nonlocal most
        await limiter.acquire(1)
        most = max(most, limiter.in_flight)
        await asyncio.sleep(0)
        limiter.release()

    async def work() -> None:
        await asyncio.gather(*(one() for _ in range(50)))

    asyncio.run(work())
    assert most == 3
    assert limiter.in_flight == 0


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_rates_must_be_sensible(value: float) -> None:
    with pytest.raises(ValueError, match="requests_per_minute"):
        Limiter(requests_per_minute=value)
