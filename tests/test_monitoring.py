"""deployment/monitoring: rules and dashboard use metrics that the server has, and their tools accept them."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml

from deployment.server.processes import free_ports, started

FOLDER = Path(__file__).parents[1] / "deployment" / "monitoring"
RULES = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
QUERIES = [target["expr"].replace("$__rate_interval", "1m") for p in DASHBOARD["panels"] for target in p["targets"]]
GRAFANA = "grafana-foundation-sdk==1769699379!11.6.0"  # Grafana's own model of a dashboard

ROUND_TRIP = """
import json, sys
from grafana_foundation_sdk.cog import encoder, plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

plugins.register_default_plugins()
print(encoder.JSONEncoder().encode(Dashboard.from_json(json.load(sys.stdin))))
"""

# As `promtool test rules` takes it: which alerts fire of which series.
RULE_TEST = """
rule_files: [{rules}]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {{series: 'up{{job="fastunet", instance="a"}}', values: '1x5 0x30'}}
      - {{series: 'ts_inference_requests_total', values: '0+60x40'}}
      - {{series: 'inference_seconds_count', values: '0+60x20 1200x20'}}
      - {{series: 'inference_seconds_bucket{{le="5"}}', values: '0+1x40'}}
      - {{series: 'inference_seconds_bucket{{le="+Inf"}}', values: '0+60x40'}}
      - {{series: 'rejected_inputs{{Reason="OutOfMemory"}}', values: '0+6x40'}}
    alert_rule_test:
      - {{eval_time: 4m, alertname: ServerDown}}
      - {{eval_time: 10m, alertname: ServerDown, exp_alerts: [{{
          exp_labels: {{severity: page, job: fastunet, instance: a}},
          exp_annotations: {{summary: a does not answer}}}}]}}
      - {{eval_time: 15m, alertname: NoAnswers}}
      - {{eval_time: 35m, alertname: NoAnswers, exp_alerts: [{{exp_labels: {{severity: page}},
          exp_annotations: {{summary: "Requests come in, and no worker computes any"}}}}]}}
      - {{eval_time: 30m, alertname: ServerErrors, exp_alerts: [{{exp_labels: {{severity: page, Reason: OutOfMemory}},
          exp_annotations: {{summary: "Photos fail for a fault of the server: OutOfMemory; its log says why"}}}}]}}
      - {{eval_time: 30m, alertname: ManyRejected, exp_alerts: [{{exp_labels: {{severity: ticket}},
          exp_annotations: {{summary: "10% as many errors as requests: somebody sends what is no photo"}}}}]}}
      - {{eval_time: 35m, alertname: SlowInference, exp_alerts: [{{exp_labels: {{severity: ticket}},
          exp_annotations: {{summary: "One pass of the model in twenty takes 5s or longer"}}}}]}}
"""


def tool(name: str) -> str:
    return shutil.which(name) or pytest.fail(f"{name} is needed: apt-get install --no-install-recommends prometheus")


def metrics(ports: dict) -> str:
    return httpx.get(f"http://127.0.0.1:{ports['metrics_port']}/metrics").text


def test_rules_and_dashboard_use_metrics_that_the_server_has(client, ports, photo):
    client.post("/predictions/fastunet", content=photo)
    client.post("/predictions/fastunet", content=b"no photo")
    there = set(re.findall(r"^(\w+)\{", metrics(ports), re.MULTILINE)) | {"up"}
    for query in QUERIES + [rule["expr"] for rule in RULES]:
        used = set(re.findall(r"\b(\w+_(?:total|sum|count|bucket|inputs)|up)\b(?=[{\[])", query))
        assert used and used <= there, f"{used - there} in {query}"


@pytest.mark.image
def test_rules_fire_when_they_should(tmp_path):
    (tmp_path / "test.yaml").write_text(RULE_TEST.format(rules=FOLDER / "alerts.yaml"))
    subprocess.run([tool("promtool"), "test", "rules", tmp_path / "test.yaml"], check=True)
    subprocess.run([tool("promtool"), "check", "config", FOLDER / "prometheus.yaml"], check=True)


@pytest.mark.image
def test_the_dashboard_is_what_grafana_reads():
    """Read by Grafana's own classes and written again, nothing of it is lost or changed."""
    uv = [shutil.which("uv")] if shutil.which("uv") else [sys.executable, "-m", "uv"]
    command = [*uv, "run", "--quiet", "--no-project", "--isolated", "--with", GRAFANA, "python", "-c", ROUND_TRIP]
    run = subprocess.run(command, input=json.dumps(DASHBOARD), capture_output=True, text=True, check=True)

    def kept(ours, theirs) -> bool:
        if isinstance(ours, dict):
            return all(key in theirs and kept(value, theirs[key]) for key, value in ours.items())
        if isinstance(ours, list):
            return len(ours) == len(theirs) and all(map(kept, ours, theirs))
        return ours == theirs

    assert kept(DASHBOARD, json.loads(run.stdout))


@pytest.mark.image
def test_prometheus_answers_every_query_of_the_dashboard(client, ports, photo, tmp_path):
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    config["global"]["scrape_interval"] = config["global"]["evaluation_interval"] = "1s"
    config["rule_files"] = [str(FOLDER / "alerts.yaml")]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{ports['metrics_port']}"]
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    [port] = free_ports(1)
    argv = [tool("prometheus"), f"--config.file={tmp_path / 'prometheus.yaml'}", f"--storage.tsdb.path={tmp_path}"]
    with started([*argv, f"--web.listen-address=127.0.0.1:{port}"], None, stderr=subprocess.DEVNULL):
        for _ in range(15):
            client.post("/predictions/fastunet", content=photo)
            client.post("/predictions/fastunet", content=b"no photo")
            time.sleep(0.5)
        url = f"http://127.0.0.1:{port}/api/v1"
        for query in QUERIES:
            result = httpx.get(f"{url}/query", params={"query": query}).json()["data"]["result"]
            assert result and float(result[0]["value"][1]) >= 0, query
        rules = httpx.get(f"{url}/rules").json()["data"]["groups"][0]["rules"]
        assert [rule["health"] for rule in rules] == ["ok"] * len(RULES)
