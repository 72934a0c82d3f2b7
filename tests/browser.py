"""Headless Chromium, and the server behind `make ui`: what a person has on the screen."""

import os
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from project import Project, clean_environment, python
from tracker import free_port, wait_for

CHROME_ON_MACOS = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", CHROME_ON_MACOS)
OPTIONS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip

WAIT = 60_000  # milliseconds for something to appear on a page: a busy machine takes many seconds


def find_browser() -> str:
    """The path of Chromium. Where there is none the test is skipped, in continuous integration it fails."""
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    message = f"none of {', '.join(BROWSERS)} is on PATH; on Debian: apt-get install chromium"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@contextmanager
def started_browser() -> Iterator[Browser]:
    """Chromium without a network: it knows no host but this one."""
    path = find_browser()
    expect.set_options(timeout=WAIT)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=OPTIONS)
        yield browser
        browser.close()


@contextmanager
def new_page(browser: Browser) -> Iterator[Page]:
    """A page of a browser that has never been used; fails at the end if the page asked another host for something."""
    context = browser.new_context(viewport={"width": 1400, "height": 900}, color_scheme="light")
    elsewhere: list[str] = []

    def note(address: str) -> None:
        parts = urlsplit(address)
        if parts.scheme in ("http", "https", "ws", "wss") and parts.hostname != "127.0.0.1":
            elsewhere.append(address)

    context.on("request", lambda request: note(request.url))
    context.set_default_timeout(WAIT)
    page = context.new_page()
    page.on("websocket", lambda socket: note(socket.url))
    yield page
    context.close()
    assert elsewhere == []


def take_screenshot(page: Page, path: Path) -> None:
    """Save a picture of the page when it has come to rest: two in a row are the same."""
    deadline = time.monotonic() + WAIT / 1000
    before = None
    while (picture := page.screenshot()) != before:
        assert time.monotonic() < deadline, f"the page does not come to rest: {page.url}"
        before = picture
        page.wait_for_timeout(300)
    path.write_bytes(picture)


@contextmanager
def mlflow_pages(project: Project) -> Iterator[str]:
    """The address of the project's runs in MLflow's pages, as `make ui` prints it, while it serves them."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    log = project.root.parent / "server.log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            [python(), "-m", "classifier", "ui", "--port", str(port)],
            cwd=project.root, env=clean_environment(project.root.parent),
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        ) as process,
    ):  # fmt: skip
        try:
            wait_for(lambda: process.poll() is not None or answers(f"{address}/health"))
            assert process.poll() is None, log.read_text()
            (runs,) = re.findall(r"^Runs: (\S+)$", log.read_text(), re.MULTILINE)
            yield runs
        finally:
            process.terminate()


def answers(address: str) -> bool:
    """Whether a server answers there at all."""
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except (URLError, ConnectionError, TimeoutError):
        return False
