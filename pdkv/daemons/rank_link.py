"""What rank 0 of a worker and its other ranks say to each other, over one socket pair each.

The frames are those of ``link``. Both ends live and die together: the end of the socket pair is the signal.
"""

import msgspec

from pdkv.agent.rank_digests import DigestPages, PagesDigested
from pdkv.agent.rank_reads import (
    CloseLink,
    ConnectLink,
    LinkConnected,
    LinkProbed,
    PagesRead,
    ProbeLink,
    RankReport,
    ReadPages,
)
from pdkv.daemons.link import WorkerSettings
from pdkv.daemons.rank_share import ArenaOrder
from pdkv.m3.run import Run
from pdkv.wire.messages import RankOffer


class RankSetup(msgspec.Struct, frozen=True, tag="setup"):
    """The first message: load your share. Answered by ``ShareLoaded``."""

    settings: WorkerSettings
    rank: int
    store_port: int
    """On the loopback interface: where the ranks meet for their collectives. 0 between threads, which have met."""


class ArenaWanted(msgspec.Struct, frozen=True, tag="arena"):
    """The second: make room for your pages. Answered by ``RankReady``."""

    order: ArenaOrder


class StepRuns(msgspec.Struct, frozen=True, tag="step"):
    """Compute one step with all the others. Answered by ``StepEnded``."""

    runs: tuple[Run, ...]


class RankBeatQuery(msgspec.Struct, frozen=True, tag="beat?"):
    """Answered by ``RankBeat`` from the rank's agent thread."""


ToRank = (
    RankSetup | ArenaWanted | StepRuns | RankBeatQuery | ConnectLink | ProbeLink | ReadPages | CloseLink | DigestPages
)


class ShareLoaded(msgspec.Struct, frozen=True, tag="loaded"):
    pass


class RankReady(msgspec.Struct, frozen=True, tag="ready"):
    offer: RankOffer


class StepEnded(msgspec.Struct, frozen=True, tag="stepped"):
    """What this rank had to write into its pages is written."""


class RankBeat(msgspec.Struct, frozen=True, tag="beat"):
    pass


class RankFatal(msgspec.Struct, frozen=True, tag="fatal"):
    """This rank cannot go on; it ends after this."""

    message: str
    exit_code: int


RankAnswer = ShareLoaded | RankReady | StepEnded
FromRank = RankAnswer | RankBeat | RankFatal | LinkConnected | LinkProbed | PagesRead | PagesDigested

__all__ = [
    "ArenaWanted",
    "FromRank",
    "RankAnswer",
    "RankBeat",
    "RankBeatQuery",
    "RankFatal",
    "RankReady",
    "RankReport",
    "RankSetup",
    "ShareLoaded",
    "StepEnded",
    "StepRuns",
    "ToRank",
]
