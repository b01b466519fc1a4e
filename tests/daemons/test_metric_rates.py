"""Rates and percentiles between two looks at a daemon's metrics."""

import math
from bisect import bisect_left
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdkv.daemons.exposition import exposition
from pdkv.daemons.metric_rates import Interval, Sample, Scrape, parse, quantile
from pdkv.errors import PdkvError
from pdkv.metric_table import (
    DECODE,
    GENERATION_TOKENS,
    LEASES_ACTIVE,
    PEERS,
    TIME_TO_FIRST_TOKEN,
    TRANSFER_FAILURES,
    WAITING,
)
from pdkv.metrics import Meter

BOUNDS = (*TIME_TO_FIRST_TOKEN.buckets, math.inf)
SECONDS = st.floats(0.0, 700.0)
TOKENS = Sample(GENERATION_TOKENS.name, ())
LOST, UNREAD = (Sample(TRANSFER_FAILURES.name, (("code", code),)) for code in ("peer_lost", "read_failed"))
WORK = st.fixed_dictionaries({sample: st.integers(0, 9) for sample in (TOKENS, LOST, UNREAD)})
STEPS = st.lists(st.tuples(st.booleans(), st.floats(0.01, 60.0), WORK), min_size=1, max_size=8)
"""Between two looks: whether it began anew, the seconds, and what it counted since."""


def looked(*meters: Meter) -> list[Scrape]:
    """A second apart, as a decode worker exports them."""
    return [parse(exposition(DECODE, meter.series()).decode(), float(at)) for at, meter in enumerate(meters)]


@given(STEPS)
def test_rates_are_what_was_counted_and_never_negative_whenever_it_began_anew(
    steps: list[tuple[bool, float, dict[Sample, int]]],
) -> None:
    values = {TOKENS: 5.0, LOST: 0.0, UNREAD: 2.0}
    looks = [Scrape(100.0, values, frozenset(values))]
    for restarts, seconds, work in steps:
        values = {sample: work[sample] + (0.0 if restarts else value) for sample, value in values.items()}
        looks.append(Scrape(looks[-1].at_s + seconds, values, frozenset(values)))
    for (restarts, seconds, work), pair in zip(steps, pairwise(looks), strict=True):
        interval = Interval(*pair)
        for metric, truly in ((GENERATION_TOKENS, work[TOKENS]), (TRANSFER_FAILURES, work[LOST] + work[UNREAD])):
            grown, rate = interval.increase(metric), interval.rate(metric)
            assert grown is not None
            assert rate == pytest.approx(grown / seconds)
            assert 0 <= grown <= truly
            if interval.restarted or not restarts:
                assert grown == truly
        assert restarts or not interval.restarted


@given(st.lists(SECONDS, min_size=1, max_size=50), st.floats(0.01, 1.0))
def test_a_percentile_lies_in_the_bucket_of_the_value_that_it_stands_for(seen: list[float], share: float) -> None:
    counts = [0] * len(BOUNDS)
    for value in seen:
        counts[bisect_left(BOUNDS, value)] += 1
    found = quantile(zip(BOUNDS, accumulate(counts), strict=True), share)
    assert found is not None
    at = bisect_left(BOUNDS, sorted(seen)[math.ceil(share * len(seen)) - 1])
    low = BOUNDS[at - 1] if at else 0.0
    assert low <= found <= (BOUNDS[at] if math.isfinite(BOUNDS[at]) else low) * (1 + 1e-9)


@given(st.lists(SECONDS, min_size=1, max_size=20))
def test_percentiles_do_not_cross(seen: list[float]) -> None:
    counts = accumulate(sum(bisect_left(BOUNDS, value) == at for value in seen) for at in range(len(BOUNDS)))
    buckets = list(zip(BOUNDS, counts, strict=True))
    told = [quantile(buckets, share) or 0.0 for share in (0.0, 0.1, 0.5, 0.99, 1.0)]
    assert told == sorted(told)


def test_a_percentile_is_read_straight_between_bounds() -> None:
    assert quantile([(1.0, 0.0), (2.0, 4.0), (math.inf, 4.0)], 0.5) == 1.5
    assert quantile([(math.inf, 8.0), (2.0, 4.0), (1.0, 4.0)], 0.25) == 0.5, "in whatever order"
    assert quantile([(1.0, 0.0), (math.inf, 4.0)], 0.5) == 1.0, "the last bound that there is"
    assert quantile([(1.0, 0.0), (math.inf, 0.0)], 0.5) is None
    assert quantile([], 0.5) is None


def test_only_what_came_since_the_look_before_counts() -> None:
    before, now = Meter(), Meter()
    for meter in (before, now):
        meter.observe(TIME_TO_FIRST_TOKEN, value=20.0, times=100)
        meter.count(GENERATION_TOKENS, by=1000)
    now.observe(TIME_TO_FIRST_TOKEN, value=0.04, times=4)
    now.count(GENERATION_TOKENS, by=7)
    now.count(TRANSFER_FAILURES, "tcp", "peer_lost")
    interval = Interval(*looked(before, now))
    assert interval.rate(GENERATION_TOKENS) == 7
    assert interval.increase(TRANSFER_FAILURES) == 1
    median = interval.quantile(TIME_TO_FIRST_TOKEN, 0.5)
    assert median == pytest.approx(0.0375), "half way from 25 to 50 ms"
    idle = Interval(*looked(now, now))
    assert (idle.rate(GENERATION_TOKENS), idle.quantile(TIME_TO_FIRST_TOKEN, 0.5)) == (0, None)


def test_a_restart_shows_by_any_counter_and_all_begin_again() -> None:
    before, now = Meter(), Meter()
    before.observe(TIME_TO_FIRST_TOKEN, value=20.0, times=3)
    now.count(GENERATION_TOKENS, by=7)
    now.observe(TIME_TO_FIRST_TOKEN, value=0.04)
    interval = Interval(*looked(before, now))
    assert interval.restarted
    assert interval.increase(GENERATION_TOKENS) == 7
    assert interval.quantile(TIME_TO_FIRST_TOKEN, 0.99) == pytest.approx(0.04975)


def test_a_gauge_that_falls_is_no_restart_and_a_first_look_knows_no_rate() -> None:
    before, now = Meter(), Meter()
    before.set(PEERS, to=3)
    now.set(PEERS, to=1)
    now.set(WAITING, "queued", to=2)
    now.set(WAITING, "decode", to=5)
    looks = looked(before, now)
    assert not Interval(*looks).restarted
    first = Interval(None, looks[1])
    assert (first.rate(GENERATION_TOKENS), first.quantile(TIME_TO_FIRST_TOKEN, 0.5)) == (None, None)
    seen = looks[1]
    assert (seen.role(), seen.total(PEERS)) == (DECODE, 1)
    assert (seen.total(WAITING), seen.total(WAITING, stage="queued")) == (7, 2)
    assert seen.total(LEASES_ACTIVE) is None, "what a role does not export is not 0"


def test_what_is_no_such_text_is_refused() -> None:
    with pytest.raises(PdkvError, match="Prometheus' text form"):
        parse("<html>{</html>", 0.0)
    assert parse("up 1\n", 0.0).role() == ""
