"""What a daemon's ``/metrics`` say, and what two looks at them say of the time between: pure, no I/O, no clock."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from pdkv.errors import PdkvError
from pdkv.metrics import Kind, Metric

Labels = tuple[tuple[str, str], ...]
"""Names and values, by name."""
_BOUND = "le"


class Sample(NamedTuple):
    """What tells one series from the others."""

    name: str
    labels: Labels


class Scrape(NamedTuple):
    """One answer of ``/metrics``."""

    at_s: float
    """When it came, by the asker's own clock; only differences mean anything."""
    values: Mapping[Sample, float]
    growing: frozenset[Sample]
    """Those that only grow in a process's life: counters, and the buckets of histograms."""

    def role(self) -> str:
        """Of the daemon that answered; empty where it is none of ours."""
        return next((value for sample in self.values for name, value in sample.labels if name == "role"), "")

    def total(self, metric: Metric, **labels: str) -> float | None:
        """A gauge's or counter's value over all series that have these ``labels``; None where none is exported."""
        found = [self.values[sample] for sample in self.matching(metric.name, labels)]
        return math.fsum(found) if found else None

    def matching(self, name: str, labels: Mapping[str, str]) -> list[Sample]:
        wanted = set(labels.items())
        return [sample for sample in self.values if sample.name == name and wanted <= set(sample.labels)]


def parse(text: str, at_s: float) -> Scrape:
    """Prometheus' text form. Raises ``PdkvError`` for text that is not in it."""
    values: dict[Sample, float] = {}
    growing: set[Sample] = set()
    try:
        for family in text_string_to_metric_families(text):
            for each in family.samples:
                sample = Sample(each.name, tuple(sorted(each.labels.items())))
                values[sample] = each.value
                if family.type == "counter" or each.name.endswith("_bucket"):
                    growing.add(sample)
    except (ValueError, KeyError, IndexError) as exc:
        raise PdkvError(f"what it answers is not in Prometheus' text form: {exc}") from exc
    return Scrape(at_s, values, frozenset(growing))


class Interval:
    """The time between two looks at one daemon; without a first look nothing is known of it.

    Counters that fell say that it began anew between them; then everything that it has counted was counted in this
    time, and what came in front of that is not known. So nothing is ever negative.
    """

    def __init__(self, before: Scrape | None, now: Scrape) -> None:
        self._now = now
        self._known = before is not None
        self._before: Mapping[Sample, float] = {}
        self._seconds = 0.0
        self.restarted = False
        if before:
            self._seconds = now.at_s - before.at_s
            self.restarted = any(now.values.get(sample, 0.0) < before.values[sample] for sample in before.growing)
            self._before = {} if self.restarted else before.values

    def increase(self, metric: Metric) -> float | None:
        """By how much a counter grew, over all its series; None where it is not exported."""
        assert metric.kind is Kind.COUNTER, f"{metric.name} is a {metric.kind}"
        found = self._now.matching(metric.name, {})
        return math.fsum(map(self._grown, found)) if found and self._known else None

    def rate(self, metric: Metric) -> float | None:
        """A counter's increase a second."""
        grown = self.increase(metric)
        return None if grown is None or self._seconds <= 0 else grown / self._seconds

    def quantile(self, metric: Metric, share: float) -> float | None:
        """The value below which a ``share`` of what a histogram saw in this time lies; None where it saw nothing."""
        assert metric.kind is Kind.HISTOGRAM, f"{metric.name} is a {metric.kind}"
        if not self._known:
            return None
        counts: dict[float, float] = defaultdict(float)
        for sample in self._now.matching(f"{metric.name}_bucket", {}):
            counts[float(dict(sample.labels)[_BOUND])] += self._grown(sample)
        return quantile(counts.items(), share)

    def _grown(self, sample: Sample) -> float:
        return self._now.values[sample] - self._before.get(sample, 0.0)


def quantile(cumulative: Iterable[tuple[float, float]], share: float) -> float | None:
    """From a histogram's buckets: upper bounds, the last of them infinite, and how many values were not above them.

    Straight between a bucket's bounds, from 0 in the first, as PromQL's ``histogram_quantile`` has it; beyond the last
    finite bound that bound, which is then too little. None where there are no values.
    """
    buckets = sorted(cumulative)
    if not buckets or buckets[-1][1] <= 0:
        return None
    rank = share * buckets[-1][1]
    for (low, below), (high, upto) in pairwise([(0.0, 0.0), *buckets]):
        if upto >= rank and upto > below:
            return low if math.isinf(high) else low + (high - low) * (rank - below) / (upto - below)
    raise AssertionError("the last bucket holds all values")
