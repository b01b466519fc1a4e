"""Writes deploy/components/monitoring/prometheus-rule.yaml out of rules.yaml beside it.

python scripts/prometheus_rule.py
"""

import textwrap
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "deploy/components/monitoring"
_HEAD = """\
# Made of rules.yaml by scripts/prometheus_rule.py; change that. Some installations of the operator only take rules with
# a label of theirs, as release: prometheus; add it in your overlay.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: pdkv
  labels:
    app.kubernetes.io/part-of: pdkv
spec:
"""


def prometheus_rule(rules: str) -> str:
    """The same groups as an object of Prometheus' operator."""
    lines = [line for line in rules.splitlines(keepends=True) if not line.startswith("#")]
    return _HEAD + textwrap.indent("".join(lines), "  ")


def main() -> None:
    made = prometheus_rule((FOLDER / "rules.yaml").read_text(encoding="utf-8"))
    (FOLDER / "prometheus-rule.yaml").write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
