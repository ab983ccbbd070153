"""Builds deploy/grafana/tokenmill.json: ``python deploy/dashboard.py`` writes it, a test compares.

A row is a title and its panels; a panel is a title, what it tells, a unit, and its queries with their legends.
Source: https://grafana.com/docs/grafana/latest/dashboards/build-dashboards/view-dashboard-json-model/
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["FILE", "dashboard"]

FILE = Path(__file__).parent / "grafana" / "tokenmill.json"

_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_ALL = '{job=~"$job",model_name=~"$model",instance=~"$instance"}'
_JOB = '{job=~"$job",instance=~"$instance"}'
_GOALS = '{job=~"$job",model_name=~"$model"}'
_GOOD = '{job=~"$job",instance=~"$instance",slo="all",met="true"}'
_WIDTH = 24

Panel = dict[str, Any]


def _rate(name: str, by: str = "", labels: str = _ALL) -> str:
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate({name}{labels}[$__rate_interval]))"


def _panel(kind: str, width: int, title: str, description: str, unit: str, *queries: tuple[str, str]) -> Panel:
    targets = [
        {"refId": chr(ord("A") + number), "expr": expr, "legendFormat": legend, "datasource": _DATASOURCE}
        for number, (expr, legend) in enumerate(queries)
    ]
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": _DATASOURCE,
        "gridPos": {"w": width, "h": 4 if kind == "stat" else 8},
        "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
        "targets": targets,
    }


def _stat(title: str, description: str, unit: str, expr: str, *steps: tuple[str, float]) -> Panel:
    """One number; `steps` are the colours it takes from a value on."""
    panel = _panel("stat", 3, title, description, unit, (expr, ""))
    colours = [{"color": "green", "value": None}, *({"color": color, "value": value} for color, value in steps)]
    panel["fieldConfig"]["defaults"] |= {"thresholds": {"mode": "absolute", "steps": colours}, "noValue": "-"}
    panel["options"] = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "area"}
    return panel


def _lines(title: str, description: str, unit: str, *queries: tuple[str, str], stacked: bool = False) -> Panel:
    panel = _panel("timeseries", 8, title, description, unit, *queries)
    custom = {"fillOpacity": 20, "stacking": {"mode": "normal"}} if stacked else {"fillOpacity": 0}
    panel["fieldConfig"]["defaults"] |= {"custom": {"lineWidth": 1, "showPoints": "never", **custom}, "min": 0}
    panel["options"] = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
    return panel


def _quantiles(title: str, description: str, name: str) -> Panel:
    buckets = _rate(f"{name}_bucket", "le")
    shares = (("0.5", "p50"), ("0.9", "p90"), ("0.99", "p99"))
    queries = ((f"histogram_quantile({share}, {buckets})", legend) for share, legend in shares)
    return _lines(title, description, "s", *queries)


def _heatmap(title: str, description: str, unit: str, name: str) -> Panel:
    panel = _panel("heatmap", 8, title, description, unit, (_rate(f"{name}_bucket", "le"), "{{le}}"))
    panel["targets"][0]["format"] = "heatmap"
    panel["options"] = {
        "calculate": False,
        "yAxis": {"unit": unit},
        "color": {"mode": "scheme", "scheme": "Spectral", "steps": 64},
        "cellGap": 1,
        "tooltip": {"mode": "single"},
        "legend": {"show": True},
    }
    return panel


def _rows() -> list[tuple[str, list[Panel]]]:
    finished = "vllm:request_success_total"
    generated = "vllm:generation_tokens_total"
    per_million = "1e6 * sum (increase(tokenmill:cost_dollars_total{0}[1h])) / sum (increase({1}{0}[1h]))"
    return [
        (
            "Overview",
            [
                _stat("Replicas up", "Replicas that answer Prometheus.", "none", 'sum (up{job=~"$job"})'),
                _stat("Requests", "Requests that ended, per second.", "reqps", _rate(finished)),
                _stat("Running", "Requests in the batch.", "none", f"sum (vllm:num_requests_running{_ALL})"),
                _stat("Waiting", "Requests in the queue.", "none", f"sum (vllm:num_requests_waiting{_ALL})",
                      ("orange", 10)),
                _stat("Saturation", "1: one more request would break a goal. Autoscaling follows it.", "percentunit",
                      f"avg (tokenmill:saturation_ratio{_JOB})", ("orange", 0.7), ("red", 0.9)),
                _stat("Goodput", "Share of finished requests that met every goal.", "percentunit",
                      f"{_rate('tokenmill:goodput_requests_total', labels=_GOOD)} / {_rate(finished)}"),
                _stat("Per million tokens", "Dollars for a million generated tokens, over the last hour.",
                      "currencyUSD", per_million.replace("{0}", _JOB).replace("{1}", generated)),
                _stat("Engine restarts", "Crashes of engine processes in the last day.", "none",
                      f"sum (increase(tokenmill:engine_restarts_total{_JOB}[1d]))", ("red", 1)),
            ],
        ),
        (
            "Requests",
            [
                _lines("Finished, by reason", "How requests end.", "reqps",
                       (_rate(finished, "finished_reason"), "{{finished_reason}}"), stacked=True),
                _lines("In the engine", "Requests that run and that wait.", "none",
                       (f"sum (vllm:num_requests_running{_ALL})", "running"),
                       (f"sum (vllm:num_requests_waiting{_ALL})", "waiting")),
                _lines("Queue, by reason", "What waiting requests wait for.", "none",
                       (f"sum by (reason) (vllm:num_requests_waiting_by_reason{_ALL})", "{{reason}}"), stacked=True),
                _lines("Refused, by code", "Requests turned away before the engine saw them.", "reqps",
                       (_rate("tokenmill:requests_refused_total", "code", _JOB), "{{code}}"), stacked=True),
                _lines("Goodput", "Requests that met every goal, beside all.", "reqps",
                       (_rate(finished), "finished"),
                       (_rate("tokenmill:goodput_requests_total", labels=_GOOD), "within goals")),
                _lines("Saturation, by replica", "1: one more request would break a goal.", "percentunit",
                       (f"tokenmill:saturation_ratio{_JOB}", "{{instance}}")),
            ],
        ),
        (
            "Latency",
            [
                _quantiles("Time to first token", "From arrival.", "vllm:time_to_first_token_seconds"),
                _quantiles("Between tokens", "Between tokens that reach the caller.",
                           "vllm:inter_token_latency_seconds"),
                _quantiles("From arrival to the end", "The whole request.", "vllm:e2e_request_latency_seconds"),
                _heatmap("Time to first token", "All of it, not a quantile.", "s", "vllm:time_to_first_token_seconds"),
                _heatmap("Between tokens", "All of it, not a quantile.", "s", "vllm:inter_token_latency_seconds"),
                _heatmap("From arrival to the end", "All of it, not a quantile.", "s",
                         "vllm:e2e_request_latency_seconds"),
                _quantiles("Time per token after the first", "Mean of a request.",
                           "vllm:request_time_per_output_token_seconds"),
                _lines("Where the time goes", "Mean seconds of a request in each phase.", "s",
                       *((f"{_rate(f'vllm:request_{phase}_time_seconds_sum')} / "
                          f"{_rate(f'vllm:request_{phase}_time_seconds_count')}", phase)
                         for phase in ("queue", "prefill", "decode")), stacked=True),
                _lines("Burn of the latency budgets", "1 uses the allowed share of late requests up exactly.", "none",
                       *((f"max (tokenmill:{goal}_burn:{window}{_GOALS})", f"{goal} {window.removeprefix('rate')}")
                         for goal in ("ttft", "tpot") for window in ("rate5m", "rate1h"))),
            ],
        ),
        (
            "Tokens",
            [
                _lines("Throughput", "Tokens per second.", "none",
                       (_rate("vllm:prompt_tokens_total"), "prompt"), (_rate(generated), "generated")),
                _lines("Prompt tokens, by source", "Computed here, or found in the cache.", "none",
                       (_rate("vllm:prompt_tokens_by_source_total", "source"), "{{source}}"), stacked=True),
                _lines("Tokens per step", "Mean size of a step, and what only fills it up.", "none",
                       (f"{_rate('vllm:iteration_tokens_total_sum')} / {_rate('vllm:iteration_tokens_total_count')}",
                        "computed"),
                       (f"{_rate('tokenmill:padded_tokens_total')} / {_rate('tokenmill:engine_steps_total')}",
                        "padding")),
                _heatmap("Length of prompts", "Tokens.", "none", "vllm:request_prompt_tokens"),
                _heatmap("Length of answers", "Tokens.", "none", "vllm:request_generation_tokens"),
                _heatmap("Prompt tokens computed", "What the cache did not have.", "none",
                         "vllm:request_prefill_kv_computed_tokens"),
            ],
        ),
        (
            "KV cache",
            [
                _lines("Blocks held", "By requests.", "percentunit",
                       (f"vllm:kv_cache_usage_perc{_ALL}", "{{instance}}")),
                _lines("Time to exhaustion", "At the rate of the last ten minutes; nothing while it falls.", "s",
                       (f"(1 - vllm:kv_cache_usage_perc{_ALL}) / (deriv(vllm:kv_cache_usage_perc{_ALL}[10m]) > 0)",
                        "{{instance}}")),
                _lines("Reusable blocks", "That nobody holds and that a prompt can hit.", "none",
                       (f"tokenmill:kv_blocks_reusable{_ALL}", "{{instance}}")),
                _lines("Prefix hits", "Share of the prompt tokens that the cache gave.", "percentunit",
                       (f"{_rate('vllm:prefix_cache_hits_total')} / {_rate('vllm:prefix_cache_queries_total')}",
                        "now"),
                       (f"max (tokenmill:prefix_hit_ratio:rate30m{_GOALS} offset 1d)", "yesterday")),
                _lines("Misses, by reason", "Why prompt tokens were not in the cache.", "none",
                       (_rate("tokenmill:prefix_cache_miss_tokens_total", "reason"), "{{reason}}"), stacked=True),
                _lines("Recompute tax", "Tokens computed again, per prompt token.", "percentunit",
                       (f"{_rate('tokenmill:recompute_tokens_total', 'cause')} / on () group_left () "
                        f"{_rate('vllm:prompt_tokens_total')}", "{{cause}}")),
                _lines("Preemptions", "Running requests that lost their memory, per second.", "none",
                       (_rate("vllm:num_preemptions_total", "instance"), "{{instance}}")),
                _lines("Size", "Blocks of each replica.", "none",
                       (f"sum by (instance, num_gpu_blocks, block_size) (vllm:cache_config_info{_ALL})",
                        "{{instance}}: {{num_gpu_blocks}} blocks of {{block_size}}")),
            ],
        ),
        (
            "Replicas",
            [
                _lines("Time since the last progress", "0 while there is nothing to do.", "s",
                       (f"tokenmill:last_progress_seconds{_ALL}", "{{instance}}")),
                _lines("Latest step", "How long it took.", "s",
                       (f"tokenmill:last_step_seconds{_ALL}", "{{instance}}")),
                _lines("State", "Engine up, and draining.", "none",
                       (f"tokenmill:engine_up{_JOB}", "{{instance}} up"),
                       (f"tokenmill:draining{_JOB}", "{{instance}} draining")),
                _lines("Engine restarts, by replica", "After a crash, per hour.", "none",
                       (f"increase(tokenmill:engine_restarts_total{_JOB}[1h])", "{{instance}}")),
                _lines("Start", "From the process's start to ready.", "s",
                       (f"tokenmill:start_seconds{_JOB}", "{{instance}}")),
                _lines("Memory of the server process", "Resident; the engine is a process of its own.", "bytes",
                       (f"process_resident_memory_bytes{_JOB}", "{{instance}}")),
                _lines("CPU of the server process", "Cores.", "none",
                       (f"rate(process_cpu_seconds_total{_JOB}[$__rate_interval])", "{{instance}}")),
            ],
        ),
        (
            "Cost",
            [
                _lines("Dollars per hour", "From the configured price.", "currencyUSD",
                       (f"3600 * {_rate('tokenmill:cost_dollars_total', labels=_JOB)}", "cost")),
                _lines("Dollars per million generated tokens", "Over an hour.", "currencyUSD",
                       (per_million.replace("{0}", _JOB).replace("{1}", generated), "cost")),
                _lines("Dollars per thousand requests within the goals", "What good answers cost.", "currencyUSD",
                       (f"1e3 * sum (increase(tokenmill:cost_dollars_total{_JOB}[1h])) / "
                        f"sum (increase(tokenmill:goodput_requests_total{_GOOD}[1h]))", "cost")),
            ],
        ),
    ]  # fmt: skip


def _laid_out(rows: list[tuple[str, list[Panel]]]) -> list[Panel]:
    """Rows and panels with their places and ids, left to right and downwards."""
    placed: list[Panel] = []
    y = 0
    for title, panels in rows:
        placed.append({"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": _at(0, y, 24, 1)})
        y, x, height = y + 1, 0, 0
        for panel in panels:
            width, tall = panel["gridPos"]["w"], panel["gridPos"]["h"]
            if x + width > _WIDTH:
                x, y = 0, y + height
            placed.append(panel | {"gridPos": _at(x, y, width, tall)})
            x, height = x + width, tall
        y += height
    return [panel | {"id": number} for number, panel in enumerate(placed, 1)]


def _at(x: int, y: int, w: int, h: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": w, "h": h}


def _variable(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": _DATASOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "sort": 1,
    }


def dashboard() -> dict[str, Any]:
    """The dashboard in Grafana's JSON model."""
    source = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "current": {}}
    running = "vllm:num_requests_running"
    return {
        "uid": "tokenmill",
        "title": "tokenmill",
        "description": "Requests, latency, tokens, KV cache, replicas and cost of tokenmill servers.",
        "tags": ["tokenmill", "llm"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "links": [],
        "templating": {
            "list": [
                source,
                _variable("job", "Deployment", f"label_values({running}, job)"),
                _variable("model", "Model", f'label_values({running}{{job=~"$job"}}, model_name)'),
                _variable("instance", "Replica", f'label_values({running}{{job=~"$job"}}, instance)'),
            ]
        },
        "panels": _laid_out(_rows()),
    }


def text() -> str:
    """What the file holds."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
