"""A headless browser for the tests in this folder: the system's Chromium or Chrome, driven by playwright.

    make test-browser                                       # installs playwright, runs everything here
    python -m pytest tests/browser --screenshots DIR        # keeps the screenshots
"""
import shutil
from pathlib import Path

import pytest

HERE = ("http://localhost", "http://127.0.0.1", "ws://localhost", "ws://127.0.0.1", "blob:", "data:", "file:", "about:")
BROWSERS = "chromium chromium-browser google-chrome google-chrome-stable chrome".split()


def pytest_addoption(parser):
    parser.addoption("--screenshots", metavar="DIR", help="keep the screenshots of the browser tests in this folder")


@pytest.fixture(scope="session")
def browser():
    "A headless browser that can reach this machine and no other."
    sync = pytest.importorskip("playwright.sync_api", reason="browser tests need playwright: pip install -e '.[browser]'")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None: pytest.skip(f"browser tests need one of {', '.join(BROWSERS)} on the path: install Chromium or Chrome")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    "A fresh page; `page.requested` lists the addresses it asked for, `page.outside()` those not on this machine, `page.problems` the errors it logged."
    context = browser.new_context(viewport=dict(width=1280, height=900), accept_downloads=True)
    page = context.new_page()
    page.requested, page.problems = [], []
    page.outside = lambda: [address for address in page.requested if not address.startswith(HERE)]
    context.on("request", lambda request: page.requested.append(request.url))
    page.on("websocket", lambda socket: page.requested.append(socket.url))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
    yield page
    context.close()


@pytest.fixture(scope="session")
def screenshots(request, tmp_path_factory):
    "The folder for screenshots: that of `--screenshots`, or a temporary one."
    wanted = request.config.getoption("--screenshots")
    folder = Path(wanted).absolute() if wanted else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
