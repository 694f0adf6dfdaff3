"""The docs site in a real browser: pages, figures, search, light and dark, and not one request to the outside.

Builds the site into a temporary folder, or takes the one named by DOCS_SITE. Screenshots go to the folder named by DOCS_SCREENSHOTS.
"""
import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: `pip install playwright`")
browser_file = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not browser_file, reason="no Chromium on this machine")
root = Path(__file__).parent.parent.parent


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope="module")
def docs_site(tmp_path_factory):
    "The built site: its folder."
    if given := os.environ.get("DOCS_SITE"): return Path(given)
    folder = tmp_path_factory.mktemp("docs") / "site"
    built = subprocess.run([sys.executable, root / "scripts" / "build_docs.py", "--site", folder, "--no-readme"], cwd=root, capture_output=True, text=True, timeout=900)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def docs_url(docs_site):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=docs_site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def docs_browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=browser_file, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(docs_browser, docs_url):
    "Opens a page and returns it; in the end nothing may have failed, been said on the console, or been asked of another host."
    context, faults = docs_browser.new_context(viewport=dict(width=1360, height=900), color_scheme="light"), []
    context.on("request", lambda r: None if r.url.startswith((docs_url, "data:", "blob:")) else faults.append(f"asked for {r.url}"))
    context.on("response", lambda r: faults.append(f"{r.status} {r.url}") if r.status >= 400 else None)
    context.on("console", lambda m: faults.append(f"console: {m.text}") if m.type in ("error", "warning") else None)
    context.on("weberror", lambda e: faults.append(f"script: {e.error}"))
    def go(path):
        page = context.new_page()
        page.goto(docs_url + path); page.wait_for_load_state("networkidle")
        return page
    yield go
    context.close()
    assert faults == []


def shoot(page, name):
    if folder := os.environ.get("DOCS_SCREENSHOTS"): Path(folder).mkdir(parents=True, exist_ok=True); page.screenshot(path=Path(folder) / f"docs_{name}.png")


def figures_are_drawn(page):
    "Scrolls through the page, since figures load when they come into view; returns how many there are."
    figures = page.locator("img.nb-figure")
    for i in range(figures.count()):
        figures.nth(i).scroll_into_view_if_needed()
        page.wait_for_function("i => { const f = document.querySelectorAll('img.nb-figure')[i]; return f.complete && f.naturalWidth > 50 }", arg=i, timeout=5000)
    page.evaluate("window.scrollTo(0, 0)")
    return figures.count()


def fits(page): return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_home(visit, docs_site):
    page = visit("index.html")
    assert page.locator("h1").inner_text().strip("¶ ") == "rasa_nb" and figures_are_drawn(page) >= 1 and fits(page)
    shoot(page, "home")
    sections = page.locator(".md-nav--primary > ul > li > .md-nav__link, .md-nav--primary > ul > li > label.md-nav__link").all_inner_texts()
    assert {"Home", "Images", "Removing position", "Studies", "Tutorials"} <= {s.strip() for s in sections}
    linked = {a.split("#")[0] for a in page.locator(".md-nav--primary a.md-nav__link").evaluate_all("all => all.map(a => a.href.split('/').slice(3).join('/'))")}
    assert {p.relative_to(docs_site).as_posix() for p in docs_site.rglob("*.html")} - {"404.html"} <= linked   # every page is in the navigation


def test_api_page(visit):
    page = visit("rasa.html#rasa")
    assert page.locator("h3#rasa").inner_text().strip("¶ ") == "RASA" and page.locator("h3#rasa").is_visible()
    signature = page.locator("h3#rasa ~ .api-signature").first
    assert "rank:str='evidence'" in signature.inner_text() and "random_state" in signature.inner_text()
    box = page.locator("math").first.bounding_box()   # mathematics has a size, so it is laid out
    assert page.locator("math").count() > 3 and box["width"] > 2 and box["height"] > 2
    shoot(page, "api")
    signature.locator("a", has_text="position_targets").first.click(); page.wait_for_load_state("networkidle")
    assert page.url.endswith("#position_targets") and page.locator("h3#position_targets").is_visible()
    assert figures_are_drawn(page) >= 1 and fits(page)


def test_tutorial(visit):
    page = visit("tutorials/your_own_encoder.html")
    assert page.locator("h1").inner_text().strip("¶ ") == "Your own encoder" and figures_are_drawn(page) >= 1 and fits(page)
    page.locator("img.nb-figure").first.scroll_into_view_if_needed()
    shoot(page, "tutorial")
    page.locator("article a", has_text="RASA").last.click(); page.wait_for_load_state("networkidle")
    assert page.url.endswith("/rasa.html")


def test_search_has_hits(visit):
    page = visit("index.html")
    page.locator("input.md-search__input").click()
    page.keyboard.type("position_r2", delay=20)
    hits = page.locator(".md-search-result__item")
    hits.first.wait_for(timeout=15000)
    page.wait_for_function("/[1-9]\\d*/.test(document.querySelector('.md-search-result__meta').innerText)")
    shoot(page, "search")
    assert hits.count() >= 2 and any("measures.html" in h for h in page.locator(".md-search-result__item a").evaluate_all("all => all.map(a => a.href)"))
    hits.first.locator("a").first.click(); page.wait_for_load_state("networkidle")
    assert page.locator("h1").is_visible()


def test_dark_and_light(visit):
    page = visit("segmentation.html")
    ground = lambda: page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = ground()
    page.locator("label[for^='__palette']:visible").first.click()
    page.wait_for_function("document.body.dataset.mdColorScheme == 'slate'")
    assert ground() != light and page.evaluate("getComputedStyle(document.querySelector('img.nb-figure')).backgroundColor") == "rgb(255, 255, 255)"
    assert figures_are_drawn(page) >= 2
    page.locator(".nb-html table").last.scroll_into_view_if_needed()
    shoot(page, "dark")
    page.reload(); page.wait_for_load_state("networkidle")
    assert page.evaluate("document.body.dataset.mdColorScheme") == "slate"   # it is remembered
    page.locator("label[for^='__palette']:visible").first.click()
    page.wait_for_function("document.body.dataset.mdColorScheme == 'default'")


def test_on_a_narrow_screen(visit):
    page = visit("segmentation.html")
    page.set_viewport_size(dict(width=400, height=800))
    page.wait_for_timeout(300)
    assert fits(page), "something is wider than the screen; tables and code have to scroll by themselves"
    page.locator(".nb-html table").last.scroll_into_view_if_needed()
    shoot(page, "narrow")
