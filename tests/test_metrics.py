"""What Prometheus reads."""

import re
import threading

from prometheus_client.parser import text_string_to_metric_families

import app.metrics
from app.metrics import INFO_LABELS, Metrics
from app.schemas import ModelInfo


def ppo(**changed: object) -> ModelInfo:
    fields: dict = {
        "id": "ppo",
        "run": "demo",
        "stage": "ppo",
        "step": 40,
        "prompt_version": "1",
        "parameters": 12,
        "dtype": "float32",
        "device": "cpu",
        "checksum": "ab",
        "engine": "builtin",
        "max_prompt_tokens": 100,
        "max_new_tokens": 48,
    }
    return ModelInfo(**(fields | changed))


def filled() -> Metrics:
    """Every method called once."""
    metrics = Metrics()
    metrics.set_running("ppo", 3)
    metrics.set_waiting("reward", 7)
    metrics.left_queue("ppo", 0.02)
    metrics.first_token("ppo", 0.3)
    metrics.step("ppo", 5)
    metrics.summary_finished("ppo", "stop", prompt_tokens=90, generation_tokens=21)
    metrics.batch_scored(4, 400)
    metrics.summary_scored("ppo", -0.7)
    metrics.refused("queue-full")
    metrics.abandoned()
    metrics.answered("/summarize", 200, 1.2)
    metrics.serving([ppo()])
    metrics.reloaded("failed")
    return metrics


def samples(metrics: Metrics) -> dict[str, float]:
    """Each sample as Prometheus' own parser reads it, as name{label=value,…}, labels in order."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def test_each_fact_becomes_its_number() -> None:
    found = samples(filled())
    expected = {
        "rlhf_num_requests_running{model=ppo}": 3,
        "rlhf_num_requests_waiting{model=reward}": 7,
        "rlhf_request_queue_time_seconds_sum{model=ppo}": 0.02,
        "rlhf_time_to_first_token_seconds_bucket{le=0.25,model=ppo}": 0,
        "rlhf_time_to_first_token_seconds_bucket{le=0.5,model=ppo}": 1,
        "rlhf_iteration_batch_size_bucket{le=4.0,model=ppo}": 0,
        "rlhf_iteration_batch_size_bucket{le=8.0,model=ppo}": 1,
        "rlhf_prompt_tokens_total{model=ppo}": 90,
        "rlhf_prompt_tokens_total{model=reward}": 400,
        "rlhf_generation_tokens_total{model=ppo}": 21,
        "rlhf_request_prompt_tokens_sum{model=ppo}": 90,
        "rlhf_request_generation_tokens_sum{model=ppo}": 21,
        "rlhf_request_success_total{finished_reason=stop,model=ppo}": 1,
        "rlhf_scoring_batch_size_sum{}": 4,
        "rlhf_reward_bucket{le=-1.0,model=ppo}": 0,
        "rlhf_reward_bucket{le=-0.5,model=ppo}": 1,
        "rlhf_requests_refused_total{reason=queue-full}": 1,
        "rlhf_requests_abandoned_total{}": 1,
        "rlhf_http_requests_total{route=/summarize,status=200}": 1,
        "rlhf_e2e_request_latency_seconds_sum{route=/summarize}": 1.2,
        "rlhf_reloads_total{result=failed}": 1,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert found["process_resident_memory_bytes{}"] > 1e6


def test_a_reload_replaces_the_models_that_are_named() -> None:
    metrics = Metrics()
    metrics.serving([ppo(step=40), ppo(id="reward", stage="reward", engine=None)])
    metrics.serving([ppo(step=80), ppo(id="reward", stage="reward", engine=None)])
    named = [name for name in samples(metrics) if name.startswith("rlhf_model_info")]
    assert {re.search(r"model=(\w+).*step=(\d+)", name).groups() for name in named} == {
        ("ppo", "80"),
        ("reward", "40"),
    }


def test_two_services_in_one_process_do_not_share_numbers() -> None:
    first, second = Metrics(), Metrics()
    first.abandoned()
    assert samples(second)["rlhf_requests_abandoned_total{}"] == 0


def test_threads_lose_no_count() -> None:
    metrics = Metrics()

    def count() -> None:
        for _ in range(2000):
            metrics.refused("queue-full")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert samples(metrics)["rlhf_requests_refused_total{reason=queue-full}"] == 8000


def test_the_table_names_every_metric_and_its_labels() -> None:
    table = dict(re.findall(r"^\| (rlhf_\w+) \| ([\w, …]*) ?\|", app.metrics.__doc__ or "", flags=re.MULTILINE))
    told = {name: {label.strip() for label in labels.split(",")} for name, labels in table.items()}
    real = {}
    for family in text_string_to_metric_families(filled().render().decode()):
        if family.name.startswith("rlhf_") and not family.name.endswith("_created"):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            real[name] = set(family.samples[0].labels) - {"le"} or {""}
    real["rlhf_model_info"] = {*INFO_LABELS[:4], "…"}
    assert told == real
