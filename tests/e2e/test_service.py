"""The service on the run that the Jobs made: answers, a rolling restart under load, and a stop that loses nothing."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import PrerequisiteError
from tests.e2e.place import Ended, Object, Place, until

pytestmark = pytest.mark.timeout(900)

HERE = Path(__file__).parent
CALLERS = "4"
POST = {"subreddit": "pets", "title": "my cat", "body": "i lost my cat on saturday. now i feel guilty."}


@contextmanager
def forwarded(place: Place, target: str) -> Iterator[str]:
    """An address on this machine that kubectl forwards to port 8000 of a Service or a pod."""
    command = ["kubectl", "--namespace", place.namespace, "port-forward", target, ":8000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=place.environment) as forwarding:
        assert forwarding.stdout is not None
        try:
            said = forwarding.stdout.readline()
            found = re.search(r"127\.0\.0\.1:\d+", said)
            assert found, said
            yield f"http://{found[0]}"
        finally:
            forwarding.terminate()


def asked(address: str, body: Object | None = None) -> Any:
    """What is answered to a GET, or to a POST of a body; anything but 2xx raises HTTPError."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        text = answer.read().decode()
        return json.loads(text) if "json" in answer.headers["Content-Type"] else text


def serving(place: Place) -> list[Object]:
    """The service's pods, oldest first, without those that leave."""
    listed = place.get("pods", "--selector", "app.kubernetes.io/component=api")["items"]
    staying = [pod for pod in listed if "deletionTimestamp" not in pod["metadata"]]
    return sorted(staying, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))


def test_summaries_and_scores_through_the_service(place: Place, service: Ended) -> None:
    with forwarded(place, "service/rlhf-api") as address:
        told = asked(f"{address}/summarize", {"posts": [POST, POST]})
        assert (told["model"], told["run"], told["step"]) == ("ppo", "demo", 16)
        first, second = told["results"]
        assert first["summary"] == second["summary"]
        assert first["completion_tokens"] > 0
        scored = asked(f"{address}/score", {"items": [{"post": POST, "summary": first["summary"]}]})
        assert scored["results"][0]["score"] == pytest.approx(first["score"], abs=1e-4)
        assert asked(f"{address}/readyz")["status"] == "ok"


def test_status_names_its_address(place: Place, service: Ended) -> None:
    shown = place.rlhf("cluster-status").out
    assert f"api: 1 of 1 pods ready, http://rlhf-api.{place.namespace}.svc:8000 in the cluster" in shown


def test_the_pod_may_do_nothing_but_its_work(place: Place, service: Ended) -> None:
    facts = json.loads(place.in_pod(serving(place)[0]["metadata"]["name"], HERE / "inside.py"))
    assert facts["writes"] == ["/tmp"]
    assert (facts["user"], facts["first process"], facts["token"]) == (10001, "/usr/bin/tini", False)
    assert (facts["capabilities"], facts["no new privileges"], facts["system calls filtered"]) == (0, True, True)


def test_a_rolling_restart_under_load_loses_no_request(place: Place, service: Ended) -> None:
    (before,) = (pod["metadata"]["name"] for pod in serving(place))
    script = (HERE / "caller.py").read_text(encoding="utf-8")
    address = f"http://rlhf-api.{place.namespace}.svc:8000"
    command = ["kubectl", "--namespace", place.namespace, "exec", "-i", "rlhf-caller", "--"]
    with subprocess.Popen(
        [*command, "python", "-c", script, address, CALLERS],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=place.environment,
    ) as calling:  # fmt: skip
        assert calling.stdout is not None
        assert calling.stdout.readline() == "calling\n"
        place.kubectl("rollout", "restart", "deployment/rlhf-api")
        place.kubectl("rollout", "status", "deployment/rlhf-api", "--timeout=300s")
        place.kubectl("wait", "--for=delete", f"pod/{before}", "--timeout=120s")
        out, _ = calling.communicate(timeout=60)
    counts = json.loads(out)
    print(counts)
    assert list(counts["fresh"]) == ["good"]
    # A connection that is kept leads to the old pod until that leaves; its caller is told to ask again, once.
    assert counts["kept"].pop("asked again", 0) <= int(CALLERS) // 2
    assert list(counts["kept"]) == ["good"]
    assert min(counts["fresh"]["good"], counts["kept"]["good"]) > 100
    assert before not in [pod["metadata"]["name"] for pod in serving(place)]


def test_sigterm_finishes_what_was_accepted(place: Place, service: Ended) -> None:
    pod = serving(place)[-1]["metadata"]["name"]
    long_work = {"posts": [{**POST, "title": f"my cat {number}"} for number in range(64)], "best_of": 8}
    answers: list[Any] = []
    with forwarded(place, f"pod/{pod}") as address:
        caller = threading.Thread(target=lambda: answers.append(asked(f"{address}/summarize", long_work)))
        caller.start()
        until(
            lambda: re.search(r"^rlhf_num_requests_waiting\{.*\} [1-9]", asked(f"{address}/metrics"), re.M), what="work"
        )
        place.kubectl("exec", pod, "--", "python", "-c", "import os; os.kill(1, 15)")
        caller.join(60)
    assert len(answers[0]["results"]) == 64
    (status,) = until(lambda: restarted(place, pod), what="restarted container")
    assert status["lastState"]["terminated"]["exitCode"] == 0
    said = place.kubectl("logs", pod, "--previous")
    messages = [json.loads(line)["message"] for line in said.splitlines()]
    assert any(message.startswith("SIGTERM: finishing what was accepted") for message in messages)
    assert not any("requests lost" in message for message in messages)
    place.kubectl("wait", "--for=condition=Ready", f"pod/{pod}", "--timeout=180s")


def restarted(place: Place, pod: str) -> list[Object]:
    """The statuses of a pod's containers that have been started again."""
    return [each for each in place.get("pod", pod)["status"]["containerStatuses"] if each["restartCount"]]


def test_a_run_deployed_beside_it_does_not_reach_its_pods(place: Place, service: Ended) -> None:
    assert place.deploy("ppo", "--run", "another", "--wait").code == PrerequisiteError.exit_code
    (pod,) = (pod["metadata"]["name"] for pod in serving(place))
    place.kubectl("delete", "pod", pod)
    place.kubectl("rollout", "status", "deployment/rlhf-api", "--timeout=180s")
    with forwarded(place, "service/rlhf-api") as address:
        assert {model["run"] for model in asked(f"{address}/v1/models")["models"]} == {"demo"}
