"""PromQL, parsed, and held against what daemons export: names, labels, and values of labels."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import promql_parser as promql

from pdkv.metric_table import TABLE
from pdkv.metrics import Kind, Metric

SCRAPE_LABELS = frozenset({"namespace", "pod", "instance"})
"""What a scrape adds to every series: by the operator, by annotations or, the last, by any Prometheus."""
_SUFFIXES = {Kind.COUNTER: ("",), Kind.GAUGE: ("",), Kind.HISTOGRAM: ("_bucket", "_sum", "_count")}
_EXPORTED = {metric.name + suffix: metric for metric in TABLE for suffix in _SUFFIXES[metric.kind]}
_VARIABLES = {"$__rate_interval": "5m", "$__range": "1h", "$namespace": ".*", "$role": ".*"}


class Query(NamedTuple):
    selectors: tuple[promql.VectorSelector, ...]
    named_labels: frozenset[str]
    """In by, on, ignoring and group_left."""


def parse(text: str) -> Query:
    """Raises ``ValueError`` for what is not PromQL. Grafana's variables get a value first."""
    for variable, value in _VARIABLES.items():
        text = text.replace(variable, value)
    selectors: list[promql.VectorSelector] = []
    labels: set[str] = set()

    def visit(node: promql.Expr) -> None:
        match node:
            case promql.VectorSelector():
                selectors.append(node)
            case promql.MatrixSelector():
                selectors.append(node.vector_selector)
            case promql.AggregateExpr() if node.modifier is not None:
                labels.update(node.modifier.labels)
            case promql.BinaryExpr() if node.modifier is not None:
                labels.update(node.modifier.matching.labels if node.modifier.matching else ())
                labels.update(node.modifier.group_labels or ())

    promql.walk(promql.parse(text), visit)
    return Query(tuple({str(each): each for each in selectors}.values()), frozenset(labels))


def complaints(text: str, recorded: Mapping[str, frozenset[str]]) -> Iterator[str]:
    """What no daemon would ever answer. ``recorded``: labels of the series that rules record, by name."""
    query = parse(text)
    known = set(SCRAPE_LABELS)
    for selector in query.selectors:
        name = selector.name
        if name in recorded:
            known |= recorded[name]
            unknown = [m.name for m in selector.matchers.matchers if m.name not in recorded[name]]
            yield from (f"{name} has no label {label}" for label in unknown)
        elif name in _EXPORTED:
            metric = _EXPORTED[name]
            known |= labels_of(metric)
            yield from _wrong_matchers(name, metric, selector)
        else:
            yield f"{name} is exported by nobody"
    yield from (f"no series here has the label {label}" for label in sorted(query.named_labels - known))


def labels_of(metric: Metric) -> set[str]:
    """Of its samples."""
    return {"role", *(label.name for label in metric.labels), *(["le"] if metric.kind is Kind.HISTOGRAM else [])}


def _wrong_matchers(name: str, metric: Metric, selector: promql.VectorSelector) -> Iterator[str]:
    bounded = {label.name: set(label.values) for label in metric.labels if label.values}
    bounded["role"] = set(metric.roles)
    bounded["le"] = {f"{bound:.10g}" if bound % 1 else f"{bound:.1f}" for bound in metric.buckets} | {"+Inf"}
    for matcher in selector.matchers.matchers:
        if matcher.name in SCRAPE_LABELS or matcher.value == ".*":
            continue
        if matcher.name not in labels_of(metric):
            yield f"{name} has no label {matcher.name}"
        elif matcher.name in bounded:  # a regular expression here is a list of values
            never = set(matcher.value.split("|")) - bounded[matcher.name]
            yield from (f"{name} never has {matcher.name}={value}" for value in sorted(never))
