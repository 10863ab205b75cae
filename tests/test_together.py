"""Coroutines that run together end together."""

from __future__ import annotations

import asyncio
import contextlib
import gc

import pytest

from midstream.together import together


class Work:
    """Waits until it is told to go on, or cancelled; then takes some turns of the loop to end well."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.began = False
        self.ended_well = False

    async def run(self, result: object = None) -> object:
        self.began = True
        try:
            await self.go.wait()
            if isinstance(result, BaseException):
                raise result
            return result
        finally:
            for _ in range(3):
                await asyncio.sleep(0)
            self.ended_well = True


async def until_begun(*works: Work) -> None:
    while not all(work.began for work in works):
        await asyncio.sleep(0)


def others() -> set[asyncio.Task[object]]:
    return asyncio.all_tasks() - {asyncio.current_task()}  # type: ignore[arg-type]


async def test_results_are_in_order_though_the_last_is_first() -> None:
    first, second = Work(), Work()

    async def lead() -> int:
        await until_begun(first, second)
        second.go.set()
        while not second.ended_well:
            await asyncio.sleep(0)
        first.go.set()
        return 3

    assert await together([first.run(1), second.run(2), lead()]) == [1, 2, 3]
    assert await together([]) == []


async def test_the_first_failure_cancels_the_others_and_waits_for_them() -> None:
    failing, waiting = Work(), Work()
    failing.go.set()
    with pytest.raises(KeyError, match="it"):
        await together([waiting.run(), failing.run(KeyError("it"))])
    assert waiting.ended_well
    assert not others()


async def test_of_two_failures_the_first_is_raised_and_the_other_is_not_reported_as_lost() -> None:
    async def fails(error: Exception) -> None:
        raise error

    lost: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: lost.append(context))
    with pytest.raises(KeyError):
        await together([fails(KeyError()), fails(ValueError())])
    gc.collect()
    await asyncio.sleep(0)
    assert not lost


@pytest.mark.parametrize("times", [1, 2, 3])
async def test_cancellation_from_outside_ends_all_of_them_however_often(times: int) -> None:
    works = Work(), Work()
    task = asyncio.create_task(together([work.run() for work in works]))
    await until_begun(*works)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [work.ended_well for work in works] == [True, True] or times > 1
    assert not others()


async def test_what_one_does_to_end_well_is_not_cancelled_again() -> None:
    cancellations = 0

    async def counts() -> None:
        nonlocal cancellations
        try:
            await asyncio.sleep(60)
        finally:
            for _ in range(5):
                try:
                    await asyncio.sleep(0)
                except asyncio.CancelledError:
                    cancellations += 1

    async def ends_at_once() -> None:
        await asyncio.sleep(60)

    task = asyncio.create_task(together([ends_at_once(), counts()]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cancellations == 0


async def test_a_cancellation_is_not_lost_though_one_fails_in_that_moment() -> None:
    """gather would raise the failure, and whoever handles that would go on as if nobody had cancelled."""
    went_on = False

    async def fails(caller: asyncio.Task[None]) -> None:
        await asyncio.sleep(0)
        caller.cancel()
        raise KeyError

    async def caller() -> None:
        nonlocal went_on
        task = asyncio.current_task()
        assert task is not None
        with contextlib.suppress(KeyError):
            await together([fails(task)])
        went_on = True

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(caller())
    assert not went_on


async def test_they_nest() -> None:
    inner, outer = Work(), Work()
    outer.go.set()

    async def nested() -> None:
        await together([inner.run()])

    async def fails() -> None:
        await until_begun(inner)
        await outer.run(ValueError("outer"))

    with pytest.raises(ValueError, match="outer"):
        await together([nested(), fails()])
    assert inner.ended_well
    assert not others()
