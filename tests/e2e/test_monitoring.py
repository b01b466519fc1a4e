"""What alerts and dashboard ask for is what real daemons answer with."""

import json

import yaml

from pdkv.metric_table import DECODE, PREFILL, ROUTER, exported_by
from tests.deploy.manifests import DEPLOY
from tests.deploy.queries import parse
from tests.e2e.deployment import Trio

FOLDER = DEPLOY / "components/monitoring"


def _asked_for() -> set[str]:
    """Names of samples, but those that rules record."""
    groups = yaml.safe_load((FOLDER / "rules.yaml").read_text(encoding="utf-8"))["groups"]
    panels = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))["panels"]
    queries = [rule["expr"] for group in groups for rule in group["rules"]]
    queries += [target["expr"] for panel in panels for target in panel.get("targets", [])]
    return {str(selector.name) for query in queries for selector in parse(query).selectors if ":" not in selector.name}


def test_every_name_in_alerts_and_dashboard_is_answered_by_some_daemon(three: Trio) -> None:
    sides = {PREFILL: three.prefill, DECODE: three.decode, ROUTER: three.router}
    told = {role: {sample.partition("{")[0] for sample in side.metrics()} for role, side in sides.items()}
    assert _asked_for() - set().union(*told.values()) == set()
    for role, names in told.items():
        bare = {name.removesuffix("_bucket") for name in names}
        assert {metric.name for metric in exported_by(role)} - bare == set(), "zeros included, from the start"
