"""What cannot go on is told in the cluster's or the stage's own words, with the right exit code, and soon."""

from __future__ import annotations

import pytest

from rlhf.errors import ConflictError, PrerequisiteError, UnavailableError
from tests.e2e.place import Place

pytestmark = pytest.mark.timeout(600)

PPO_NEEDS_SFT = "rlhf: ppo needs sft: /runs/demo/sft/final does not exist; run `make deploy-sft` first"
MORE_THAN_ANY_NODE_HAS = "999"


def test_ppo_before_sft_fails_soon_and_says_what_to_run_first(empty_place: Place) -> None:
    ended = empty_place.deploy("ppo", "--wait")
    assert ended.code == PrerequisiteError.exit_code
    assert PPO_NEEDS_SFT in ended.verdict
    assert ended.seconds < 30
    # Not tried again, and shown by kubectl, too.
    (pod,) = empty_place.pods("rlhf-ppo")
    assert PPO_NEEDS_SFT in empty_place.kubectl("describe", "pod", pod["metadata"]["name"])
    (failed,) = (c for c in empty_place.get("job", "rlhf-ppo")["status"]["conditions"] if c["type"] == "Failed")
    assert failed["reason"] == "PodFailurePolicy"


def test_gpus_that_no_node_has_are_told_in_the_schedulers_words(empty_place: Place) -> None:
    ended = empty_place.deploy("ppo", "--gpus", MORE_THAN_ANY_NODE_HAS, "--wait", "--stuck-after", "10")
    assert ended.code == UnavailableError.exit_code
    assert "Insufficient nvidia.com/gpu" in ended.verdict
    assert f"nvidia.com/gpu: {MORE_THAN_ANY_NODE_HAS}" in ended.verdict


def test_a_job_at_work_is_not_replaced_unasked(empty_place: Place) -> None:
    waiting = empty_place.deploy("sft", "--gpus", MORE_THAN_ANY_NODE_HAS)
    assert waiting.code == 0, waiting.err
    before = empty_place.get("job", "rlhf-sft")["metadata"]["uid"]
    refused = empty_place.deploy("sft", "--wait")
    assert refused.code == ConflictError.exit_code
    assert "--replace" in refused.verdict
    assert empty_place.get("job", "rlhf-sft")["metadata"]["uid"] == before
    assert empty_place.deploy("sft", "--replace", "--wait").code == PrerequisiteError.exit_code
    assert empty_place.get("job", "rlhf-sft")["metadata"]["uid"] != before


def test_an_image_that_is_nowhere_is_named(empty_place: Place) -> None:
    image = "rlhf-summarizer:no-such-version"
    ended = empty_place.deploy("fetch", "--image", image, "--wait", "--stuck-after", "10")
    assert ended.code == UnavailableError.exit_code
    assert "ErrImagePull" in ended.verdict or "ImagePullBackOff" in ended.verdict
    assert image in ended.verdict


def test_settings_that_make_no_sense_fail_without_a_job(empty_place: Place) -> None:
    ended = empty_place.deploy("reward", "--set", "reward.epoch=2", "--wait")
    assert ended.code == 78
    assert "did you mean reward.epochs?" in ended.verdict
    assert "rlhf-reward" not in empty_place.kubectl("get", "jobs", "--output", "name")
