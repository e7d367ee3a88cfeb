"""The page's chat in Chromium: conversations, tools, stopping, errors, reloading, keys."""

from pathlib import Path

import pytest
from selenium.webdriver.common.keys import Keys

from cluster.config import GatewayConfig
from tests.support.browser import Page, PageServer, page_server
from tests.support.fake_engine import Script
from tests.support.gateway import turn
from workers.errors import EngineDead

pytestmark = pytest.mark.browser

TEXT = (
    "I am a **toy**: a very small model.\n\n## What I can do\n\n- greet you\n- add, as in `27 + 58`\n"
    "- call a [tool](https://example.com/a)\n\n| a | b |\n| - | -: |\n| 1 | 22 |\n\n"
    "```python\nprint(27 + 58)\n```\n\n> The engine is the *real* one."
)


def test_a_whole_conversation(page: Page, server: PageServer) -> None:
    """Reasoning first, folded; then the text, as it comes; then figures; then a second turn."""
    assert page.text("#served") == "demo"
    assert page.one("#toy").text.startswith("It is a toy")
    page.screenshot("empty-light")
    ids = turn(server.encoding, reasoning="The user asks who I am.", text=TEXT)
    answer = server.says("Who are you", Script(ids, gate_after=len(ids) - 4), gated=True)
    server.says("And then", Script(turn(server.encoding, text="Nothing.")))
    page.send("Hello! Who are you?")
    page.until(lambda: "The engine is the" in page.text(".turn.answer .prose:not(details *)"))
    assert page.one("#stop").is_displayed()
    assert page.one(".turn.answer").get_attribute("aria-busy") == "true"
    details = page.one(".reasoning")
    assert details.get_attribute("open") is None
    page.click(".reasoning summary")
    page.until(lambda: "The user asks who I am." in page.text(".reasoning .prose"))
    page.click(".reasoning summary")
    server.open_gate(answer)
    page.answered()
    assert page.text(".turn.answer em") == "real"
    assert page.text(".turn.answer strong") == "toy"
    link = page.one(".turn.answer a")
    assert link.get_attribute("href") == "https://example.com/a"
    assert "noopener" in (link.get_attribute("rel") or "")
    assert page.text(".turn.answer pre code") == "print(27 + 58)"
    figures = page.text(".figures")
    assert "tokens/s" in figures
    assert "first token" in figures
    assert f"{len(ids)} tokens" in figures
    assert page.text("#announce") == "The answer is complete."
    for name, theme, width in (("light", "light", 1280), ("dark", "dark", 1280), ("phone", "light", 390)):
        page.shows(width=width, height=860, theme=theme)
        page.screenshot(f"answer-{name}")
        assert page.driver.execute_script("return document.documentElement.scrollWidth") <= width
    page.shows(width=1280, height=860)
    page.send("And then?")
    page.answered(2)
    prompt = server.prompts()[-1]
    assert "Who are you" in prompt
    assert "print(27 + 58)" in prompt
    assert page.complaints() == []


def test_a_call_and_its_result(page: Page, server: PageServer) -> None:
    encoding = server.encoding
    call = turn(encoding, reasoning="I look it up.", call=("get_weather", '{"city": "Lisbon"}'))
    server.says("Lisbon", Script(call))
    server.says("18 degrees", Script(turn(encoding, text="It is sunny, with 18 degrees.")))
    server.says("rain", Script(turn(encoding, text="It rains.")))
    page.click("[data-example=tool]")
    page.answered()
    assert "get_weather" in server.prompts()[-1], "the example declares its tool"
    assert page.text(".call header code") == "get_weather"
    assert '"city": "Lisbon"' in page.text(".call pre")
    page.screenshot("call-light")
    result = page.one(".call textarea")
    page.until(lambda: page.driver.switch_to.active_element == result)
    result.send_keys('{"sky": "18 degrees"}', Keys.ENTER)
    page.answered(2)
    assert '{"sky": "18 degrees"}' in server.prompts()[-1]
    assert page.all(".turn.answer")[1].text.startswith("It is sunny, with 18 degrees.")
    page.click("[aria-label='Change the result of get_weather']")
    result = page.one(".call textarea")
    result.clear()
    result.send_keys("rain", Keys.ENTER)
    page.until(lambda: "It rains." in page.text("#turns"))
    assert "2 of 2" in page.text("#turns")
    page.click("[aria-label='Version before']")
    page.until(lambda: "It is sunny" in page.text("#turns"))


def test_stop_edit_and_retry(page: Page, server: PageServer) -> None:
    encoding = server.encoding
    ids = turn(encoding, text="one two three four five six")
    server.says("Count", Script(ids, gate_after=len(ids) - 3), gated=True)
    page.send("Count to ten.")
    page.until(lambda: "one two" in page.text(".turn.answer"))
    page.press(Keys.ESCAPE)
    page.answered()
    page.until(lambda: len(server.engine.cancelled) == 1)
    assert page.text(".note") == "Stopped."
    assert "one two" in page.text(".turn.answer .prose:not(details *)")
    server.says("Count", Script(turn(encoding, text="All ten.")))
    page.click("[aria-label='Retry answer']")
    page.until(lambda: "All ten." in page.text(".turn.answer"))
    page.answered()
    assert "2 of 2" in page.text(".turn.answer .tools .pager")
    server.says("Spell", Script(turn(encoding, text="t e n")))
    page.press(Keys.ARROW_UP)
    editor = page.one(".editor textarea")
    editor.clear()
    editor.send_keys("Spell ten.", Keys.ENTER)
    page.until(lambda: "t e n" in page.text(".turn.answer"))
    page.answered()
    assert "Count" not in server.prompts()[-1]
    page.click(".turn.user [aria-label='Version before']")
    page.until(lambda: "All ten." in page.text(".turn.answer"))


def test_an_answer_that_breaks_is_kept_and_can_be_retried(page: Page, server: PageServer) -> None:
    """An engine that dies, and a connection that does."""
    encoding = server.encoding
    ids = turn(encoding, text="one two three four five six")
    server.says("Count", Script(ids, break_after=4, failure=EngineDead("It died."), per_message=4))
    page.send("Count to ten.")
    page.until(lambda: "What arrived before is kept." in page.text(".note.failed"))
    kept = page.text(".turn.answer .prose:not(details *)")
    assert kept
    assert "one two three four five six".startswith(kept.strip())
    server.says("Count", Script(ids, gate_after=len(ids) - 3), gated=True)
    page.click(".note.failed .button")
    page.until(lambda: "one two" in page.text(".turn.answer .prose:not(details *)"))
    server.cut_connections()
    page.until(lambda: "connection" in page.text(".note.failed"))
    assert "one two" in page.text(".turn.answer .prose:not(details *)")
    page.open(keep=True)
    assert "connection" in page.text(".note.failed"), "it is marked after a reload, too"
    server.says("Count", Script(turn(encoding, text="All ten.")))
    page.click(".note.failed .button")
    page.until(lambda: "All ten." in page.text(".turn.answer"))
    assert not page.all(".note.failed:not([hidden])")


def test_what_the_server_refuses_is_shown(page: Page, server: PageServer) -> None:
    """A setting that only the server finds wrong; and one that the page does, which is not sent."""
    page.click("#toggle-settings")
    page.fill("#set-tools", '[{"type": "function", "function": {"name": "a b"}}]')
    assert "Tool 1: name must have" in page.one("#problem-tools").text
    page.fill("#set-tools", "[{]")
    assert page.one("#problem-tools").text.startswith("This is not JSON")
    page.fill("#set-temperature", "3")
    assert page.one("#problem-temperature").text == "Use a number from 0 to 2."
    page.one("#message").send_keys("Hello", Keys.ENTER)
    assert page.driver.switch_to.active_element.get_attribute("id") == "set-temperature"
    assert server.engine.requests == []
    assert page.one("#message").get_property("value") == "Hello"
    page.fill("#set-temperature", "0.5")
    page.fill("#set-tools", '{"name": "f", "parameters": {"type": "array"}}')
    page.one("#message").send_keys(Keys.ENTER)
    refused = page.one(".note.failed")
    assert "tools[0].function.parameters" in refused.text
    page.fill("#set-tools", "")
    page.click("#example-schema")
    page.fill("#set-seed", "7")
    answer = '{"name": "Ada", "age": 36}'
    server.says("Hello", Script(turn(server.encoding, text=answer)))
    page.click(".note.failed .button")
    page.until(lambda: '"age": 36' in page.text(".turn.answer figure.code code"))
    page.answered()
    sampling = server.engine.requests[-1].sampling
    assert (sampling.temperature, sampling.seed) == (0.5, 7)
    assert '"additionalProperties"' in server.prompts()[-1]
    page.shows(width=1280, height=860, theme="dark")
    page.screenshot("settings-dark")


def test_a_reload_keeps_the_conversation(page: Page, server: PageServer) -> None:
    encoding = server.encoding
    server.says("Hello", Script(turn(encoding, reasoning="A greeting.", text="Hello there!")))
    page.send("Hello")
    page.answered()
    ids = turn(encoding, text="one two three four five six")
    server.says("Count", Script(ids, gate_after=len(ids) - 3), gated=True)
    page.send("Count")
    page.until(lambda: "one two" in page.text("#turns"))
    page.open(keep=True)
    page.until(lambda: "Hello there!" in page.text("#turns"))
    assert "one two" in page.text("#turns")
    assert "The page was closed while this answer arrived." in page.text(".note.failed")
    assert page.text("#conversations .conversation") == "Hello"
    page.click("#new-chat")
    page.until(lambda: page.one("#empty"))
    page.click("#conversations .conversation")
    page.until(lambda: "Hello there!" in page.text("#turns"))
    page.click("[aria-label='Delete Hello']")
    page.until(lambda: not page.all("#conversations .conversation"))
    page.click(".notice .button")
    page.until(lambda: page.all("#conversations .conversation"))


def test_keyboard_only(page: Page, server: PageServer) -> None:
    server.says("Hello", Script(turn(server.encoding, text="Hello there!")))
    page.press("Hello", Keys.ENTER)  # the message has the focus
    page.answered()
    page.chord(Keys.ALT, "n")
    page.until(lambda: page.one("#empty"))
    page.chord(Keys.ALT, "s")
    assert page.driver.switch_to.active_element.get_attribute("id") == "set-system"
    page.chord(Keys.ALT, "s")
    page.until(lambda: not page.driver.find_element("id", "settings").is_displayed())
    assert page.driver.switch_to.active_element.get_attribute("id") == "toggle-settings"
    page.press("?")
    assert "Keyboard shortcuts" in page.one("#shortcuts").text
    page.press(Keys.ESCAPE)
    page.press("/")
    assert page.driver.switch_to.active_element.get_attribute("id") == "message"
    page.driver.execute_script("document.activeElement.blur()")
    reached = []
    for _ in range(40):
        page.press(Keys.TAB)
        focused = page.driver.switch_to.active_element
        if focused.tag_name == "body":  # between the page's end and its beginning
            continue
        assert focused.accessible_name, f"{focused.get_attribute('outerHTML')} has no name"
        reached.append(focused.get_attribute("id") or focused.accessible_name)
        if reached[-1] == "message":
            break
    assert reached[-1] == "message"
    assert {"tab-chat", "theme", "new-chat", "toggle-settings"} < set(reached)
    page.chord(Keys.ALT, "1")
    page.press(Keys.ARROW_RIGHT)
    assert page.one("#cluster").is_displayed()
    assert page.text("#tab-cluster") == "Cluster"


def test_a_server_with_keys(page: Page, tmp_path: Path) -> None:
    """Where the API answers 401, the page asks for a key and keeps it for the tab."""
    with page_server(tmp_path, GatewayConfig(api_keys=("first",), stream_headers_s=60.0)) as server:
        server.says("Hello", Script(turn(server.encoding, text="Hello there!")))
        page = Page(page.driver, server)
        page.driver.get(server.url)
        page.one("#key").send_keys("wrong", Keys.ENTER)
        page.until(lambda: page.text("#model") == "needs a key")
        page.one("#key").clear()
        page.one("#key").send_keys("first", Keys.ENTER)
        page.until(lambda: page.text("#model") == "demo")
        stored = "return [sessionStorage.getItem('cantata:key'), localStorage.getItem('cantata:key')]"
        assert page.driver.execute_script(stored) == ["first", None]
        page.send("Hello")
        page.answered()
        assert "Hello there!" in page.text("#turns")
