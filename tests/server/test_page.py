"""The chat page in a real browser: headless Chromium, driven by Playwright.

Needs Debian's `chromium` (or Chrome, as `STEPFLASH_CHROMIUM=/path`) and the `playwright` package: `make test-page`.
With STEPFLASH_SCREENSHOTS=FOLDER the screenshots of docs/ are made there, with nano as the model.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stepflash.assistant.local import open_session
from stepflash.server.app import create_app
from stepflash.settings import EngineSettings, ServerSettings
from tests.scripted_engine import END, engine_of, scripted_session
from tests.server.live import serving

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make test-page")
CHROMIUM = os.environ.get("STEPFLASH_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.client,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium"),
]
# Without them Chromium looks for hosts outside at every start.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SCREENSHOTS = os.environ.get("STEPFLASH_SCREENSHOTS")
CALL = "<tool_call>\n<function=calculator>\n<parameter=expression>\n6 * 7\n</parameter>\n</function>\n</tool_call>"
ATTACK = """<img src=x onerror="window.hit=1"><script>window.hit=1</script> [a](javascript:window.hit=1)
`<b>` **bold** and [docs](https://example.org/x_y) <https://example.org>

| a | b |
|---|---|
| 1 | <i>2</i> |

1. one
   - inner
2. two

```html
<script>window.hit=1</script>
```
> quoted
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page of a server; what the browser complains about fails the test."""
    contexts, complaints = [], []

    def open_page(url: str, **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
        page.goto(url)
        sync_api.expect(page.locator("#model")).not_to_be_empty()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def scripted(*texts: str, **options: Any) -> Any:
    return scripted_session(*texts, bursts=[4], **options)


def ask(page: Any, text: str) -> None:
    page.locator("#input").fill(text)
    page.locator("#input").press("Enter")


def expect_answer(page: Any, text: str) -> None:
    sync_api.expect(page.locator(".answer").last).to_contain_text(text)
    sync_api.expect(page.locator("#stop")).to_be_hidden()


def test_a_thought_is_folded_and_the_figures_are_shown(open_page: Callable[..., Any]) -> None:
    session = scripted("Let me see.\n</think>\nIt is **391**." + END)
    with serving(create_app(session, "scripted")) as url:
        page = open_page(url)
        assert page.evaluate("document.activeElement.id") == "input"
        assert page.locator("#send").is_disabled()
        ask(page, "What is 17 * 23?")
        expect_answer(page, "It is 391.")
        thought = page.locator("details.thought")
        assert thought.get_attribute("open") is None
        assert thought.locator("summary").inner_text() == "Thought, 3 words"
        assert not thought.locator("div").is_visible()
        thought.locator("summary").press("Enter")
        assert thought.locator("div").inner_text().strip() == "Let me see."
        assert page.locator(".text strong").inner_text() == "391"
        foot = page.locator(".foot").inner_text()
        assert re.search(r"\d+ tokens", foot)
        assert re.search(r"\d+ drafts accepted \(\d+ %\)", foot)
        assert re.search(r"1 of \d+ prompt tokens cached", foot)
        assert re.search(r"\d+ of 4,096 tokens", page.locator("#context").inner_text())
        assert page.locator("#status").text_content() == "Answer complete"
        # What was said is there after a reload, and goes along with the next message.
        page.reload()
        expect_answer(page, "It is 391.")
        sync_api.expect(page.locator(".foot")).to_contain_text("drafts accepted")
        ask(page, "Again")
        sync_api.expect(page.locator(".answer")).to_have_count(2)
        expect_answer(page, "It is 391.")
    prompt = session.tokenizer.decode(engine_of(session).requests[-1].prompt_token_ids)
    assert "What is 17 * 23?" in prompt
    assert "It is **391**." in prompt


def test_text_streams_and_escape_stops_it(open_page: Callable[..., Any]) -> None:
    session = scripted("t\n</think>\n" + "word " * 4000 + END, pause=0.02, max_context_tokens=100_000)
    with serving(create_app(session, "scripted")) as url:
        page = open_page(url)
        ask(page, "Talk")
        sync_api.expect(page.locator(".answer .text")).to_contain_text("word word word")
        sync_api.expect(page.locator(".foot")).to_contain_text("tok/s")
        assert page.locator("#stop").is_visible()
        page.keyboard.press("Escape")
        sync_api.expect(page.locator(".foot")).to_contain_text("stopped")
        assert page.locator("#send").is_visible()
        # Stopped at the other end, too.
        page.wait_for_timeout(200)
        assert engine_of(session).aborted
        # What there is stays part of the conversation.
        assert "word word" in page.locator(".answer .text").inner_text()


def test_shift_enter_makes_a_new_line(open_page: Callable[..., Any]) -> None:
    session = scripted("t\n</think>\nYes." + END)
    with serving(create_app(session, "scripted")) as url:
        page = open_page(url)
        box = page.locator("#input")
        before = box.bounding_box()["height"]
        box.press_sequentially("one")
        box.press("Shift+Enter")
        box.press_sequentially("two")
        assert box.input_value() == "one\ntwo"
        assert box.bounding_box()["height"] > before
        box.press("Enter")
        expect_answer(page, "Yes.")
        assert page.locator(".user").inner_text() == "one\ntwo"
        assert box.bounding_box()["height"] == before


def test_tools_run_in_the_page(open_page: Callable[..., Any]) -> None:
    session = scripted("Compute.\n</think>\n" + CALL + END, "So.\n</think>\nIt is 42." + END)
    with serving(create_app(session, "scripted")) as url:
        page = open_page(url)
        page.keyboard.press("Alt+s")
        page.get_by_label("Offer tools").check()
        page.get_by_role("button", name="Done").click()
        ask(page, "What is 6 * 7?")
        expect_answer(page, "It is 42.")
        call = page.locator("details.call")
        assert call.locator("summary").inner_text() == 'calculator {"expression": "6 * 7"} \u2192 42'
        call.locator("summary").click()
        assert call.locator("pre").all_inner_texts() == ['{\n  "expression": "6 * 7"\n}', "42"]
    first, second = (session.tokenizer.decode(r.prompt_token_ids) for r in engine_of(session).requests)
    assert '"name": "calculator"' in first
    assert "<tool_response>42</tool_response>" in second


def test_settings_reach_the_server(open_page: Callable[..., Any]) -> None:
    session = scripted("t\n</think>\nYes." + END)
    with serving(create_app(session, "scripted")) as url:
        page = open_page(url)
        bodies: list[dict[str, Any]] = []
        page.on("request", lambda r: bodies.append(r.post_data_json) if "completions" in r.url else None)
        page.locator("#open-settings").click()
        page.get_by_label("System message").fill("Be brief.")
        page.get_by_label("Effort").select_option("low")
        page.get_by_role("group", name="Thinking").get_by_label("At most, tokens").fill("50")
        page.get_by_label("Temperature").fill("0.5")
        page.get_by_role("group", name="Answer").get_by_label("At most, tokens").fill("64")
        page.get_by_label("Drafts a step").select_option("1")
        page.get_by_label("Colours").select_option("dark")
        page.get_by_role("button", name="Done").click()
        ask(page, "Hello")
        expect_answer(page, "Yes.")
        (body,) = bodies
        given = {"temperature": 0.5, "max_tokens": 64, "draft_depth": 1, "thinking_budget": 50}
        assert {name: body[name] for name in given} == given
        assert body["reasoning_effort"] == "low"
        assert body["messages"][0] == {"role": "system", "content": "Be brief."}
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 26)"
        page.reload()
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        page.locator("#open-settings").click()
        assert page.get_by_label("Temperature").input_value() == "0.5"
        page.get_by_role("button", name="Reset").click()
        page.keyboard.press("Escape")
        ask(page, "Hello")
        sync_api.expect(page.locator(".answer")).to_have_count(2)
        expect_answer(page, "Yes.")
        assert not set(given) & set(bodies[-1])
    sampling = engine_of(session).requests[0].sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.draft_depth) == (0.5, 64, 1)


def test_markdown_is_shown_and_html_is_text(open_page: Callable[..., Any]) -> None:
    session = scripted("t\n</think>\n" + ATTACK + END)
    with serving(create_app(session, "scripted")) as url:
        page = open_page(url)
        ask(page, ATTACK)
        expect_answer(page, "quoted")
        text = page.locator(".answer .text")
        assert page.evaluate("window.hit") is None
        assert page.locator("#messages").locator("script, i, b, [onerror]").count() == 0
        assert page.locator("#messages .answer img").count() == 0
        links = text.locator("a").evaluate_all("nodes => nodes.map(node => node.getAttribute('href'))")
        assert links == ["https://example.org/x_y", "https://example.org"]
        assert text.locator("a").first.get_attribute("rel") == "noopener noreferrer nofollow"
        assert text.locator("p > code").inner_text() == "<b>"
        assert text.locator("td").all_inner_texts() == ["1", "<i>2</i>"]
        assert text.locator("ol > li").count() == 2
        assert text.locator("ol > li > ul > li").inner_text() == "inner"
        assert text.locator("pre code").inner_text() == "<script>window.hit=1</script>"
        assert text.locator("blockquote").inner_text() == "quoted"
        # What the user writes is no markup at all.
        assert page.locator(".user").inner_text().startswith("<img src=x onerror=")


def test_hostile_markdown_takes_no_time_and_loses_nothing(open_page: Callable[..., Any]) -> None:
    with serving(create_app(scripted("t" + END), "scripted")) as url:
        page = open_page(url)
        render = """async text => {
            const { markdown } = await import("/page/markdown.js");
            const box = document.createElement("div");
            box.append(...markdown(text));
            return box.textContent.replace(/\\s/g, "").length;
        }"""
        cases = [
            "**a " * 20_000,
            "`" * 50_000,
            "> " * 5_000 + "x",
            "[a](" * 20_000,
            "_a" * 30_000,
            "|-" * 20_000,
        ]
        cases += ["- " * 5_000 + "x", "\n".join(" " * n + "- x" for n in range(500)), "~~~\n" * 5_000]
        for text in cases:
            page.set_default_timeout(10_000)
            assert page.evaluate(render, text) >= 0
        assert page.evaluate(render, "**a " * 100) == 300


def test_keyboard_order_and_labels(open_page: Callable[..., Any]) -> None:
    with serving(create_app(scripted("t" + END), "scripted")) as url:
        page = open_page(url)
        page.locator(".skip").focus()
        order = []
        for _ in range(7):
            page.keyboard.press("Tab")
            order.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        examples = page.locator("#examples button").all_inner_texts()
        assert order == ["new", "open-settings", "messages", *examples, "input"]
        unnamed = page.evaluate(
            """() => [...document.querySelectorAll("button, input, textarea, select")].filter(
                node => !node.labels?.length && !node.ariaLabel && !node.textContent.trim()
            ).map(node => node.outerHTML)"""
        )
        assert unnamed == []
        page.keyboard.press("Alt+s")
        assert page.locator("#settings").is_visible()
        page.keyboard.press("Escape")
        assert not page.locator("#settings").is_visible()


def test_errors_are_told_and_the_message_can_be_sent_again(open_page: Callable[..., Any]) -> None:
    session = scripted("x" * 40 + END, error="the engine tripped", error_after=2)
    with serving(create_app(session, "scripted")) as url:
        page = open_page(url)
        ask(page, "Hello")
        sync_api.expect(page.locator(".foot .error")).to_contain_text("the engine tripped")
        engine_of(session).error = None
        page.get_by_role("button", name="Again").click()
        sync_api.expect(page.locator(".foot")).to_contain_text("tokens")
        sync_api.expect(page.locator(".answer")).to_have_count(1)


def test_a_key_is_sent_and_not_kept_beyond_the_tab(browser: Any) -> None:
    app = create_app(
        scripted("t\n</think>\nYes." + END), "scripted", settings=ServerSettings(api_keys=("secret",))
    )
    with serving(app) as url:
        context = browser.new_context(http_credentials={"username": "me", "password": "secret"})
        page = context.new_page()
        page.goto(url)
        sync_api.expect(page.locator("#model")).to_have_text("scripted")
        page.locator("#open-settings").click()
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Done").click()
        sync_api.expect(page.locator("#model")).to_contain_text("a valid API key is needed")
        page.locator("#open-settings").click()
        page.get_by_label("API key").fill("secret")
        page.get_by_role("button", name="Done").click()
        sync_api.expect(page.locator("#model")).to_have_text("scripted")
        ask(page, "Hello")
        expect_answer(page, "Yes.")
        assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
        context.close()


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_has_no_sideways_scrolling(open_page: Callable[..., Any], width: int) -> None:
    long = "x" * 300
    session = scripted(f"{long}\n</think>\n{ATTACK}\n`{long}`\n\n```\n{long}\n```\n{long}" + END)
    with serving(create_app(session, "scripted")) as url:
        page = open_page(url, viewport={"width": width, "height": 700})
        fits = """document.documentElement.scrollWidth <= innerWidth
            && document.querySelector("main").scrollWidth <= innerWidth"""
        assert page.evaluate(fits)
        ask(page, long)
        expect_answer(page, "quoted")
        assert page.evaluate(fits)
        page.locator("#open-settings").click()
        box = page.locator("#settings").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        assert page.locator("#settings").evaluate("node => node.scrollWidth <= node.clientWidth")


@pytest.mark.skipif(SCREENSHOTS is None, reason="STEPFLASH_SCREENSHOTS=FOLDER makes them")
def test_screenshots(open_page: Callable[..., Any]) -> None:
    assert SCREENSHOTS is not None
    folder = Path(SCREENSHOTS)
    shots = {
        "page-light": {"viewport": {"width": 1000, "height": 640}},
        "page-dark": {"viewport": {"width": 1000, "height": 640}, "color_scheme": "dark"},
        "page-phone": {"viewport": {"width": 390, "height": 760}, "device_scale_factor": 2},
    }
    with open_session("nano", EngineSettings(max_num_seqs=2, kv_cache_gb=0.25)) as local:
        app = create_app(local.session, "nano", defaults=local.sampling)
        with serving(app) as url:
            for name, options in shots.items():
                page = open_page(url, **options)
                settings = {"temperature": "0", "tools": True}
                page.evaluate("s => localStorage.setItem('stepflash-settings', JSON.stringify(s))", settings)
                page.reload()
                ask(page, "Compute 512 * 33")
                expect_answer(page, "512*33 = 16896")
                page.locator("details.call > summary").click()
                page.locator("details.thought > summary").last.click()
                page.locator("#input").focus()
                page.wait_for_timeout(300)
                page.screenshot(path=folder / f"{name}.png")
                if name == "page-light":
                    page.locator("#open-settings").click()
                    page.screenshot(path=folder / "page-settings.png")
