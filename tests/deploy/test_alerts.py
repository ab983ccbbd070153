"""The alert rules: correct for Prometheus, tested both ways, and explained in the runbook."""

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "deploy" / "alerts"
RULES = [
    rule
    for group in yaml.safe_load((ALERTS / "tokenmill.rules.yaml").read_text())["groups"]
    for rule in group["rules"]
]  # fmt: skip
NAMES = sorted({rule["alert"] for rule in RULES if "alert" in rule})
TESTS = yaml.safe_load((ALERTS / "tokenmill.rules.test.yaml").read_text())["tests"]
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()


def _sections():
    """The runbook by heading of the second level."""
    parts = re.split(r"^## (.+)$", RUNBOOK, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_promtool_finds_no_fault_in_the_rules(run):
    assert "SUCCESS" in run("promtool", "check", "rules", "--lint=all", "--lint-fatal", ALERTS / "tokenmill.rules.yaml")


def test_the_unit_tests_of_the_rules_pass(run):
    assert "SUCCESS" in run("promtool", "test", "rules", ALERTS / "tokenmill.rules.test.yaml")


def test_a_rule_that_is_broken_fails_its_unit_test(promtool, tmp_path):
    text = (ALERTS / "tokenmill.rules.yaml").read_text()
    (tmp_path / "tokenmill.rules.yaml").write_text(
        text.replace("last_progress_seconds > 30", "last_progress_seconds > 3000")
    )
    tests = tmp_path / "tokenmill.rules.test.yaml"
    tests.write_text((ALERTS / "tokenmill.rules.test.yaml").read_text())
    done = subprocess.run([promtool, "test", "rules", tests], capture_output=True, text=True)
    assert done.returncode != 0
    assert "TokenmillNoProgress" in done.stdout + done.stderr


@pytest.mark.parametrize("name", NAMES)
def test_an_alert_is_tested_where_it_fires_and_where_it_does_not(name):
    fires, series = Counter(), 0
    for test in TESTS:
        for case in test.get("alert_rule_test", []):
            if case["alertname"] == name:
                fires[bool(case["exp_alerts"])] += 1
                series = max(series, _instances(test) - len(case["exp_alerts"]))
    assert fires[True], "no test in which it fires"
    assert fires[False] or series > 0, "no test with a series for which it does not fire"


def _instances(test):
    """How many different things the series of a test are about."""
    about = (dict(re.findall(r'(\w+)="([^"]*)"', each["series"])) for each in test["input_series"])
    return len({labels.get("instance") or labels.get("model_name") or labels["job"] for labels in about})


@pytest.mark.parametrize("rule", [rule for rule in RULES if "alert" in rule], ids=lambda rule: rule["alert"])
def test_an_alert_says_how_bad_it_is_what_happened_and_where_to_read_on(rule):
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"]["summary"].endswith(".")
    assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{rule['alert'].lower()}"


@pytest.mark.parametrize("name", NAMES)
def test_the_runbook_has_cause_check_and_cure_of_each_alert(name):
    section = _sections()[name]
    assert [word for word in ("**Cause.**", "**Check.**", "**Cure.**") if word not in section] == []


def test_the_runbook_is_about_alerts_that_exist():
    assert sorted(_sections()) == NAMES
