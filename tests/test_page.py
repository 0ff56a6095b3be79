"""The pages at `/` and `/docs`, driven in Chromium: what a person does, sees and is told."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from fastapi import FastAPI
from playwright.sync_api import Browser, Page, expect
from starlette.testclient import TestClient

from app.page import CONTENT_SECURITY_POLICY, page_router
from app.schemas import FieldProblem
from tests.browser import Visitor, launched_browser
from tests.conftest import REPOSITORY
from tests.fake_service import DRAWN_SEED, TEXTS, Failure, FakeService, create_fake_app, serve

CONTRASTS = (REPOSITORY / "tests" / "contrasts.js").read_text(encoding="utf-8")
STATIC = REPOSITORY / "app" / "static"
HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
AWKWARD = "It's \"quoted\", $HOME `id` \\n !! 50 %\n\n\tdon't — naïve 日本語 🚲\u2028end\u202e'"

Visit = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched_browser() as browser:
        yield browser


@pytest.fixture
def fake() -> FakeService:
    return FakeService()


@pytest.fixture
def visit(browser: Browser, fake: FakeService) -> Iterator[Visit]:
    with serve(create_fake_app(fake)) as address, Visitor(browser, address, fake.refused) as visitor:

        def visit(path: str = "/", *, ready: bool = True, **options: Any) -> Page:
            page = visitor.visit(path, **options)
            if ready and path == "/":
                expect(page.locator("#status")).to_have_text("Ready: demo")
            return page

        yield visit


def card(page: Page, policy: str) -> dict[str, str]:
    box = page.locator(f"[data-policy={policy}]")
    return {part: box.locator(f".{part}").inner_text() for part in ("text", "number", "meta")}


def fill_post(page: Page, body: str = "my bike got broken", title: str = "my bike") -> None:
    page.get_by_label("Subreddit").fill("legaladvice")
    page.get_by_label("Title").fill(title)
    page.get_by_label("Post", exact=True).fill(body)


def summarize(page: Page) -> None:
    page.get_by_role("button", name="Summarise").click()
    for policy in ("sft", "ppo"):
        expect(page.locator(f"[data-policy={policy}] .number")).not_to_have_text("–")


def draw(page: Page) -> None:
    page.get_by_role("button", name="Draw").click()
    expect(page.locator(".candidate .number").last).not_to_have_text("–")


def copied_line(page: Page, button: str) -> str:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator(button).click()
    expect(page.locator(button)).to_have_attribute("data-said", "Copied")
    return page.evaluate("navigator.clipboard.readText()")


def run_line(line: str, **environment: str) -> dict[str, Any]:
    command = ["bash", "-c", line]
    done = subprocess.run(command, capture_output=True, check=True, env=os.environ | environment, timeout=20)
    return json.loads(done.stdout)


# What the server sends


def test_pages_are_sent_with_strict_headers_and_a_tag() -> None:
    app = FastAPI(docs_url=None, redoc_url=None)
    app.include_router(page_router())
    client = TestClient(app)
    kinds = {"/": "html", "/docs": "html", "/static/page.js": "javascript", "/static/page.css": "css"}
    for path, kind in kinds.items():
        answer = client.get(path)
        assert answer.headers["Content-Security-Policy"] == CONTENT_SECURITY_POLICY
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert answer.headers["Cache-Control"] == "no-cache"
        assert kind in answer.headers["Content-Type"]
        again = client.get(path, headers={"If-None-Match": f'"old", W/{answer.headers["ETag"]}'})
        assert (again.status_code, again.content) == (304, b"")
        assert client.head(path).status_code == 200
    assert "unsafe" not in CONTENT_SECURITY_POLICY
    assert client.get("/static/absent.js").status_code == 404
    assert client.get("/static/..%2Fpage.py").status_code == 404
    assert "/static/{name}" not in app.openapi()["paths"]


@pytest.mark.parametrize("name", ["index.html", "docs.html"])
def test_pages_have_nothing_inline_and_need_only_files_that_are_there(name: str) -> None:
    inline: list[str] = []
    needed: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            given = {key: value or "" for key, value in attrs}
            if tag == "style" or (tag == "script" and "src" not in given):
                inline.append(tag)
            inline.extend(key for key in given if key == "style" or key.startswith("on"))
            needed.extend(given[key] for key in ("src", "href") if given.get(key, "").startswith("static/"))

    Reader().feed((STATIC / name).read_text(encoding="utf-8"))
    assert inline == []
    assert len(needed) >= 4
    assert [path for path in needed if not (STATIC.parent / path).is_file()] == []


# What a person does


def test_both_policies_summarise_an_example_side_by_side(visit: Visit, fake: FakeService) -> None:
    page = visit(viewport={"width": 1280, "height": 900})
    page.get_by_role("button", name="Broken bike").click()
    below = page.get_by_role("heading", name="Draw candidates").bounding_box()
    summarize(page)
    assert card(page, "sft") == {"text": TEXTS["sft"], "number": "−0.38", "meta": "20 tokens, ended by itself."}
    assert card(page, "ppo")["number"] == "+1.33"
    boxes = [page.locator(f"[data-policy={policy}]").bounding_box() for policy in ("sft", "ppo")]
    left, right = (box for box in boxes if box)
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] < right["x"]
    assert page.get_by_role("heading", name="Draw candidates").bounding_box() == below
    assert sorted(request["model"] for request in fake.requests) == ["ppo", "sft"]
    assert fake.requests[0]["posts"][0]["title"] == "my neighbor and the bike"
    assert "SFT’s summary scores −0.38" in page.locator("#spoken").inner_text()


def test_tokens_appear_as_they_come(visit: Visit, fake: FakeService) -> None:
    page = visit()
    fill_post(page)
    fake.held.set()
    page.get_by_role("button", name="Summarise").click()
    expect(page.locator("[data-policy=ppo] .text")).to_have_text("trouble with my")
    expect(page.locator("[data-policy=sft] .text")).to_have_text("so this is")
    assert card(page, "ppo")["number"] == "–"
    fake.held.clear()
    expect(page.locator("[data-policy=ppo] .text")).to_have_text(TEXTS["ppo"])


def test_one_policy_has_the_row_to_itself(visit: Visit, fake: FakeService) -> None:
    fake.served = ("ppo",)
    page = visit()
    fill_post(page)
    page.get_by_role("button", name="Summarise").click()
    expect(page.locator("[data-policy=ppo] .number")).to_have_text("+1.33")
    assert page.locator("[data-policy=sft]").is_hidden()
    assert page.get_by_label("Policy").inner_text() == "PPO"
    assert [request["model"] for request in fake.requests] == ["ppo"]


def test_candidates_are_ranked_by_score(visit: Visit, fake: FakeService) -> None:
    page = visit()
    fill_post(page)
    page.get_by_label("How many").fill("3")
    page.locator("#draw-temperature").fill("0.8")
    draw(page)
    assert page.locator(".candidate .number").all_inner_texts() == ["+1.33", "+0.33", "+0.33"]
    assert page.locator(".candidate .text").first.inner_text() == TEXTS["ppo"]
    assert page.locator(".candidate .meta").first.inner_text() == "Best. 17 tokens, ended by itself."
    width_of = "bars => bars.map((bar) => bar.style.getPropertyValue('--width'))"
    widths = page.locator(".candidate .bar").evaluate_all(width_of)
    assert [round(float(width.removesuffix("%")), 1) for width in widths] == [33.1, 8.2, 8.2]
    sent = {key: fake.requests[0][key] for key in ("best_of", "temperature", "return_candidates", "model")}
    assert sent == {"best_of": 3, "temperature": 0.8, "return_candidates": True, "model": "ppo"}
    assert "seed" not in fake.requests[0]


def test_own_summary_is_compared_with_the_one_by_ppo_of_the_same_post(visit: Visit, fake: FakeService) -> None:
    page = visit()
    fill_post(page)
    page.get_by_label("Your summary").fill("x" * 50)
    page.get_by_role("button", name="Score").click()
    expect(page.locator("#own .number")).to_have_text("+0.50")
    expect(page.locator("#delta")).to_contain_text("Summarise the post as well")
    summarize(page)
    page.get_by_role("button", name="Score").click()
    expect(page.locator("#delta")).to_have_text("0.83 worse than PPO’s +1.33")
    assert fake.requests[-1]["items"][0]["reference"] == TEXTS["ppo"]
    page.get_by_label("Title").fill("another title")
    expect(page.locator("#stale")).to_be_visible()
    page.get_by_role("button", name="Score").click()
    expect(page.locator("#delta")).to_contain_text("Summarise the post as well")
    assert "reference" not in fake.requests[-1]["items"][0]


def test_settings_go_with_the_request(visit: Visit, fake: FakeService) -> None:
    page = visit()
    fill_post(page)
    page.get_by_text("Settings", exact=True).click()
    page.get_by_label("A post that is too long").select_option("error")
    for name, value in (("#temperature", "0.7"), ("#top-p", "0.9"), ("#max-new-tokens", "12"), ("#seed", "5")):
        page.locator(name).fill(value)
    summarize(page)
    sent = {key: fake.requests[0][key] for key in ("truncation", "temperature", "top_p", "max_new_tokens", "seed")}
    assert sent == {"truncation": "error", "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 12, "seed": 5}


def test_a_setting_out_of_range_is_shown_even_when_folded_away(visit: Visit, fake: FakeService) -> None:
    page = visit()
    fill_post(page)
    page.get_by_text("Settings", exact=True).click()
    page.locator("#max-new-tokens").fill("999")
    page.get_by_text("Settings", exact=True).click()
    page.get_by_role("button", name="Draw").click()
    expect(page.locator("#max-new-tokens")).to_be_focused()
    assert fake.requests == []


def test_a_whole_prompt_is_sent_as_it_is(visit: Visit, fake: FakeService) -> None:
    prompt = "SUBREDDIT: r/pets\nTITLE: my cat\nPOST: it left\nTL;DR:"
    page = visit()
    fill_post(page, prompt)
    expect(page.get_by_label("Title")).to_be_disabled()
    summarize(page)
    assert fake.requests[0]["posts"] == [prompt]


def test_cut_tokens_are_told(visit: Visit, fake: FakeService) -> None:
    fake.cut_tokens = 23
    page = visit()
    fill_post(page)
    summarize(page)
    assert "The post was too long: 23 tokens of it left out." in card(page, "sft")["meta"]


def test_an_example_does_not_lose_what_was_typed(visit: Visit) -> None:
    page = visit()
    fill_post(page, "my own words")
    page.get_by_role("button", name="Marathon").click()
    page.get_by_role("button", name="Other cat").click()
    page.get_by_role("button", name="Your text").click()
    expect(page.get_by_label("Post", exact=True)).to_have_value("my own words")


def test_everything_is_done_by_keyboard(visit: Visit, fake: FakeService) -> None:
    page = visit()

    def tab_to(selector: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate(f"document.activeElement.matches({selector!r})"):
                assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
                return
        raise AssertionError(f"Tab does not reach {selector}")

    tab_to(".chip")
    page.keyboard.press("Enter")
    tab_to("#post")
    page.keyboard.press("Control+Enter")
    expect(page.locator("[data-policy=ppo] .number")).to_have_text("+1.33")
    tab_to("#best-of")
    page.keyboard.type("2")  # Tab selects what is there
    page.keyboard.press("Enter")
    expect(page.locator(".candidate .number").last).to_have_text("+0.33")
    tab_to("#summary")
    page.keyboard.type("a bike was broken")
    page.keyboard.press("Meta+Enter")
    expect(page.locator("#own .number")).to_have_text("+0.17")
    fake.held.set()
    tab_to("#score-curl")
    page.keyboard.press("Shift+Tab")
    page.locator("#post").focus()
    page.keyboard.press("Control+Enter")
    expect(page.locator("[data-policy=ppo] .text")).to_have_text("trouble with my")
    page.keyboard.press("Escape")
    expect(page.locator("[data-policy=ppo] .meta")).to_have_text("Cancelled.")


def test_cancel_stops_the_request_and_loses_nothing(visit: Visit, fake: FakeService) -> None:
    fake.held.set()
    page = visit()
    fill_post(page)
    page.get_by_role("button", name="Summarise").click()
    expect(page.locator("[data-policy=sft] .text")).to_have_text("so this is")
    page.locator("#post-form .cancel").click()
    assert fake.abandoned.wait(5)
    expect(page.locator("[data-policy=sft] .meta")).to_have_text("Cancelled.")
    expect(page.get_by_role("button", name="Summarise")).to_be_focused()
    expect(page.get_by_label("Post", exact=True)).to_have_value("my bike got broken")
    assert page.locator("#post-form .problem").is_hidden()
    fake.held.clear()
    summarize(page)


# What a person is told


def test_a_wrong_field_is_shown_beside_it_and_the_input_is_kept(visit: Visit, fake: FakeService) -> None:
    wrong = [("posts.0.title", "must be one line"), ("top_p", "must be above 0"), ("timeout_seconds", "is too long")]
    errors = [FieldProblem(field=name, message=message) for name, message in wrong]
    page = visit()
    fill_post(page)
    fake.failures = [Failure(422, "The request is malformed", "3 fields are wrong", errors) for _ in ("sft", "ppo")]
    page.get_by_role("button", name="Summarise").click()
    alert = page.locator("#post-form [role=alert]")
    expect(alert).to_contain_text("The request is malformed")
    assert alert.inner_text().split("\n")[-2:] == ["timeout_seconds: is too long", "Request req-7f3a"]
    expect(page.get_by_label("Title")).to_be_focused()
    expect(page.get_by_label("Title")).to_have_accessible_description("must be one line")
    expect(page.locator("#top-p-error")).to_have_text("must be above 0")
    expect(page.locator("#top-p")).to_be_visible()
    expect(page.get_by_role("button", name="Try again")).to_be_hidden()
    expect(page.get_by_label("Post", exact=True)).to_have_value("my bike got broken")
    summarize(page)
    expect(page.locator("#title-error")).to_be_empty()
    expect(page.locator("#post-form .problem")).to_be_hidden()


def test_an_error_about_the_request_as_a_whole_is_not_the_post_s(visit: Visit, fake: FakeService) -> None:
    whole = FieldProblem(field="body", message="best_of above 1 needs temperature above 0")
    page = visit()
    fill_post(page)
    fake.failures = [Failure(422, "The request is malformed", errors=[whole])]
    page.get_by_role("button", name="Draw").click()
    expect(page.locator("#draw-form [role=alert]")).to_contain_text("body: best_of above 1 needs temperature above 0")
    expect(page.locator("#post-error")).to_be_empty()
    expect(page.locator(".candidate")).to_have_count(0)


def test_a_full_queue_counts_down_and_only_what_failed_is_tried_again(visit: Visit, fake: FakeService) -> None:
    page = visit()
    fill_post(page)
    fake.failures = [Failure(429, "The queue is full", retry_after=2, model="ppo")]
    page.get_by_role("button", name="Summarise").click()
    again = page.locator("#post-form .retry")
    expect(again).to_have_text(re.compile("Try again in [12] s"))
    expect(again).to_be_disabled()
    expect(page.locator("[data-policy=sft] .number")).to_have_text("−0.38")
    expect(page.locator("[data-policy=ppo] .meta")).to_have_text("Not finished.")
    expect(again).to_be_enabled()
    again.click()
    expect(page.locator("[data-policy=ppo] .number")).to_have_text("+1.33")
    assert sorted(request["model"] for request in fake.requests) == ["ppo", "ppo", "sft"]


def test_a_stream_that_fails_midway_keeps_what_was_written(visit: Visit, fake: FakeService) -> None:
    fake.break_after = 3
    page = visit()
    fill_post(page)
    page.get_by_role("button", name="Summarise").click()
    expect(page.locator("#post-form [role=alert]")).to_contain_text("The request took too long")
    expect(page.locator("[data-policy=ppo] .text")).to_have_text("trouble with my")
    expect(page.locator("#post-form .retry")).to_be_enabled()


def test_an_answer_by_something_in_between_and_no_answer_are_said_in_words(visit: Visit, fake: FakeService) -> None:
    page = visit()
    fill_post(page)
    page.get_by_label("Your summary").fill("mine")
    fake.refused.add(502)
    page.route("**/score", lambda route: route.fulfill(status=502, body="<html>bad gateway</html>"))
    page.get_by_role("button", name="Score").click()
    alert = page.locator("#score-form [role=alert]")
    expect(alert).to_contain_text("The service answered 502")
    page.evaluate("() => { window.fetch = () => Promise.reject(new TypeError('Failed to fetch')); }")
    page.get_by_role("button", name="Score").click()
    expect(alert).to_contain_text("The service cannot be reached")
    expect(page.locator("#status")).to_have_text("The service cannot be reached; trying again")
    expect(page.get_by_role("button", name="Score")).to_be_disabled()


def test_a_key_is_asked_for_and_kept_in_the_tab_only(visit: Visit, fake: FakeService) -> None:
    fake.api_key = "right"
    page = visit(ready=False)
    expect(page.locator("#key")).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-problem")).to_have_text("This service wants a key.")
    expect(page.locator("#key")).to_be_focused()
    page.keyboard.type("right")  # what was there is selected
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("Ready: demo")
    expect(page.locator("#key-form")).to_be_hidden()
    assert page.evaluate("[{...sessionStorage}, {...localStorage}, document.cookie]") == [{"api-key": "right"}, {}, ""]
    fill_post(page)
    line = copied_line(page, "[data-policy=ppo] .curl")
    assert '-H "Authorization: Bearer $KEY"' in line
    assert "right" not in line
    assert run_line(line, KEY="right")["results"][0]["summary"] == TEXTS["ppo"]


def test_a_key_asked_for_later_finishes_what_was_begun(visit: Visit, fake: FakeService) -> None:
    page = visit()
    fake.api_key = "right"
    fill_post(page)
    page.get_by_role("button", name="Summarise").click()
    expect(page.locator("#key")).to_be_focused()
    page.keyboard.type("right")
    page.keyboard.press("Enter")
    expect(page.locator("[data-policy=sft] .text")).to_have_text(TEXTS["sft"])
    expect(page.locator("[data-policy=ppo] .text")).to_have_text(TEXTS["ppo"])


def test_while_loading_the_page_says_so_and_becomes_usable_by_itself(visit: Visit, fake: FakeService) -> None:
    fake.phase = "verifying ppo"
    page = visit(ready=False)
    expect(page.locator("#status")).to_have_text("Starting: verifying ppo")
    fill_post(page)
    expect(page.get_by_role("button", name="Summarise")).to_be_disabled()
    page.keyboard.press("Control+Enter")
    fake.phase = "warming up"
    expect(page.locator("#status")).to_have_text("Starting: warming up")
    assert fake.requests == []
    fake.phase = None
    expect(page.locator("#status")).to_have_text("Ready: demo")
    expect(page.get_by_label("Post", exact=True)).to_have_value("my bike got broken")
    summarize(page)


def test_what_strangers_write_stays_text(visit: Visit, fake: FakeService) -> None:
    fake.texts = {"sft": HOSTILE, "ppo": f"{HOSTILE} naïve\u2028日本語 🚲"}
    page = visit()
    fill_post(page, HOSTILE, HOSTILE)
    summarize(page)
    draw(page)
    fake.failures = [Failure(429, HOSTILE, HOSTILE)]
    page.get_by_label("Your summary").fill(HOSTILE)
    page.get_by_role("button", name="Score").click()
    expect(page.locator("#score-form [role=alert] p")).to_have_text(HOSTILE)
    assert card(page, "sft")["text"] == HOSTILE
    assert page.locator("[data-policy=ppo] .text").text_content() == fake.texts["ppo"]
    assert page.locator("main img, main script").count() == 0
    assert page.evaluate("window.hacked") is None


# curl


def test_copied_lines_do_in_a_shell_what_the_page_does(visit: Visit, fake: FakeService) -> None:
    page = visit()
    fill_post(page, AWKWARD, "it's mine")
    page.get_by_text("Settings", exact=True).click()
    page.locator("#temperature").fill("1")
    summarize(page)
    draw(page)
    page.get_by_label("Your summary").fill(AWKWARD)
    page.get_by_role("button", name="Score").click()
    expect(page.locator("#own .number")).not_to_have_text("–")
    asked = {request.get("model", "score"): request for request in fake.requests if "best_of" not in request}
    drawn = next(request for request in fake.requests if "best_of" in request)
    assert asked["sft"]["posts"][0]["body"] == AWKWARD.replace("\r", "")

    answer = run_line(copied_line(page, "[data-policy=sft] .curl"))
    assert fake.requests[-1] == asked["sft"] | {"seed": DRAWN_SEED}
    assert answer["results"][0]["summary"] == card(page, "sft")["text"]
    answer = run_line(copied_line(page, "#draw-curl"))
    assert fake.requests[-1] == drawn | {"seed": DRAWN_SEED}
    shown = page.locator(".candidate .text").all_inner_texts()
    assert [one["summary"] for one in answer["results"][0]["candidates"]] == shown
    answer = run_line(copied_line(page, "#score-curl"))
    assert fake.requests[-1] == asked["score"]
    assert f"+{answer['results'][0]['score']:.2f}" == page.locator("#own .number").inner_text()


def test_a_copied_line_hides_nothing_from_the_eye(visit: Visit) -> None:
    page = visit()
    fill_post(page, "safe\u202eevil\u200b\x7f")
    line = copied_line(page, "[data-policy=ppo] .curl")
    assert r"safe\u202eevil\u200b\u007f" in line
    assert all(character == "\n" or character.isprintable() for character in line)


def test_without_a_clipboard_the_line_is_shown_selected(visit: Visit) -> None:
    page = visit()
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    fill_post(page)
    page.locator("#draw-curl").click()
    manual = page.locator("#draw-form .manual")
    expect(manual).to_be_focused()
    assert manual.input_value().startswith("curl -sS 'http://127.0.0.1:")
    assert page.evaluate("getSelection().toString()") == manual.input_value()
    expect(page.locator("#spoken")).to_have_text("Copy the selected curl line")


# How it looks


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_enough_in_both_schemes(visit: Visit, fake: FakeService, scheme: str) -> None:
    page = visit(color_scheme=scheme, reduced_motion="reduce")
    fill_post(page)
    page.get_by_text("Settings", exact=True).click()
    summarize(page)
    draw(page)
    fake.failures = [Failure(422, "Wrong", errors=[FieldProblem(field="items.0.summary", message="is empty")])]
    page.get_by_label("Your summary").fill("mine")
    page.get_by_role("button", name="Score").click()
    expect(page.locator("#summary-error")).to_have_text("is empty")
    fake.api_key = "k"
    page.get_by_role("button", name="Draw").click()
    expect(page.locator("#key")).to_be_focused()
    count, found = page.evaluate(CONTRASTS)
    assert count > 40
    assert found == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", background)[0]) > 128) == (scheme == "light")


@pytest.mark.parametrize("width", [360, 768, 1024])
def test_nothing_needs_sideways_scrolling(visit: Visit, fake: FakeService, width: int) -> None:
    page = visit(viewport={"width": width, "height": 740})
    fake.texts["ppo"] = "unbreakable" * 30
    fill_post(page, "word" * 60, "title" * 40)
    page.get_by_text("Settings", exact=True).click()
    summarize(page)
    draw(page)
    fake.failures = [Failure(429, "The queue is full", "x" * 200, retry_after=30)]
    page.get_by_role("button", name="Draw").click()
    expect(page.locator("#draw-form .retry")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    sticking_out = """() => [...document.querySelectorAll(".panel *")].filter((node) => node.checkVisibility())
        .filter((node) => node.getBoundingClientRect().right > node.closest(".panel").getBoundingClientRect().right)
        .map((node) => node.outerHTML)"""
    assert page.evaluate(sticking_out) == []


def test_docs_need_no_sideways_scrolling(visit: Visit) -> None:
    page = visit("/docs", viewport={"width": 360, "height": 740})
    expect(page.locator("#operations details")).to_have_count(5)
    page.evaluate("document.querySelectorAll('details').forEach((details) => (details.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_docs_show_the_api_and_links_open_what_they_name(visit: Visit) -> None:
    page = visit("/docs")
    expect(page.get_by_role("heading", level=1)).to_have_text("A stand-in 1")
    summarize_fold = page.locator("details[id='post-/summarize']")
    summarize_fold.locator("summary").click()
    row = summarize_fold.get_by_role("row").filter(has_text="top_p")
    expect(row).to_contain_text("above 0, at most 1, 1 when absent")
    assert run_line(summarize_fold.locator("pre").inner_text())["results"][0]["summary"] == TEXTS["ppo"]
    expect(summarize_fold.locator("summary")).to_contain_text("as server-sent events when asked for")
    schema = page.locator("#schema-SummarizeAnswer")
    assert schema.get_attribute("open") is None
    summarize_fold.get_by_role("link", name="SummarizeAnswer").click()
    expect(schema).to_have_attribute("open", "")
    expect(schema.get_by_role("row").filter(has_text="results")).to_contain_text("list of Summary")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_docs_have_enough_contrast(visit: Visit, scheme: str) -> None:
    page = visit("/docs", color_scheme=scheme)
    expect(page.locator("#operations details")).to_have_count(5)
    page.evaluate("document.querySelectorAll('details').forEach((details) => (details.open = true))")
    count, found = page.evaluate(CONTRASTS)
    assert count > 100
    assert found == []
