"""What is counted, as plain values: the kinds of metric, and a meter that one thread owns. No HTTP, no registry.

``pdkv.metric_table`` names every metric; a daemon's front turns what its processes counted into Prometheus' text.
"""

import math
from bisect import bisect_left
from enum import StrEnum
from itertools import product

import msgspec


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Label(msgspec.Struct, frozen=True):
    name: str
    values: tuple[str, ...] = ()
    """All that it may be. Empty: known at run time only (a version, a digest), one value in a process's life."""


class Metric(msgspec.Struct, frozen=True, kw_only=True):
    """One name in the table. Every series also carries the label ``role``."""

    name: str
    kind: Kind
    help: str
    roles: tuple[str, ...]
    labels: tuple[Label, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets, ascending, without the infinite one."""
    only: tuple[tuple[str, ...], ...] = ()
    """The combinations of label values that occur, where not all do."""

    def children(self) -> tuple[tuple[str, ...], ...]:
        """Label values of every series that exists from the start, with a value of zero."""
        if self.only:
            return self.only
        return tuple(product(*(label.values for label in self.labels)))


class Series(msgspec.Struct, frozen=True):
    """One series' value, as it travels from an engine process to its front."""

    name: str
    labels: tuple[str, ...]
    """In the order of the metric's labels."""
    value: float
    """A histogram's sum."""
    counts: tuple[int, ...] = ()
    """A histogram's observations per bucket, not cumulative; the last is the infinite bucket's."""


class _Histogram:
    __slots__ = ("counts", "total")

    def __init__(self, num_bounds: int) -> None:
        self.counts = [0] * (num_bounds + 1)
        self.total = 0.0


_Key = tuple[str, tuple[str, ...]]


class Meter:
    """Counts. Owned by one thread; what several threads count is added up by ``total``."""

    def __init__(self) -> None:
        self._values: dict[_Key, float] = {}
        self._histograms: dict[_Key, _Histogram] = {}

    def count(self, metric: Metric, *labels: str, by: float = 1) -> None:
        """Add to a counter; ``by`` may be 0 and is never negative."""
        assert metric.kind is Kind.COUNTER, f"{metric.name} is a {metric.kind}"
        key = metric.name, labels
        if key not in self._values:
            self._values[_key(metric, labels)] = 0.0
        self._values[key] += by

    def set(self, metric: Metric, *labels: str, to: float) -> None:
        """Set a gauge, or a counter that somebody else keeps."""
        assert metric.kind is not Kind.HISTOGRAM, f"{metric.name} is a histogram"
        self._values[_key(metric, labels)] = to

    def observe(self, metric: Metric, *labels: str, value: float, times: int = 1) -> None:
        """Put a value into a histogram, ``times`` times."""
        assert metric.kind is Kind.HISTOGRAM, f"{metric.name} is a {metric.kind}"
        key = metric.name, labels
        histogram = self._histograms.get(key)
        if histogram is None:
            histogram = self._histograms[_key(metric, labels)] = _Histogram(len(metric.buckets))
        histogram.counts[bisect_left(metric.buckets, value)] += times
        histogram.total += value * times

    def series(self) -> tuple[Series, ...]:
        """Everything counted so far, as values."""
        plain = [Series(name, labels, value) for (name, labels), value in self._values.items()]
        histograms = [Series(name, labels, h.total, tuple(h.counts)) for (name, labels), h in self._histograms.items()]
        return (*plain, *histograms)


def total(metric: Metric, counted: dict[_Key, list[Series]]) -> list[Series]:
    """A metric's series, in a fixed order: zeros for what nobody counted, sums where several meters did."""
    known = metric.children()
    extra = sorted(labels for name, labels in counted if name == metric.name and labels not in set(known))
    return [_sum(metric, labels, counted.get((metric.name, labels), [])) for labels in (*known, *extra)]


def _sum(metric: Metric, labels: tuple[str, ...], parts: list[Series]) -> Series:
    counts: tuple[int, ...] = ()
    if metric.kind is Kind.HISTOGRAM:
        empty = (0,) * (len(metric.buckets) + 1)
        counts = tuple(map(sum, zip(empty, *(part.counts for part in parts), strict=True)))
    return Series(metric.name, labels, math.fsum(part.value for part in parts), counts)


def _key(metric: Metric, labels: tuple[str, ...]) -> _Key:
    assert len(labels) == len(metric.labels), f"{metric.name} has the labels {[label.name for label in metric.labels]}"
    bounded = all(value in label.values or not label.values for value, label in zip(labels, metric.labels, strict=True))
    assert bounded, f"{metric.name} never has the label values {labels}"
    return metric.name, labels
