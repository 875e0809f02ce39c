"""What gateway and worker show of themselves, after traffic: metrics with bounded labels, health, traces."""

import re
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from api.operator.figures import PROBLEMS
from fabric.amqp.publisher import Fate
from fabric.command import State, Verdict
from fabric.identity.meters import Meter
from fabric.identity.revocation import Ending
from fabric.measures import Promise
from fabric.model import AFTER_REVOCATION
from fabric.sql import fold
from tests.harness.stack import RunningStack, eventually
from topology import names

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "deploy" / "compose" / "alerts.yml"
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
QUESTIONS = {"user", "vhost", "resource", "topic"}


class Traffic:
    """An agent that has run a command, and devices that have none."""

    def __init__(self, stack: RunningStack, home: Path) -> None:
        handlers = home / "commands.d"
        handlers.mkdir(parents=True, mode=0o755)
        show = handlers / "trace.show"
        show.write_text('#!/bin/sh\nprintf "%s" "$TRACEPARENT"\n')
        show.chmod(0o755)
        with stack.agent(home / "device") as agent:
            agent.start("--commands-dir", str(handlers))
            headers = {"Prefer": "wait=30", "traceparent": TRACE}
            path = f"/v1/devices/{agent.id}/commands"
            self.traced = stack.ok(stack.http.post(path, json={"name": "trace.show"}, headers=headers))
        self.ids = [agent.id, *(stack.create_device("idle")[0] for _ in range(5))]
        for id in self.ids[1:]:
            self.expired = stack.send(id, "note", {"text": "x"}, ttl=0.2, wait=30)
            stack.ok(stack.http.post(f"/v1/devices/{id}/revoke"))
            stack.http.get(f"/v1/devices/{id}/nonsense")
        stack.http.put(f"/v1/devices/{self.ids[1]}", json={})


@pytest.fixture(scope="module")
def traffic(stack: RunningStack, tmp_path_factory: pytest.TempPathFactory) -> Traffic:
    return Traffic(stack, tmp_path_factory.mktemp("metrics"))


def inside(stack: RunningStack, who: str, path: str) -> httpx.Response:
    settings = stack.stack.settings
    port = {"gateway": settings.auth_port, "worker": settings.worker_port}[who]
    return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=30)


def shown(stack: RunningStack, who: str) -> dict[str, Metric]:
    answer = inside(stack, who, "/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {family.name: family for family in text_string_to_metric_families(answer.text)}


def value(families: dict[str, Metric], family: str, suffix: str = "", **labels: str) -> float:
    found = [
        sample.value
        for sample in families[family].samples
        if sample.name == family + suffix and labels.items() <= sample.labels.items()
    ]
    assert found, (family, labels)
    return sum(found)


def test_a_trace_goes_to_the_handler_and_back(traffic: Traffic) -> None:
    assert traffic.traced["traceparent"] == TRACE
    assert traffic.traced["outcome"] == {
        "status": "succeeded",
        "reason": None,
        "content_type": "text/plain; charset=utf-8",
        "result": {"base64": "MDAtNGJmOTJmMzU3N2IzNGRhNmEzY2U5MjlkMGUwZTQ3MzYtMDBmMDY3YWEwYmE5MDJiNy0wMQ=="},
    }


def test_they_tell_what_happened(stack: RunningStack, traffic: Traffic) -> None:
    gateway = shown(stack, "gateway")
    assert value(gateway, "restante_command_state_seconds", "_count", state="accepted") >= 6
    assert value(gateway, "restante_publish_seconds", "_count", fate="confirmed") >= 6
    assert value(gateway, "restante_round_trip_seconds", "_count") >= 6
    assert value(gateway, "restante_broker_auth_seconds", "_count", question="user", answer="allow") >= 1
    assert value(gateway, "restante_revocation_seconds", "_count") >= 5
    revoke = "/v1/devices/{id}/revoke"
    assert value(gateway, "restante_http_request_seconds", "_count", method="POST", route=revoke, status="2xx") >= 5
    assert value(gateway, "restante_http_request_seconds", "_count", method="other", route="other", status="4xx") >= 6
    assert value(gateway, "restante_certificate_expiry_timestamp_seconds") > 1e9
    worker = shown(stack, "worker")
    assert value(worker, "restante_deadline_lateness_seconds", "_count", promise="deadline") >= 5
    assert value(worker, "restante_command_state_seconds", "_count", state="expired") >= 5
    assert value(worker, "restante_uplink_taken", "_total", queue=names.REPORTS, kind="outcome") >= 1
    assert value(worker, "restante_events_published") > 0
    for who in ("gateway", "worker"):
        eventually(lambda: value(shown(stack, who), "restante_problem") == 0, f"a {who} without problems")  # noqa: B023
    for families in (gateway, worker):
        assert value(families, "restante_event_loop_lag_seconds", "_count") > 0
        assert value(families, "process_resident_memory_bytes") > 0


def test_labels_are_bounded_and_name_nobody(stack: RunningStack, traffic: Traffic) -> None:
    routes = set(stack.ok(stack.http.get("/openapi.json"))["paths"])
    reasons = {"flood", "sender", "undecodable", AFTER_REVOCATION, fold.UNKNOWN_COMMAND, fold.OTHER_DEVICE}
    allowed: dict[str, set[str]] = {
        "state": set(State),
        "promise": set(Promise),
        "fate": set(Fate),
        "ending": set(Ending),
        "meter": set(Meter),
        "question": QUESTIONS,
        "answer": {"allow", "deny"},
        "method": {"GET", "POST", "PUT", "PATCH", "DELETE", "other"},
        "route": routes | {"other"},
        "status": {f"{n}xx" for n in range(1, 6)} | {"other"},
        "queue": {names.REPORTS, names.CLAIMS, names.RETURNED},
        "kind": {"receipt", "outcome", "claim", "hello"},
        "reason": reasons | {fold.OTHER_GENERATION} | {verdict.name.lower() for verdict in Verdict},
        "stage": {"unsequenced", "unpublished"},
        "problem": set(PROBLEMS),
        "certificate": {"authority", "api", "broker"},
    }
    for who in ("gateway", "worker"):
        for family in shown(stack, who).values():
            for sample in family.samples:
                for label, given in sample.labels.items():
                    assert label == "le" or given in allowed[label], (sample.name, label, given)
        text = inside(stack, who, "/metrics").text
        assert not [id for id in (*traffic.ids, traffic.traced["id"], traffic.expired["id"]) if id in text]


def test_no_public_listener_has_them(stack: RunningStack) -> None:
    assert stack.http.get("/metrics").status_code == 404


def test_worker_and_gateway_say_inside_how_they_are(stack: RunningStack) -> None:
    for who in ("worker", "gateway"):
        assert inside(stack, who, "/health/live").json() == {"status": "ok"}
        eventually(lambda who=who: inside(stack, who, "/health/ready").status_code == 200, f"a {who} that is ready")
        assert inside(stack, who, "/").status_code == 404
    answer = httpx.post(f"http://127.0.0.1:{stack.stack.settings.worker_port}/metrics")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET")


def test_alerts_are_about_metrics_that_there_are_and_have_a_runbook(stack: RunningStack, traffic: Traffic) -> None:
    broker = stack.stack.broker
    assert broker is not None
    theirs = httpx.get(f"http://127.0.0.1:{broker.prometheus_port}/metrics", timeout=30).text
    texts = [theirs, *(inside(stack, who, "/metrics").text for who in ("gateway", "worker"))]
    there = {"up", *(line.partition("{")[0].partition(" ")[0] for text in texts for line in text.splitlines())}
    # A histogram or counter that nothing was counted in yet has its name only.
    there |= {f"{each}_bucket" for each in there} | {f"{each}_count" for each in there}
    there |= {line.split()[2] for text in texts for line in text.splitlines() if line.startswith("# HELP ")}
    runbook = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    rules = [rule for group in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]]
    assert len(rules) > 10
    for rule in rules:
        named = set(re.findall(r"\b(?:up|(?:restante|rabbitmq|process)_[a-z_]+)\b", rule["expr"]))
        assert named, rule
        assert named <= there, (rule["alert"], named - there)
        assert f"\n### {rule['alert']}\n" in runbook, rule["alert"]
