"""The report in a real browser: Chromium, as the system has it. Where there is none the tests are skipped, in
continuous integration (the variable CI) they fail.

What the page looks like is left in outputs/test-artifacts: report.png, report-dark.png, report-print.png.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compress.report.files import write_report
from compress.report.table import find_runs
from tests.report_runs import run_of, sweep, write_runs

ARTIFACTS = Path(__file__).parents[3] / "outputs" / "test-artifacts"
BROWSERS = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser")
EVIL = "x</script><script>window.evil=1</script><img src=x onerror=window.evil=1>\"'<b>a&amp;b"
COUNT = 12


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        if "CI" in os.environ:
            pytest.fail(f"none of {', '.join(BROWSERS)} is installed")
        pytest.skip("no browser")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    made = [*sweep(COUNT), run_of(EVIL, model=EVIL, kl=0.2, seed=90)]
    runs = find_runs([write_runs(folder / "outputs", made)])
    return write_report(runs, {"kl": 0.05}, folder / "r")[0]


@pytest.fixture(scope="module")
def page(browser: Any, report: Path) -> Iterator[Any]:
    """The page, opened once: every test leaves it as it was. At the end it must have complained of nothing
    and asked for nothing but itself."""
    page = browser.new_page(viewport={"width": 1400, "height": 900}, color_scheme="light")
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url))
    page.goto(report.as_uri())
    yield page
    assert page.evaluate("window.evil") is None
    assert said == [report.as_uri()]
    page.close()


def eventually(page: Any, expression: str) -> None:
    """Waits until it is true, for seconds at most. Playwright's way needs eval, which the page forbids."""
    for _ in range(100):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"never true: {expression}")


def heights(page: Any, plot: str = "by-size") -> list[float]:
    """The y values of the candidates and originals of a plot of points."""
    return page.evaluate(
        f"document.getElementById('{plot}').data.filter(t => t.meta !== undefined).map(t => t.y[0])"
    )


def drawn(page: Any, plot: str, what: str = ".scatterlayer .points path") -> int:
    return page.locator(f"#{plot} {what}").count()


def test_plots_are_drawn(page: Any) -> None:
    rows = COUNT + 3
    plots = page.locator("figure.plot").count() - page.locator("details figure.plot").count()
    assert page.locator("figure.plot .main-svg").count() >= 2 * plots
    assert page.locator(".plot.empty").count() == 0
    assert drawn(page, "by-size") == drawn(page, "by-speed") == rows
    # Two sizes of batch, two lengths; a box a row; three panels.
    assert drawn(page, "throughput") == drawn(page, "ttft") == 2 * rows
    assert drawn(page, "total", ".boxlayer .box") == rows
    assert drawn(page, "predicted") == 3 * rows
    assert drawn(page, "itl", ".scatterlayer .js-line") == 2 * rows
    assert drawn(page, "block-kl", ".scatterlayer .js-line") == COUNT + 1
    # Nothing sticks out to the right.
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=ARTIFACTS / "report.png", full_page=True)


def test_the_front_and_the_intervals(page: Any) -> None:
    first = page.evaluate("document.getElementById('by-size').data[0]")
    assert first["mode"] == "lines"
    assert first["x"] == sorted(first["x"])
    assert first["y"] == sorted(first["y"], reverse=True)
    bars = page.evaluate("document.getElementById('by-size').data.find(t => t.meta === 1).error_y")
    data = page.evaluate("JSON.parse(document.getElementById('data').textContent).accuracy[0]")
    assert bars["array"][0] == pytest.approx(data["high"][1] - data["values"][1])
    assert bars["arrayminus"][0] == pytest.approx(data["values"][1] - data["low"][1])


def test_choices_change_what_is_drawn(page: Any) -> None:
    accuracy = page.evaluate("JSON.parse(document.getElementById('data').textContent).accuracy")
    titles = [measure["title"] for measure in accuracy]
    options = page.locator("#choose-y option").all_text_contents()
    assert options == [
        title.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") for title in titles
    ]
    before = heights(page)
    for index in range(1, len(titles)):
        page.select_option("#choose-y", str(index))
        now = heights(page)
        assert now != before
        known = [value for value in accuracy[index]["values"] if value is not None]
        assert now == (known if not accuracy[index]["log"] else [v for v in known if v > 0])
        before = now
    x = "document.getElementById('by-speed').data.find(t => t.meta === 1).x[0]"
    ratio = page.evaluate(x)
    page.select_option("#choose-rate", "1")
    assert page.evaluate(x) > 20 * ratio
    title = page.locator("#ttft .gtitle")
    assert title.text_content() == "Time to the first token, batch 1"
    page.select_option("#choose-at", "1")
    assert title.text_content() == "Time to the first token, batch 8"
    for name in ("y", "rate", "at"):
        page.select_option(f"#choose-{name}", "0")


def test_rows_can_be_left_out(page: Any) -> None:
    page.uncheck("[data-row='3']")
    assert drawn(page, "by-size") == COUNT + 2
    page.click("#none")
    assert page.locator("#by-size.empty").inner_text() == "Nothing to show."
    page.click("#all")
    assert drawn(page, "by-size") == COUNT + 3


def test_columns_sort(page: Any) -> None:
    table = page.locator("#tables table").first
    column = table.locator("th", has_text="MB").first
    for state, reverse in (("ascending", False), ("descending", True)):
        column.locator("button").press("Enter")
        assert column.get_attribute("aria-sort") == state
        sizes = [float(x) for x in table.locator("tbody td:nth-child(3)").all_text_contents()]
        assert sizes == sorted(sizes, reverse=reverse)
    kl = table.locator("th", has_text="KL").first
    kl.locator("button").click()
    index = kl.evaluate("cell => cell.cellIndex") + 1
    found = table.locator(f"tbody td:nth-child({index})").all_text_contents()
    measured = [float(x.split()[0]) for x in found if x != "-"]
    assert measured == sorted(measured)
    assert found[len(measured) :] == ["-"] * (len(found) - len(measured))


def test_details_open_with_their_figures(page: Any) -> None:
    details = page.locator("#run-1")
    assert details.locator(".main-svg").count() == 0
    details.locator("summary").first.click()
    details.locator(".main-svg").first.wait_for()
    figures = details.locator("figure").count()
    assert figures == 10
    eventually(page, "document.querySelectorAll('#run-1 .main-svg').length >= 20")
    assert details.locator(".heatmaplayer image").count() == 6
    details.locator("details.recipe summary").click()
    assert "group_size: 64" in details.locator("pre").inner_text()


def test_names_are_shown_as_they_are(page: Any) -> None:
    last = page.locator("#runs label").last
    assert EVIL in last.inner_text()
    assert EVIL in page.locator("#answers h3").last.inner_text()
    page.locator("#by-size").scroll_into_view_if_needed()
    mark = page.locator("#by-size .scatterlayer .points path").last.bounding_box()
    page.mouse.move(mark["x"] + mark["width"] / 2, mark["y"] + mark["height"] / 2)
    hover = page.locator("#by-size .hoverlayer .hovertext")
    hover.wait_for()
    text = hover.text_content()
    assert "onerror=window.evil=1" in text
    assert "scheme: {bits: 4, group_size: 64}" in text


def test_dark(page: Any) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    ink = "document.querySelector('#by-size .xtitle').style.fill"
    light, light_ink = page.evaluate(background), page.evaluate(ink)
    page.click("#theme")
    assert page.locator("#theme").get_attribute("aria-pressed") == "true"
    assert page.evaluate(background) != light
    assert page.evaluate(ink) != light_ink
    page.screenshot(path=ARTIFACTS / "report-dark.png", full_page=True)
    page.click("#theme")
    assert (page.evaluate(background), page.evaluate(ink)) == (light, light_ink)
    page.emulate_media(color_scheme="dark")
    eventually(page, f"{background} !== '{light}'")
    page.emulate_media(color_scheme="light")
    eventually(page, f"{background} === '{light}'")


def test_print(page: Any) -> None:
    """On paper it is light, whatever the screen is, and two plots fit beside each other."""
    page.click("#theme")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    eventually(page, "document.querySelector('#by-size .xtitle').style.fill === 'rgb(0, 0, 0)'")
    assert page.locator("nav").is_hidden()
    assert page.locator("#by-size .main-svg").first.get_attribute("width") == "505"
    page.screenshot(path=ARTIFACTS / "report-print.png", full_page=True)
    assert len(page.pdf(prefer_css_page_size=True)) > 50_000
    page.emulate_media(media="screen")
    page.click("#theme")
    eventually(page, "document.querySelector('#by-size .main-svg').getAttribute('width') > 505")
