"""The report in a real browser: Chromium, as the system has it. Where there is none the tests are skipped, in
continuous integration (the variable CI) they fail.

What the page looks like is left in outputs/test-artifacts: report.png, report-dark.png, report-print.png.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from compress.report.files import write_report
from compress.report.table import find_runs
from tests.report_runs import odd_runs, run_of, sweep, write_runs

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
    """The page, opened once: every test leaves it as it was."""
    with opened(browser, report) as page:
        yield page


@contextmanager
def opened(browser: Any, report: Path) -> Iterator[Any]:
    """At the end the page must have complained of nothing and asked for nothing but itself."""
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


def lines(page: Any, plot: str) -> dict[int, tuple[list[float], list[float]]]:
    """x and y of the line of each row."""
    found = page.evaluate(f"document.getElementById('{plot}').data.map(t => [t.meta, t.x, t.y])")
    return {row: (x, y) for row, x, y in found}


def test_odd_runs(browser: Any, tmp_path: Path) -> None:
    """A line is of one engine; a mix is in none but its own; what is asked for twice is drawn once."""
    runs = find_runs([write_runs(tmp_path / "outputs", odd_runs())])
    engines, fast = (
        {(p["batch"], p["input_length"]): p for p in runs[i]["candidate"]["speed"]["points"][:4]}
        for i in (0, 2)
    )
    with opened(browser, write_report(runs, None, tmp_path / "r")[0]) as page:
        ttft = lines(page, "ttft")
        assert ttft[1][0] == ttft[3][0] == [128, 512]
        again = runs[0]["candidate"]["speed"]["points"][5]["ttft_ms"]
        assert ttft[1][1] == pytest.approx(
            [(engines[1, 128]["ttft_ms"] + again) / 2, engines[1, 512]["ttft_ms"]], rel=1e-4
        )
        throughput = lines(page, "throughput")
        speeds = [fast[batch, 128]["tokens_per_s"] for batch in (1, 8)]
        assert throughput[3][1] == pytest.approx(speeds, rel=1e-4)
        keys = page.locator("#choose-at option").all_text_contents()
        (mix,) = (i for i, key in enumerate(keys) if "16-512/2-32" in key)
        page.select_option("#choose-at", str(mix))
        assert lines(page, "throughput")[1] == ([1], [180])
        assert page.locator("#throughput .gtitle").text_content() == (
            "Throughput, 16-512/2-32 tokens in/out"
        )
        (vllm,) = (i for i, key in enumerate(keys) if "batch 8, 512/32" in key and "vllm" in key)
        page.select_option("#choose-at", str(vllm))
        assert lines(page, "throughput")[1][0] == [1, 8]
        # The same without the point that was refused.
        assert lines(page, "ttft")[1][0] == [512]
        assert 3 not in lines(page, "throughput")


def test_without_a_speed_the_rest_is_drawn(browser: Any, tmp_path: Path) -> None:
    run = run_of("x")
    for row in ("base", "candidate"):
        del run[row]["speed"]
    runs = find_runs([write_runs(tmp_path / "outputs", [run])])
    with opened(browser, write_report(runs, None, tmp_path / "r")[0]) as page:
        assert drawn(page, "by-size") == 2
        assert page.locator("#throughput.empty").inner_text() == "Nothing of this was measured."
        assert drawn(page, "block-kl", ".scatterlayer .js-line") == 1
        page.click("#open")
        eventually(page, "document.querySelectorAll('#run-1 .main-svg').length >= 20")
        assert page.locator("#run-1 details.recipe pre").is_visible()


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
    # A plot that was away still leads to its runs.
    mark = page.locator("#by-size .scatterlayer .points path").nth(2)
    mark.scroll_into_view_if_needed()
    box = mark.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    eventually(page, "document.querySelectorAll('details.run[open]').length === 1")
    page.evaluate("document.querySelector('details.run[open]').open = false")


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
