"""A dashboard of its own, and headless Chromium to look at it."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, expect

ROOT = Path(__file__).parents[1]
OUTPUT = Path(__file__).parent / "output"
CHROMIUM = os.environ.get("LAYERSHAP_CHROMIUM", "/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# The machine may be busy: what is expected is waited for.
expect.set_options(timeout=30_000)
START_SECONDS, LOAD_MS = 120, 180_000
# Adds up what moved of the page without the visitor having caused it (the web's Cumulative Layout
# Shift); what Gradio shows before the page is there is not the page's.
WATCH_SHIFTS = """
window.shifts = [];
const OWN = '#guide, #model-line, #set-up, #run-bar, #layer-strip, #views';
const own = ({ node }) => (node?.closest ? node : node?.parentElement)?.closest(OWN);
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) {
    if (!entry.hadRecentInput && entry.sources.some(own)) window.shifts.push(entry.value);
  }
}).observe({ type: 'layout-shift', buffered: true });
"""


@contextmanager
def dashboard(cache: Path, name: str = "app") -> Iterator[str]:
    """`python app.py` with a cache folder; its address. Its output goes to tests/output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    OUTPUT.mkdir(exist_ok=True)
    with (OUTPUT / f"{name}.log").open("w") as log:
        app = subprocess.Popen(
            [sys.executable, "app.py", "--port", str(port)],
            cwd=ROOT,
            env={**os.environ, "LAYERSHAP_CACHE": str(cache)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            deadline = time.monotonic() + START_SECONDS
            while time.monotonic() < deadline and app.poll() is None:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            app.terminate()
            app.wait(30)


def open_page(
    browser: Browser, address: str, width: int = 1440, height: int = 1000, scheme: str = "light"
) -> Page:
    """A visitor's page, once the model is loaded; `page.errors` collects what went wrong in it."""
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, accept_downloads=True
    )
    page = context.new_page()
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda said: page.errors.append(said.text) if said.type == "error" else None)
    page.add_init_script(WATCH_SHIFTS)
    page.goto(address)
    expect(page.locator("#status")).to_contain_text("Ready", timeout=LOAD_MS)
    return page


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def layer(page: Page, number: int):
    """A layer's button in the strip."""
    return page.locator(f'#layer-strip [data-player="{number}"]')


def shifted(page: Page) -> float:
    """How much of the page has moved by itself so far (Cumulative Layout Shift)."""
    return page.evaluate("window.shifts.reduce((sum, shift) => sum + shift, 0)")


def shot(page: Page, name: str) -> None:
    """Keep a picture of the whole page."""
    page.wait_for_timeout(800)
    page.screenshot(path=OUTPUT / f"{name}.png", full_page=True)
