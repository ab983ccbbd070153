"""What dashboard, alerts and autoscalers ask, asked of a real Prometheus that scrapes a real server with traffic."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import dashboard
import pytest
import yaml

DEPLOY = Path(dashboard.__file__).parent

AFTER_AN_EVENT = {
    "vllm:num_requests_waiting_by_reason": "has a series per reason, while a request waits for it",
    "tokenmill:requests_refused_total": "has a series per code, once a request was refused with it",
}
"""Metrics that a server without trouble does not show, and why."""

EMPTY_PANELS = {
    "Time to exhaustion": "the usage does not rise steadily in a test",
    "Queue, by reason": "nobody waits",
    "Refused, by code": "nobody is refused",
    "Prefix hits / yesterday": "there is no yesterday",
}
"""Queries that have nothing to show in a test that lasts seconds, and why."""

VARIABLES = {
    "$__rate_interval": "5s",
    "$job": ".*",
    "$model": ".*",
    "$instance": ".*",
    "[1h]": "[10s]",
    "[1d]": "[10s]",
}
SERIES = {"job": "tokenmill", "namespace": "tokenmill", "pod": "tokenmill-0"}


def _expand(expr):
    for name, value in VARIABLES.items():
        expr = expr.replace(name, value)
    return expr


def _queries():
    """Every query of the dashboard as (panel and legend, PromQL)."""
    for panel in json.loads(dashboard.FILE.read_text())["panels"]:
        for target in panel.get("targets", []):
            legend = target["legendFormat"]
            title = f"{panel['title']} / {legend}" if len(panel["targets"]) > 1 else panel["title"]
            yield title, _expand(target["expr"])


def _scaling_queries():
    """What KEDA and prometheus-adapter ask."""
    components = DEPLOY / "kustomize" / "components"
    for trigger in yaml.safe_load((components / "keda" / "scaledobject.yaml").read_text())["spec"]["triggers"]:
        yield f"keda {trigger['name']}", trigger["metadata"]["query"]
    for rule in yaml.safe_load((DEPLOY / "prometheus" / "adapter.yaml").read_text())["rules"]["custom"]:
        query = rule["metricsQuery"].replace("<<.GroupBy>>", "pod")
        query = query.replace("<<.Series>>", re.search(r'__name__="([^"]+)"', rule["seriesQuery"]).group(1))
        matchers = ",".join(f'{key}="{SERIES[key]}"' for key in ("namespace", "pod"))
        yield f"hpa {rule['name']['as']}", query.replace("<<.LabelMatchers>>", matchers)


def _rules():
    groups = yaml.safe_load((DEPLOY / "alerts" / "tokenmill.rules.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def _metrics(expr):
    """Names of metrics in a query."""
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|(by|without|on|ignoring|group_left) ?\([^)]*\)", "", expr)
    return set(re.findall(r"\b(?:vllm|tokenmill):\w+(?::\w+)?|\bprocess_\w+|\bup\b", bare))


class Prometheus:
    def __init__(self, url):
        self.url = url

    def get(self, path, **parameters):
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {json.load(error)['error']}") from None

    def query(self, expr):
        return self.get("query", query=expr)["result"]


def _wait(condition, what):
    """Polls until the condition holds; what it waits for is in another process."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if found := condition():
                return found
        except OSError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"after a minute there was still no {what}")


def _complete(url, number):
    body = {"model": "demo", "prompt": f"{'Repeat the word blue. ' * 12}{number}", "max_tokens": 24, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["usage"]


@pytest.fixture(scope="module")
def server():
    """The URL of a server with the built-in model, as a user starts it."""
    command = [sys.executable, "-m", "tokenmill", "serve", "demo", "--port", "0", "--served-model-name", "demo",
               "--ttft-slo-ms", "60000", "--tpot-slo-ms", "10000", "--log-level", "error"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield next(found.group() for line in process.stdout if (found := re.search(r"http://\S+", line)))
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()


@pytest.fixture(scope="module")
def prometheus(server, prometheus_program, tmp_path_factory):
    """Prometheus with the alert rules, which has scraped the server before, between and after some requests."""
    folder = tmp_path_factory.mktemp("prometheus")
    shutil.copy(DEPLOY / "alerts" / "tokenmill.rules.yaml", folder)
    target = {"targets": [server.removeprefix("http://")], "labels": {k: v for k, v in SERIES.items() if k != "job"}}
    config = {
        "global": {"scrape_interval": "250ms", "scrape_timeout": "250ms", "evaluation_interval": "500ms"},
        "rule_files": ["tokenmill.rules.yaml"],
        "scrape_configs": [{"job_name": "tokenmill", "static_configs": [target]}],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [prometheus_program, f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("w") as log, subprocess.Popen(
        [*command, f"--web.listen-address={address}"], stderr=log, stdout=log
    ) as process:  # fmt: skip
        try:
            found = Prometheus(f"http://{address}")
            _wait(lambda: found.query("up == 1"), "scrape")
            for number in range(6):
                _complete(server, number)
                scraped = f"vllm:request_success_total >= {number + 1}"
                _wait(lambda: found.query(scraped), f"scrape of request {number}")  # noqa: B023  # ends in this turn
            _wait(lambda: found.query("tokenmill:ttft_burn:rate5m"), "recorded rule")
            yield found
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module")
def existing(prometheus):
    return set(prometheus.get("label/__name__/values"))


QUERIES = dict([*_queries(), *_scaling_queries()])
EVERY_EXPRESSION = QUERIES | {f"rule {rule.get('alert') or rule['record']} {number}": rule["expr"]
                              for number, rule in enumerate(_rules())}  # fmt: skip


def test_the_committed_dashboard_is_what_the_builder_makes():
    assert dashboard.FILE.read_text() == dashboard.text()


def test_the_dashboard_is_well_formed():
    built = json.loads(dashboard.FILE.read_text())
    panels = built["panels"]
    assert [panel["id"] for panel in panels] == list(range(1, len(panels) + 1))
    titles = [title for title, _ in _queries()]
    assert sorted(set(titles)) == sorted(titles)
    taken = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    for panel in panels:
        assert panel["type"] == "row" or panel["datasource"]["uid"] == "${datasource}"
    named = {each["name"] for each in built["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(panels))) - {"__rate_interval", "labels", "value"}
    assert used <= named


@pytest.mark.parametrize("expr", EVERY_EXPRESSION.values(), ids=EVERY_EXPRESSION)
def test_every_query_is_understood_and_asks_for_metrics_that_exist(prometheus, existing, expr):
    prometheus.query(expr)
    recorded = {rule["record"] for rule in _rules() if "record" in rule}
    asked = _metrics(expr)
    assert asked
    assert asked - existing - AFTER_AN_EVENT.keys() - recorded == set()


@pytest.mark.parametrize("title", QUERIES)
def test_every_query_has_an_answer(prometheus, title):
    if title in EMPTY_PANELS:
        return
    result = prometheus.query(QUERIES[title])
    assert result, QUERIES[title]


def test_every_rule_is_evaluated_without_an_error(prometheus):
    def evaluated():
        rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
        return rules if all(rule["health"] != "unknown" for rule in rules) else []

    rules = _wait(evaluated, "evaluation of every rule")
    assert len(rules) == len(_rules())
    assert {rule["health"] for rule in rules} == {"ok"}
    assert [rule["name"] for rule in rules if rule.get("state") == "firing"] == []


def test_the_queue_that_autoscalers_see_is_the_servers(prometheus):
    for title, query in _scaling_queries():
        if "waiting" in title:
            (sample,) = prometheus.query(query)
            assert float(sample["value"][1]) == 0
