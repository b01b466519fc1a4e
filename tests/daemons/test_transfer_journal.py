"""What a worker's own times say: each ends when its message leaves, whatever the thread waits for afterwards."""

import time

from pdkv.agent.events import FinishPrefill, GrantPages, PrefillWanted
from pdkv.daemons.link import PrefillJob, Sampling
from pdkv.daemons.transfer_journal import TransferJournal
from pdkv.metric_table import PREFILL_SECONDS, QUEUE_SECONDS
from pdkv.schema import TransferId

TRANSFER = TransferId(b"t" * 16)
HELD_UP_S = 0.02


def test_prefill_has_ended_when_its_first_token_is_passed_on() -> None:
    """The agent's thread may take the interpreter then, send Done, and let decode's token out first."""
    posted_at = []

    def post(_: object) -> None:
        posted_at.append(time.monotonic())
        time.sleep(HELD_UP_S)

    journal = TransferJournal()
    began = time.monotonic()
    journal.front_said(PrefillJob(TRANSFER, [1, 2], Sampling(), 10.0))
    followed = journal.posting(post)
    followed(GrantPages(TRANSFER, (3,), 0))
    followed(FinishPrefill(TRANSFER, 7, -0.5))
    seconds = {one.name: one.value for one in journal.meter.series()}
    assert seconds[QUEUE_SECONDS.name] <= posted_at[0] - began
    assert seconds[PREFILL_SECONDS.name] >= HELD_UP_S
    assert seconds[QUEUE_SECONDS.name] + seconds[PREFILL_SECONDS.name] <= posted_at[1] - began


def test_prefill_that_began_early_is_timed_from_its_pages() -> None:
    """Its Acquire comes while it computes."""
    journal = TransferJournal()
    journal.front_said(PrefillJob(TRANSFER, [1, 2], Sampling(), 10.0))
    followed = journal.posting(lambda _: None)
    followed(GrantPages(TRANSFER, (3,), 0))
    time.sleep(HELD_UP_S)
    journal.agent_said(PrefillWanted(TRANSFER))
    followed(FinishPrefill(TRANSFER, 7, -0.5))
    seconds = {one.name: one.value for one in journal.meter.series()}
    assert seconds[PREFILL_SECONDS.name] >= HELD_UP_S
