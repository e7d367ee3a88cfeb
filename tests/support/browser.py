"""A gateway for a browser, and headless Chromium that drives its page."""

import asyncio
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from cluster.config import GatewayConfig
from cluster.frontend.http_server import HttpServer
from cluster.harmony.encoding import HarmonyEncoding
from tests.support.fake_engine import FakeEngine, Script
from tests.support.gateway import make_encoding, serving
from workers.request import EngineRequest

T = TypeVar("T")
WAIT_S = 60
"""Bound of every wait for the page; a test that passes waits for milliseconds."""
SCREENSHOTS = Path(sys.prefix) / "screenshots"
"""Folder of the screenshots that tests take, in the virtual environment, which git ignores."""


@dataclass
class PageServer:
    """A gateway over a fake engine, in a thread with an event loop of its own.

    Attributes:
        engine: in the loop's thread; its `requests` and `cancelled` may be read from others.
        scripts: script of an answer by a text that its prompt contains.
    """

    url: str
    encoding: HarmonyEncoding
    engine: FakeEngine
    loop: asyncio.AbstractEventLoop
    http_server: HttpServer
    scripts: dict[str, Script] = field(default_factory=dict)

    def says(self, text: str, script: Script, *, gated: bool = False) -> Script:
        """Answer prompts that contain the text; of several the one whose text stands last.

        Args:
            gated: the script stops at its gate until `open_gate`, or until its client leaves.
        """
        script.gate = asyncio.Event() if gated else None
        self.scripts[text] = script
        return script

    def open_gate(self, script: Script) -> None:
        """Let a gated script go on."""
        assert script.gate is not None
        self.loop.call_soon_threadsafe(script.gate.set)

    def cut_connections(self) -> None:
        """Reset all connections of clients, as a server does that dies."""

        def cut() -> None:
            for connection in list(self.http_server.server_state.connections):
                connection.transport.abort()

        self.loop.call_soon_threadsafe(cut)

    def prompts(self) -> list[str]:
        """Return the prompts of all requests since `forget`, as texts."""
        return [
            self.encoding.decode(request.prompt_token_ids, skip_special_tokens=False)
            for request in self.engine.requests
        ]

    def forget(self) -> None:
        """Forget scripts, requests and cancellations."""
        self.scripts.clear()
        self.engine.requests.clear()
        self.engine.cancelled.clear()

    def answer(self, request: EngineRequest) -> Script:
        """Return the script of a request."""
        prompt = self.encoding.decode(request.prompt_token_ids)
        found = [(prompt.rfind(text), script) for text, script in self.scripts.items() if text in prompt]
        assert found, f"no script for the prompt: {prompt[-300:]}"
        return max(found, key=lambda entry: entry[0])[1]


@contextmanager
def page_server(folder: Path, config: GatewayConfig | None = None) -> Iterator[PageServer]:
    """Serve the page until the block ends."""
    config = config or GatewayConfig(stream_headers_s=60.0)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="page server")
    thread.start()
    stop = asyncio.Event()
    started: asyncio.Queue[PageServer] = asyncio.Queue()

    async def serve() -> None:
        encoding = make_encoding(folder)
        engine = await FakeEngine(max_model_len=4096).start()
        try:
            async with serving(encoding, [engine], config=config, model_name="demo") as gateway:
                server = PageServer(gateway.url, encoding, engine, loop, gateway.http_server)
                engine.answer = server.answer
                await started.put(server)
                await stop.wait()
        finally:
            await engine.stop()

    serving_task = asyncio.run_coroutine_threadsafe(serve(), loop)
    try:
        yield asyncio.run_coroutine_threadsafe(started.get(), loop).result(WAIT_S)
    finally:
        loop.call_soon_threadsafe(stop.set)
        serving_task.result(WAIT_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(WAIT_S)
        loop.close()


@contextmanager
def chromium(folder: Path) -> Iterator[webdriver.Chrome]:
    """Start headless Chromium, which reaches loopback only."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("chromium and chromium-driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in (
        "--headless=new",
        "--no-sandbox",  # tests may run as root, in a container
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-extensions",
        "--no-first-run",
        "--force-prefers-reduced-motion",  # nothing is drawn while nothing happens
        "--force-color-profile=srgb",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1280,860",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = webdriver.Chrome(options=options, service=Service(driver))
    try:
        running.set_script_timeout(WAIT_S)
        running.set_page_load_timeout(WAIT_S)
        yield running
    finally:
        running.quit()


class Page:
    """The page in the browser, as a user sees it."""

    def __init__(self, driver: webdriver.Chrome, server: PageServer) -> None:
        self.driver = driver
        self.server = server

    def open(self, path: str = "/", *, keep: bool = False) -> None:
        """Load the page.

        Args:
            keep: with what the browser stored; by default with nothing.
        """
        if not keep:
            self.driver.get(f"{self.server.url}/health")
            self.driver.execute_script("localStorage.clear(); sessionStorage.clear()")
            self.driver.get_log("browser")
        self.driver.get(f"{self.server.url}{path}")
        self.until(lambda: self.text("#model") == "demo")

    def all(self, selector: str) -> list[WebElement]:
        """Return the elements of a CSS selector."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        """Return the only visible element of a selector, once it is there."""
        return self.until(lambda: next((found for found in self.all(selector) if found.is_displayed()), None))

    def text(self, selector: str) -> str:
        """Return the text of the first element, also of a hidden one; empty without one."""
        script = "return document.querySelector(arguments[0])?.textContent ?? ''"
        text: str = self.driver.execute_script(script, selector)
        return text

    def until(self, condition: Callable[[], T | None]) -> T:
        """Wait until a condition is true, and return its value."""
        ignored = (StaleElementReferenceException,)  # made again between two looks at it
        wait = WebDriverWait(self.driver, WAIT_S, poll_frequency=0.02, ignored_exceptions=ignored)
        waited: T = wait.until(lambda _: condition())
        return waited

    def click(self, selector: str) -> None:
        """Click the element of a selector."""
        self.one(selector).click()

    def press(self, *keys: str) -> None:
        """Press keys, where the focus is."""
        webdriver.ActionChains(self.driver).send_keys(*keys).perform()

    def chord(self, modifier: str, key: str) -> None:
        """Press a key with a modifier."""
        webdriver.ActionChains(self.driver).key_down(modifier).send_keys(key).key_up(modifier).perform()

    def send(self, text: str) -> None:
        """Type a message and send it."""
        self.one("#message").send_keys(text, Keys.ENTER)

    def fill(self, selector: str, text: str) -> None:
        """Put a text into a field, as a paste does."""
        self.driver.execute_script(
            "arguments[0].value = arguments[1];"
            "arguments[0].dispatchEvent(new Event('input', {bubbles: true}));",
            self.driver.find_element(By.CSS_SELECTOR, selector),
            text,
        )

    def answered(self, count: int = 1) -> None:
        """Wait until this many answers are shown and none arrives."""
        script = (
            "return ['.turn.answer', '.turn.arriving'].map((one) => document.querySelectorAll(one).length)"
        )
        self.until(lambda: self.driver.execute_script(script) == [count, 0])

    def requests(self) -> list[str]:
        """Return the addresses of what the page has loaded."""
        script = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
        loaded: list[str] = self.driver.execute_script(script)
        return loaded

    def complaints(self) -> list[str]:
        """Return what the browser's console says since the last call, without refused requests."""
        entries: list[dict[str, Any]] = self.driver.get_log("browser")
        return [entry["message"] for entry in entries if entry["source"] != "network"]

    def screenshot(self, name: str) -> None:
        """Store what is seen as a PNG in SCREENSHOTS."""
        SCREENSHOTS.mkdir(exist_ok=True)
        self.driver.save_screenshot(str(SCREENSHOTS / f"{name}.png"))

    def shows(self, *, width: int, height: int, theme: str = "light") -> None:
        """Show the page on a screen of this size, in pixels, and in these colours."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
