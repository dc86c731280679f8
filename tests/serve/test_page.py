"""The page in a real browser: chat, side by side, interview, feedback, board.

Skipped where there is no Chromium; `.ci/run` installs Debian's.
"""

import shutil
from contextlib import suppress

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from playwright.sync_api import TimeoutError as TimeoutError_

from interviewmate_mlx.coach.feedback import Feedback

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
TAGS = "What is <img src=x onerror=alert(1)> & <script>alert(2)</script>?"
WAIT_MS = 60_000


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        # Without its sandbox, which containers do not allow: all it opens is our own page.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, served):
    """The page, at the width of a small phone; what it logs as an error fails the test."""
    faults: list[str] = []
    context = browser.new_context(viewport={"width": 360, "height": 800})
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    expect.set_options(timeout=WAIT_MS)
    page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", lambda dialog: faults.append(f"dialog: {dialog.message}"))
    page.goto(served.url)
    expect(page.locator("#voice option")).to_have_count(4)
    page.locator("summary", has_text="Settings").click()
    page.fill("#max-tokens", "16")
    yield page
    assert faults == []
    assert is_narrow_enough(page)
    context.close()


def is_narrow_enough(page: Page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def send(page: Page, text: str) -> None:
    page.fill("#message", text)
    page.press("#message", "Enter")


def test_chat_streams_and_goes_on(page, served):
    page.select_option("#voice", "learned")
    send(page, TAGS)
    expect(page.locator(".said.user .text")).to_have_text(TAGS)
    expect(page.locator(".answers .rate")).to_have_count(1)
    assert page.locator(".answers .text").inner_text().strip()
    assert page.locator("img, .text *").count() == 0
    send(page, "Why?")
    expect(page.locator(".answers .rate")).to_have_count(2)
    with Feedback.open(served.log.parent / "kept.sqlite") as feedback:
        assert any(
            count == 2 and question == TAGS for _, _, count, question in feedback.conversations()
        )
    page.click("text=New conversation")
    expect(page.locator(".said")).to_have_count(0)


def test_side_by_side_and_feedback(page, served):
    page.select_option("#voice", label="tiny and learned and random, side by side")
    send(page, "What is a loss?")
    expect(page.locator(".answers .who")).to_have_text(["tiny", "learned", "random"])
    expect(page.locator(".answers .rate")).to_have_count(3)
    down = page.get_by_role("button", name="The answer of random is not good")
    down.click()
    expect(down).to_have_attribute("aria-pressed", "true")
    last = page.locator(".answers > .said").nth(2)
    last.locator("summary").click()
    last.locator("textarea").fill("How far it is <i>off</i>.")
    last.get_by_role("button", name="Keep it").click()
    expect(last.get_by_role("status")).to_have_text("Your answer is kept.")
    with Feedback.open(served.log.parent / "kept.sqlite") as feedback:
        found = [each for each in feedback.rated() if each.better == "How far it is <i>off</i>."]
    assert [each.thumbs for each in found] == [-1]


def test_answer_can_be_stopped(page):
    page.fill("#max-tokens", "1500")
    page.select_option("#voice", "random")
    send(page, "What is it all?")
    expect(page.locator(".answers .text")).not_to_be_empty()
    with suppress(TimeoutError_):  # it may have ended by itself
        page.locator("#stop").click(timeout=1000)
    expect(page.locator("#send")).to_be_enabled()
    expect(page.locator("#message")).to_be_focused()


def test_interview_by_keyboard(page):
    page.focus("nav a[href='#interview']")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Start").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#question")).to_be_focused()
    asked = page.locator("#question").inner_text()
    page.keyboard.press("Tab")
    page.keyboard.type("A row of the model, a function")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#score")).to_be_focused()
    assert page.locator("#points li").count() > 0
    assert page.locator("#points li b").first.inner_text().strip() in ("has", "lacks")
    expect(page.locator("#coach-answer .rate")).to_have_count(1)
    page.get_by_role("button", name="Good", exact=True).last.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#interview-state")).to_contain_text("That question returns")
    expect(page.locator("#question")).not_to_have_text(asked)


def test_board_shows_what_metrics_say(page, served):
    page.click("nav a[href='#board']")
    expect(page.locator("#board-rows tr")).to_have_count(3)
    asked = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
    served.post("/v1/chat/completions", asked | {"model": "tiny"})
    page.click("#refresh")
    count = served.metric('imate_answer_tokens_total{adapter="tiny"}')
    row = page.locator("#board-rows tr", has_text="tiny")
    expect(row.locator("td").nth(1)).to_have_text(f"{count:.0f}")


def test_every_control_has_a_name(page):
    for hash_ in ("#chat", "#interview", "#board"):
        page.click(f"nav a[href='{hash_}']")
        expect(page.locator(f"nav a[href='{hash_}']")).to_have_attribute("aria-current", "page")
        for control in page.locator("button, input, select, textarea").all():
            if control.is_visible():
                named = "e => e.labels?.[0]?.textContent || e.ariaLabel || e.textContent"
                assert control.evaluate(named).strip()


@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_contrast_and_nothing_is_cut_off(browser, served, width, scheme):
    """WCAG AA: 4.5 to 1 for text."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.goto(served.url)
    assert is_narrow_enough(page)
    names = ["--paper", "--ink", "--faint", "--tint", "--accent", "--on-accent", "--warn"]
    read = "n => getComputedStyle(document.documentElement).getPropertyValue(n).trim()"
    colour = {name: page.evaluate(read, name) for name in names}
    for front, back in [
        *(("--ink", "--paper"), ("--ink", "--tint"), ("--faint", "--paper")),
        *(("--faint", "--tint"), ("--warn", "--paper"), ("--on-accent", "--accent")),
    ]:
        light, dark = sorted((luminance(colour[front]), luminance(colour[back])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (front, back)
    context.close()


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_key_is_asked_for_on_the_page(browser, serve, tiny_base):
    with serve("--model", tiny_base, INTERVIEWMATE_API_KEY="s3cret") as served:
        context = browser.new_context()
        page = context.new_page()
        page.goto(served.url)
        expect(page.locator("#trouble")).to_have_text("The API key is missing or wrong.")
        page.fill("#key", "s3cret")
        page.click("text=Use it")
        expect(page.locator("#voice option")).to_have_count(1)
        expect(page.locator("#key-form")).to_be_hidden()
        expect(page.locator("#kept")).to_have_text("Nothing that is said here is kept.")
        context.close()
