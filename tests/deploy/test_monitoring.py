"""Alerts and dashboard ask only for what daemons export; every alert has its runbook; the component fits the rest."""

import json
import re
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.manifests import DEPLOY, ROOT, main_container, rendered_with, workloads
from tests.deploy.queries import complaints, parse

FOLDER = DEPLOY / "components/monitoring"
RULES = (FOLDER / "rules.yaml").read_text(encoding="utf-8")
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))
RUNBOOK = (ROOT / "docs/runbook.md").read_text(encoding="utf-8")

Rule = dict[str, Any]


def _rules(kind: str) -> list[Rule]:
    return [rule for group in yaml.safe_load(RULES)["groups"] for rule in group["rules"] if kind in rule]


RECORDED = {rule["record"]: parse(rule["expr"]).named_labels - {"le"} for rule in _rules("record")}
ALERTS = {rule["alert"]: rule for rule in _rules("alert")}
PANELS = {panel["title"]: panel for panel in DASHBOARD["panels"] if panel["type"] != "row"}


@pytest.mark.parametrize("name", [*RECORDED, *ALERTS])
def test_rules_ask_for_what_is_exported(name: str) -> None:
    (rule,) = [rule for rule in _rules("expr") if name in (rule.get("alert"), rule.get("record"))]
    assert list(complaints(rule["expr"], RECORDED)) == []


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        ("rate(pdkv_request_total[5m])", "pdkv_request_total is exported by nobody"),
        ('pdkv_ready{role="cook"}', "pdkv_ready never has role=cook"),
        ('pdkv_kv_leases_active{role="decode"}', "pdkv_kv_leases_active never has role=decode"),
        ('pdkv_requests_total{code!~"none|nonsense"}', "pdkv_requests_total never has code=nonsense"),
        ('pdkv_peers{path="tcp"}', "pdkv_peers has no label path"),
        ("sum by (peer) (pdkv_peers)", "no series here has the label peer"),
        ("pdkv_kv_transfer_size_bytes", "pdkv_kv_transfer_size_bytes is exported by nobody"),
        ('pdkv_queue_duration_seconds_bucket{le="9.0"}', "pdkv_queue_duration_seconds_bucket never has le=9.0"),
    ],
)
def test_a_wrong_question_is_noticed(expression: str, complaint: str) -> None:
    assert list(complaints(expression, RECORDED)) == [complaint]


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_what_is_wrong_and_where_to_read_on(name: str) -> None:
    rule, told = ALERTS[name], ALERTS[name]["annotations"]
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert told["runbook"] == f"docs/runbook.md#{name.lower()}"
    section = re.search(rf"^### {name}\n(.*?)(?=^##|\Z)", RUNBOOK, re.MULTILINE | re.DOTALL)
    assert section is not None, "docs/runbook.md has a heading for it"
    for part in ("**Means.**", "**Look.**", "**Do.**"):
        assert part in section[1]
    query = parse(rule["expr"])
    labels = query.named_labels.union(*(RECORDED.get(selector.name, frozenset()) for selector in query.selectors))
    assert set(re.findall(r"\$labels\.(\w+)", told["summary"] + told["description"])) <= labels


def test_the_runbook_tells_of_no_alert_that_there_is_not() -> None:
    assert set(re.findall(r"^### (Pdkv\w+)$", RUNBOOK, re.MULTILINE)) == set(ALERTS)
    named = set(re.findall(r"`(pdkv_\w+)`", RUNBOOK))
    assert {name for name in named if list(complaints(name, {}))} == set()


def test_the_operators_object_is_made_of_the_same_rules() -> None:
    make = runpy.run_path(str(ROOT / "scripts/prometheus_rule.py"))["prometheus_rule"]
    made = (FOLDER / "prometheus-rule.yaml").read_text(encoding="utf-8")
    assert made == make(RULES), "run scripts/prometheus_rule.py"
    assert yaml.safe_load(made)["spec"] == yaml.safe_load(RULES)


def test_rules_fire_when_they_should() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool: the rules' own unit tests are not run")
    for what in (("check", "rules", "rules.yaml"), ("test", "rules", "rules.test.yaml")):
        done = subprocess.run([promtool, *what], cwd=FOLDER, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_unit_test() -> None:
    tested = (FOLDER / "rules.test.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r'alertname="(\w+)"', tested)) == set(ALERTS)


@pytest.mark.parametrize("title", PANELS)
def test_a_panel_asks_for_what_is_exported_and_says_what_it_shows(title: str) -> None:
    panel = PANELS[title]
    assert panel["description"]
    assert panel["fieldConfig"]["defaults"]["unit"]
    for target in panel["targets"]:
        assert list(complaints(target["expr"], {})) == []


def test_the_dashboard_has_one_place_for_everything() -> None:
    assert DASHBOARD["uid"] == "pdkv-overview", "links to it stay good"
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    cells = [(p["x"] + i, p["y"] + j) for p in places for i in range(p["w"]) for j in range(p["h"])]
    assert len(set(cells)) == len(cells), "no panel lies on another"
    assert max(x for x, _ in cells) < 24
    assert {each["name"] for each in DASHBOARD["templating"]["list"]} == {"datasource", "namespace", "role"}


def test_the_component_scrapes_every_pod_of_a_deployment(tmp_path: Path) -> None:
    objects = rendered_with(tmp_path, "monitoring")
    found = {each["kind"]: each for each in objects}
    assert {found[kind]["metadata"]["namespace"] for kind in ("PodMonitor", "PrometheusRule")} == {"pdkv"}
    assert found["PrometheusRule"]["spec"] == yaml.safe_load(RULES)
    (endpoint,) = found["PodMonitor"]["spec"]["podMetricsEndpoints"]
    wanted = found["PodMonitor"]["spec"]["selector"]["matchLabels"].items()
    for each in workloads("base"):
        assert wanted <= each["spec"]["template"]["metadata"]["labels"].items()
        assert endpoint["port"] in [port["name"] for port in main_container(each)["ports"]]
    (dashboard,) = [each for each in objects if each["metadata"]["name"] == "pdkv-dashboard"]
    assert json.loads(dashboard["data"]["pdkv.json"]) == DASHBOARD
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
