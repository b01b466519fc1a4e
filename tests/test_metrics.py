"""What is counted: sums, zeros, and a table that holds to Prometheus' rules of naming."""

import re

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pdkv.daemons.exposition import exposition
from pdkv.metric_table import ALL, HANDSHAKES, IN_FLIGHT, INTER_TOKEN, REQUESTS, TABLE, TRANSFER_BYTES, exported_by
from pdkv.metrics import Kind, Meter, Metric, Series

FORBIDDEN = {"request_id", "transfer", "peer", "ip", "pod", "layer", "block", "page", "le", "role"}


def _parsed(role: str, *meters: Meter) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = exposition(role, [series for meter in meters for series in meter.series()]).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.parametrize("metric", TABLE, ids=lambda metric: metric.name)
def test_names_and_labels_hold_to_the_rules(metric: Metric) -> None:
    assert re.fullmatch(r"pdkv_[a-z_]+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER) or metric.name == "pdkv_kv_blocks_total"
    assert not {label.name for label in metric.labels} & FORBIDDEN
    assert metric.help.endswith(".")
    assert set(metric.roles) <= set(ALL)
    assert bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM)
    assert list(metric.buckets) == sorted(set(metric.buckets))
    for values in metric.only:
        assert all(value in label.values for value, label in zip(values, metric.labels, strict=True))


def test_names_are_distinct() -> None:
    assert len({metric.name for metric in TABLE}) == len(TABLE)


@pytest.mark.parametrize("role", ALL)
def test_a_daemon_that_did_nothing_exports_the_whole_table_with_zeros(role: str) -> None:
    families = {f.name: f for f in text_string_to_metric_families(exposition(role, []).decode())}
    assert set(families) == {
        metric.name.removesuffix("_total") if metric.kind is Kind.COUNTER else metric.name
        for metric in exported_by(role)
    }
    for metric in exported_by(role):
        family = families[metric.name.removesuffix("_total") if metric.kind is Kind.COUNTER else metric.name]
        assert family.type == metric.kind.value
        assert all(sample.value == 0 for sample in family.samples)
        children = {tuple(s.labels.get(label.name) for label in metric.labels) for s in family.samples}
        assert children == set(metric.children())
        assert all(sample.labels["role"] == role for sample in family.samples)


def test_meters_of_several_threads_add_up() -> None:
    one, other = Meter(), Meter()
    one.count(REQUESTS, "ok", "none")
    other.count(REQUESTS, "ok", "none", by=2)
    one.set(IN_FLIGHT, to=4)
    one.observe(INTER_TOKEN, value=0.005)
    other.observe(INTER_TOKEN, value=0.006, times=2)
    other.observe(INTER_TOKEN, value=1000.0)
    parsed = _parsed("decode", one, other)
    role = ("role", "decode")
    assert parsed["pdkv_requests_total", (("code", "none"), ("result", "ok"), role)] == 3
    assert parsed["pdkv_requests_in_flight", (role,)] == 4
    assert parsed["pdkv_inter_token_latency_seconds_bucket", (("le", "0.005"), role)] == 1
    assert parsed["pdkv_inter_token_latency_seconds_bucket", (("le", "0.01"), role)] == 3
    assert parsed["pdkv_inter_token_latency_seconds_bucket", (("le", "+Inf"), role)] == 4
    assert parsed["pdkv_inter_token_latency_seconds_count", (role,)] == 4
    assert parsed["pdkv_inter_token_latency_seconds_sum", (role,)] == pytest.approx(1000.017)


def test_labels_that_nobody_declared_are_a_defect() -> None:
    meter = Meter()
    with pytest.raises(AssertionError, match="never has the label values"):
        meter.count(TRANSFER_BYTES, "k", "pigeon")
    with pytest.raises(AssertionError, match="has the labels"):
        meter.count(HANDSHAKES, "ok")
    with pytest.raises(AssertionError, match="is a counter"):
        meter.observe(HANDSHAKES, "ok", "none", value=1)


def test_a_series_travels_as_it_is() -> None:
    series = Series("n", ("a",), 1.5, (1, 2))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(series), type=Series) == series
