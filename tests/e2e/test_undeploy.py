"""`undeploy` takes everything away but the volume, on which a later deployment finds what was done."""

from __future__ import annotations

import pytest

from tests.e2e.place import Ended, Place

pytestmark = pytest.mark.timeout(900)


def test_the_volume_stays_and_is_found_again(place: Place, service: Ended) -> None:
    before = place.get("pvc", "rlhf-runs")
    ended = place.rlhf("undeploy")
    assert ended.code == 0, ended.err
    assert "the volume stays" in ended.err
    ours = ("--selector", "app.kubernetes.io/part-of=rlhf-summarizer", "--output", "name")
    left = place.kubectl("get", "jobs,deployments,services,configmaps,networkpolicies,serviceaccounts,pdb", *ours)
    assert left == ""
    after = place.get("pvc", "rlhf-runs")
    assert (after["metadata"]["uid"], after["status"]["phase"]) == (before["metadata"]["uid"], "Bound")
    assert "deletionTimestamp" not in after["metadata"]

    again = place.deploy("evaluate", "--follow")
    assert again.code == 0, again.err
    assert "stage=evaluate is already done" in again.out
