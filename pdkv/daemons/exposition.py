"""Turns what a daemon counted into Prometheus' text form."""

from collections.abc import Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from pdkv.metric_table import exported_by
from pdkv.metrics import Kind, Metric, Series, total

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def exposition(role: str, counted: Iterable[Series]) -> bytes:
    """Every metric of the role, with zeros for what has not happened. ``counted`` may hold a series several times."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Counted(role, counted))
    return generate_latest(registry)


class _Counted(Collector):
    """Gives its values once, in the form that prometheus-client renders."""

    def __init__(self, role: str, counted: Iterable[Series]) -> None:
        self._role = role
        self._by_key: dict[tuple[str, tuple[str, ...]], list[Series]] = {}
        for series in counted:
            self._by_key.setdefault((series.name, series.labels), []).append(series)

    def describe(self) -> Iterable[Family]:
        return ()

    def collect(self) -> Iterator[Family]:
        for metric in exported_by(self._role):
            yield self._family(metric)

    def _family(self, metric: Metric) -> Family:
        names = ["role", *(label.name for label in metric.labels)]
        all_series = total(metric, self._by_key)
        if metric.kind is Kind.HISTOGRAM:
            histogram = HistogramMetricFamily(metric.name, metric.help, labels=names)
            bounds = [*map(_bound, metric.buckets), "+Inf"]
            for series in all_series:
                buckets = list(zip(bounds, accumulate(series.counts), strict=True))
                histogram.add_metric([self._role, *series.labels], buckets, series.value)
            return histogram
        kind = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
        family = kind(metric.name, metric.help, labels=names)
        for series in all_series:
            family.add_metric([self._role, *series.labels], series.value)
        return family


def _bound(value: float) -> str:
    return f"{value:.10g}" if value != int(value) else f"{value:.1f}"
