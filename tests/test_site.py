"""The site of `make docs` in a browser, and the notebook: need the extra `docs` and Chromium."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from running import COMMON, SMALL

ROOT = Path(__file__).parent.parent
BROKEN = "[...document.images].filter(image => !image.naturalWidth).map(image => image.src)"
LOAD = """all => Promise.all(all.map(video => new Promise((done, fail) => Object.assign(video, {
    oncanplay: done, onerror: () => fail(video.src), preload: "auto" }).load())))"""


@pytest.mark.long
def test_every_page_in_a_browser(tmp_path):
    """Stops dead links, broken pictures, videos, requests elsewhere, pages too wide for a phone."""
    api, faults = pytest.importorskip("playwright.sync_api"), []
    build = f"-m mkdocs build --strict --site-dir {tmp_path}"
    subprocess.run([sys.executable, *build.split()], cwd=ROOT, check=True)

    def answer(route):
        path = tmp_path / route.request.url.removeprefix("http://site/")
        if path.is_file():
            return route.fulfill(path=path)
        faults.append(route.request.url)
        route.abort()

    with api.sync_playwright() as p:
        page = p.chromium.launch(executable_path=shutil.which("chromium")).new_page()
        page.route("**", answer)
        page.on("console", lambda message: faults.append(message.text))
        for index in tmp_path.rglob("index.html"):
            page.goto(f"http://site/{index.relative_to(tmp_path)}")
            page.eval_on_selector_all("video", LOAD)
            for width in (390, 1400):
                page.set_viewport_size({"width": width, "height": 900})
                wide = page.evaluate("document.documentElement.scrollWidth") - width
                assert (wide, page.evaluate(BROKEN), faults) == (0, [], []), (index, width)


@pytest.mark.long
def test_the_notebook_runs(monkeypatch):
    """Stops a cell that no longer runs in a new kernel, or that shows nothing."""
    client, form = map(pytest.importorskip, ("nbclient", "nbformat"))
    monkeypatch.setenv("TRY_IT_PPO", f"{COMMON} {SMALL['ppo']}")
    monkeypatch.setenv("TRY_IT_EPISODES", "2")
    cells = client.execute(form.read(ROOT / "docs/try_it.ipynb", 4), cwd=ROOT).cells
    shown = [kind for cell in cells for o in cell.get("outputs", ()) for kind in o.get("data", ())]
    assert {"image/png", "text/html", "text/markdown"} <= {*shown}
