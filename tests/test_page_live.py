"""The page in Chromium, on the real service with tiny models."""

from __future__ import annotations

import re
from pathlib import Path

from playwright.sync_api import expect

from tests.browser import Visitor, launched_browser
from tests.served_run import served_run
from tests.serving import serving_run


def test_summaries_candidates_a_score_and_an_error(tmp_path: Path) -> None:
    number = re.compile(r"^[+−]\d+\.\d\d$")
    with (
        serving_run(served_run(tmp_path)) as serving,
        launched_browser() as browser,
        Visitor(browser, serving.url, {422}) as visitor,
    ):
        page = visitor.visit("/")
        expect(page.locator("#status[data-state=ready]")).to_be_visible()
        page.get_by_label("Post", exact=True).fill("I lost my cat")
        page.get_by_role("button", name="Summarise").click()
        for policy in ("sft", "ppo"):
            expect(page.locator(f"[data-policy={policy}] .number")).to_have_text(number)
        page.get_by_role("button", name="Draw").click()
        expect(page.locator(".candidate .number")).to_have_text([number] * 4)
        page.get_by_label("Your summary of the post").fill("cat lost")
        page.get_by_role("button", name="Score", exact=True).click()
        expect(page.locator("#own .number")).to_have_text(number)
        expect(page.locator("#delta")).to_contain_text("PPO")
        page.get_by_label("Post", exact=True).fill(" ")
        page.get_by_role("button", name="Summarise").click()
        expect(page.locator("#post-form [role=alert]")).to_be_visible()
