"""One server and one browser for all tests of the page."""

from collections.abc import Iterator

import pytest

from tests.support.browser import Page, PageServer, chromium, page_server


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    with page_server(tmp_path_factory.mktemp("tokenizer")) as server:
        yield server


@pytest.fixture(scope="session")
def shared_page(shared_server: PageServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield Page(driver, shared_server)


@pytest.fixture
def server(shared_server: PageServer) -> PageServer:
    """The server, without scripts of answers."""
    shared_server.forget()
    return shared_server


@pytest.fixture
def page(shared_page: Page, server: PageServer) -> Page:
    """The page as a new user sees it, on a laptop's screen."""
    shared_page.shows(width=1280, height=860)
    shared_page.open()
    return shared_page
