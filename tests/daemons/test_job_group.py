"""Events of several jobs as one stream."""

import asyncio

from pdkv.daemons.job_group import JobGroup
from pdkv.daemons.link import PrefillJob, Sampling, TokensOut

NUM_EVENTS = 100


def test_a_flood_of_events_gives_way_to_everything_else() -> None:
    """A client that has gone is noticed by another task, which has its turn however many tokens lie ready."""

    async def turns_beside_a_flood() -> int:
        group = JobGroup([PrefillJob(b"1", [1], Sampling(), 1.0)], finish=lambda _: None)
        for _ in range(NUM_EVENTS):
            group.hear(0, TokensOut(b"1", [1], [0.0], []))
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        beside = asyncio.create_task(other())
        for _ in range(NUM_EVENTS):
            await group.next()
        beside.cancel()
        return turns

    assert asyncio.run(turns_beside_a_flood()) >= NUM_EVENTS / 2
