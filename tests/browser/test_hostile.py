"""The page in Chromium under hostile answers and stores, and Markdown as it is shown."""

import json
from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys

from tests.browser.markdown_cases import CASES, LARGE
from tests.support.browser import Page, PageServer
from tests.support.fake_engine import Script
from tests.support.gateway import turn
from workers.errors import InvalidRequest

pytestmark = pytest.mark.browser

MARKUP = (
    "<img src=x onerror=\"window.ran=1\"><script>window.ran=1</script><a href='javascript:window.ran=1'>a</a>"
    "<svg onload=window.ran=1><style>*{display:none}</style></textarea></code></pre>"
    " [link](javascript:window.ran=1) ![image](http://outside.example/a.png) <http://outside.example/b>"
    " [data](data:text/html,<script>window.ran=1</script>)"
)
FENCE = f"\n\n```<img/onerror=window.ran=1>\n{MARKUP}\n```\n\n| {MARKUP} | b |\n|-|-|\n| 1 | 2 |\n"
MADE = "#turns :is(script, style, img, iframe, object, embed, svg:not(.icon), [onload], [onerror])"


def stored(**changes: Any) -> dict[str, Any]:
    """Return a stored conversation with a call, as the page writes it."""
    call = {"id": "c", "type": "function", "name": MARKUP, "arguments": MARKUP}
    answer = {
        "id": "b",
        "parent": "a",
        "role": "assistant",
        "content": MARKUP,
        "reasoning": MARKUP,
        "calls": [call],
        "status": "failed",
        "finish": MARKUP,
        "failure": {"message": MARKUP, "status": 500, "code": MARKUP, "param": MARKUP, "requestId": MARKUP},
    }
    return {
        "version": 1,
        "id": "one",
        "title": MARKUP,
        "changed": 1,
        "leaf": "d",
        "turns": [
            {"id": "a", "parent": None, "role": "user", "content": MARKUP},
            answer,
            {"id": "d", "parent": "b", "role": "tool", "content": MARKUP, "callId": "c"},
        ],
        "settings": {"system": MARKUP, "tools": 5},
        **changes,
    }


def store(page: Page, entries: dict[str, str]) -> None:
    """Open the page with these conversations in its store."""
    page.driver.get(f"{page.server.url}/health")
    page.driver.execute_script(
        "localStorage.clear(); for (const [id, text] of Object.entries(arguments[0]))"
        " localStorage.setItem(`cantata:/:chat:${id}`, text);",
        entries,
    )
    page.driver.get_log("browser")
    page.open(keep=True)


def assert_nothing_ran(page: Page) -> None:
    assert page.driver.execute_script("return window.ran") is None
    assert page.all(MADE) == []
    links = [link.get_attribute("href") or "" for link in page.all("#turns a")]
    assert all(link.startswith(("http://outside.example/", "https://")) for link in links), links
    assert [name for name in page.requests() if not name.startswith(page.server.url)] == []
    assert page.complaints() == []


def test_markup_in_an_answer_is_text(page: Page, server: PageServer) -> None:
    ids = turn(server.encoding, reasoning=MARKUP + FENCE, text=MARKUP + FENCE)
    server.says("Hello", Script(ids, per_message=64))
    page.fill("#message", "Hello" + MARKUP)
    page.press(Keys.ENTER)
    page.answered()
    server.says("Again", Script(refusal=InvalidRequest(MARKUP, MARKUP)))
    page.send("Again")
    page.until(lambda: MARKUP in page.text(".note.failed"))
    page.click(".reasoning summary")
    page.until(lambda: "<script>window.ran=1</script>" in page.text(".reasoning .prose"))
    assert "<script>window.ran=1</script>" in page.text(".turn.answer .prose:not(details *)")
    assert "<img/onerror=window.ran=1>" in page.text(".turn.answer .language")
    assert "<script>" in page.text(".bubble")
    arguments = json.dumps({"city": MARKUP})
    server.says("Call", Script(turn(server.encoding, call=("get_weather", arguments)), per_message=64))
    page.send("Call")
    page.answered(3)
    assert "onerror" in page.text(".call pre")
    assert_nothing_ran(page)


def test_a_hostile_store_is_text_and_the_policy_holds(page: Page) -> None:
    """The last line of defence: even a defect of the page could not turn text into a script."""
    store(page, {"one": json.dumps(stored())})
    page.until(lambda: page.text("#conversations .conversation") == MARKUP)
    assert page.text(".call header code") == MARKUP
    assert page.text(".call .result") == MARKUP
    assert MARKUP in page.text(".note.failed")
    assert page.one("#set-effort").get_property("value") == ""
    assert_nothing_ran(page)
    refused = page.driver.execute_async_script(
        """
        const done = arguments[0], refused = [];
        addEventListener("securitypolicyviolation", (event) => refused.push(event.effectiveDirective));
        const attempt = (act) => { try { act(); } catch (error) { refused.push(error.name); } };
        attempt(() => { document.body.innerHTML = "<b>text</b>"; });
        const script = document.createElement("script");
        script.append("window.ran = 1");
        document.body.append(script);
        const image = document.createElement("img");
        image.onerror = () => setTimeout(() => done(refused));
        image.src = "http://outside.example/a.png";
        document.body.append(image);
        """
    )
    assert {"TypeError", "img-src", "require-trusted-types-for"} <= set(refused)
    assert page.driver.execute_script("return window.ran") is None


def test_entries_of_other_versions_are_set_aside(page: Page, server: PageServer) -> None:
    entries = {
        "one": json.dumps(stored(title="Sound")),
        "old": json.dumps({"version": 0, "id": "old", "messages": []}),
        "broken": '{"version": 1, "id": "bro',
        "cycle": json.dumps(stored(id="cycle", leaf="z")),
        "empty": "null",
    }
    store(page, entries)
    assert [entry.text for entry in page.all("#conversations .conversation")] == ["Sound"]
    assert page.one(".notice").text.startswith("4 stored conversations could not be read")
    kept = "return Object.entries(localStorage).filter(([key]) => key.startsWith('cantata:/:aside:')).length"
    assert page.driver.execute_script(kept) == 4
    server.says("Hello", Script(turn(server.encoding, text="Hello there!")))
    page.click("#new-chat")
    page.send("Hello")
    page.answered()
    page.open(keep=True)
    assert "Hello there!" in page.text("#turns")
    [delete] = [button for button in page.all(".notice .button") if button.text == "Delete"]
    delete.click()
    assert page.driver.execute_script(kept) == 0


def test_a_full_store_is_told_and_loses_nothing_shown(page: Page, server: PageServer) -> None:
    store(page, {"one": json.dumps(stored(title="Sound"))})
    page.click("#new-chat")
    page.driver.execute_script(
        "window.kept = Storage.prototype.setItem;"
        "Storage.prototype.setItem = () => { throw new DOMException('', 'QuotaExceededError'); }"
    )
    server.says("Hello", Script(turn(server.encoding, text="Hello there!")))
    page.send("Hello")
    page.answered()
    assert "no room for more conversations" in page.one(".notice").text
    assert "Hello there!" in page.text("#turns")
    titles = [entry.text for entry in page.all("#conversations .conversation")]
    assert titles == ["Hello", "Sound"]
    page.driver.execute_script("Storage.prototype.setItem = window.kept")
    [delete] = [button for button in page.all(".notice .button") if button.text == "Delete the oldest"]
    delete.click()
    page.until(lambda: not page.all(".notice"))
    page.open(keep=True)
    assert "Hello there!" in page.text("#turns")


def test_markdown(page: Page) -> None:
    """Each text gives its elements; shown piece by piece it ends as the same. Texts for which a
    careless parser takes forever, or too much stack, are shown too."""
    shown, lengths = page.driver.execute_async_script(
        """
        const [texts, large, done] = arguments;
        import("/page/markdown.js").then(({ MarkdownView }) => {
          const show = (text, step) => {
            const view = new MarkdownView();
            for (let end = step; end < text.length; end += step) view.update(text.slice(0, end));
            view.update(text);
            return view.element;
          };
          done([
            texts.map((text) => [show(text, text.length).innerHTML, show(text, 1).innerHTML]),
            large.map((text) => show(text, text.length).textContent.length),
          ]);
        }, (error) => done([String(error), []]));
        """,
        list(CASES),
        LARGE,
    )
    assert [whole for whole, _ in shown] == list(CASES.values())
    assert [pieces for _, pieces in shown] == list(CASES.values())
    assert [index for index, length in enumerate(lengths) if length <= 1000] == []
