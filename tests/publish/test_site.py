"""The pages of models and runs in a real browser: sorted, drawn, in the dark, on a phone, and talking to nobody.

Needs playwright and an installed Chromium: make test-site. Without them the tests are skipped, and say so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from delta_suite.claims.loader import load_hypotheses
from delta_suite.paths import bundled
from delta_suite.publish.board import build
from delta_suite.publish.leaderboard import files, write
from delta_suite.publish.site.run_page import standalone

from tests.publish.browser import MARKS, PHONE, opened
from tests.publish.conftest import (
    make_place,
    trained,
    turned,
    with_boundaries,
    with_calibration,
    with_intervals,
    with_transfer,
)
from tests.publish.test_leaderboard import marked

LONG = "organisation/a-model-of-a-very-long-name-instruct-2507-checkpoint-143000"

CLAIMS = sum(len(hypothesis.expect) for hypothesis in load_hypotheses([bundled("hypotheses")]))

pytestmark = MARKS


def slow(record: dict[str, Any]) -> None:
    record["provenance"]["seconds"].update(load=900.0)
    with_intervals(record)


@pytest.fixture(scope="module")
def site(measured: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = make_place(tmp_path_factory.mktemp("site") / "repository", measured)
    place.add("zeta", change=slow)
    place.add("alpha", change=with_boundaries)
    place.add("alpha", file="core", change=with_calibration("core", "e" * 64), arrays=with_transfer)
    place.add(LONG, change=lambda record: record["provenance"]["seconds"].update(load=12.0))
    board = marked(place.board())
    write(place.results, files(board))
    return place.results / "site"


@pytest.fixture(scope="module")
def run_site(measured: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a training run of three checkpoints."""
    place = make_place(tmp_path_factory.mktemp("run") / "repository", measured)
    for step in (0, 10, 100):
        place.add(f"big--checkpoint-{step}", change=trained(step))
    write(place.results, files(turned(place.board())))
    return place.results / "site"


def column(tab: Any, table: str, index: int) -> list[str]:
    texts: list[str] = tab.locator(f"#{table} tbody tr:not([hidden]) > :nth-child({index + 1})").all_inner_texts()
    return [text.strip() for text in texts]


def test_columns_sort_both_ways_by_mouse_and_by_keyboard(browser: Any, site: Path) -> None:
    with opened(browser, site, "index.html") as tab:
        for heading in tab.locator("details > summary", has_text="What these models share").all():
            heading.click()
        tables = tab.locator("table[id^='models-']").all()
        table = str(next(t.get_attribute("id") for t in tables if t.locator("tbody tr").count() == 3))
        head = [text.strip() for text in tab.locator(f"#{table} thead th").all_inner_texts()]
        seconds = next(index for index, text in enumerate(head) if text.startswith("seconds"))
        header = tab.locator(f"#{table} thead th").nth(seconds)
        assert column(tab, table, 0) == ["alpha", LONG, "zeta"]
        header.locator("button").click()
        assert header.get_attribute("aria-sort") == "ascending"
        values = [float(text) for text in column(tab, table, seconds)]
        assert values == sorted(values)
        assert values[-1] > 900
        header.locator("button").focus()
        tab.keyboard.press("Enter")
        assert header.get_attribute("aria-sort") == "descending"
        assert column(tab, table, 0)[0] == "zeta"
        assert tab.locator(f"#{table} th[aria-sort]").count() == 1


def test_every_plot_is_drawn_and_follows_the_variant(browser: Any, site: Path) -> None:
    with opened(browser, site, "models/alpha.html") as tab:
        plots = tab.locator(".plot")
        assert plots.count() == 4 + 5  # two measurements; one has the transfer matrix
        for plot in plots.all():
            assert plot.get_attribute("data-drawn") == "raw light"
            assert plot.locator("svg.main-svg").count() > 0
            assert plot.locator(".heatmaplayer image, .scatterlayer path.js-line").count() > 0
            box = plot.locator("svg.main-svg").first.bounding_box()
            assert box["width"] > 300
            assert box["height"] > 300
        texts = tab.locator(".plot[data-plot='cosines'] .annotation-text").all_text_contents()
        assert {"C", "E"} <= set(texts)
        heat_map = tab.locator(".plot[data-plot='cosines']").first
        before = heat_map.evaluate("div => JSON.stringify(div.data[0].z)")
        tab.locator("select").nth(0).select_option("centred")
        tab.wait_for_selector(".plot[data-drawn='centred light'] >> nth=3")
        assert heat_map.evaluate("div => JSON.stringify(div.data[0].z)") != before
        drawn = [plot.get_attribute("data-drawn") for plot in plots.all()]
        assert sorted(set(drawn)) == ["centred light", "raw light"]  # the other measurement stays as it was


def test_bands_show_the_intervals(browser: Any, site: Path) -> None:
    with opened(browser, site, "models/zeta.html") as tab:
        drawn = "all => all.map(path => path.getBBox()).filter(box => box.width > 100 && box.height > 5).length"
        assert tab.locator(".plot[data-plot='ranks'] .fills path").evaluate_all(drawn) == 3
        title = tab.locator(".plot[data-plot='ranks'] .xtitle").bounding_box()
        legend = tab.locator(".plot[data-plot='ranks'] .legend").bounding_box()
        assert title["y"] + title["height"] <= legend["y"]  # the legend lies below, not over the axis


def run_page(site: Path) -> str:
    (page,) = (site / "trajectories").iterdir()
    return page.relative_to(site).as_posix()


def test_a_training_run_is_drawn_and_follows_what_is_chosen(browser: Any, run_site: Path) -> None:
    with opened(browser, run_site, run_page(run_site)) as tab:
        plot = tab.locator(".plot")
        assert plot.get_attribute("data-drawn") == "raw intra_cosine linear light"
        phases = plot.evaluate("div => div.data.map(line => line.name)")
        assert {"A", "C", "D", "E"} <= set(phases)
        assert plot.locator(".scatterlayer path.js-line").count() == len(phases)
        assert plot.locator(".scatterlayer path.yerror").count() == 3 * len(phases)
        tab.get_by_label("Metric", exact=True).select_option("gamma")
        tab.get_by_label("Variant", exact=True).select_option("centred")
        tab.get_by_label("Steps", exact=True).select_option("log")
        tab.wait_for_selector(".plot[data-drawn='centred gamma log light']")
        axes = plot.evaluate("div => [div.layout.yaxis.title.text, div._fullLayout.xaxis.type]")
        assert axes == ["gamma [stream units]", "log"]
        assert column(tab, tab.locator("table[id^='checkpoints-']").get_attribute("id"), 0) == ["0", "10", "100"]
        changes = tab.locator("h4 + ul li").all_inner_texts()
        assert changes[0].endswith(": PASS -> FAIL at step 10 (still PASS at 0)")


def test_the_page_of_a_run_alone_needs_no_other_file(browser: Any, run_site: Path, tmp_path: Path) -> None:
    results = run_site.parent
    board = build(results, load_hypotheses([results.parent / "hypotheses"]))
    (run,) = board.groups[0].runs
    (tmp_path / "alone.html").write_text(standalone(run.name, run.entries, "sink_free"), "utf-8")
    context = browser.new_context()
    tab = context.new_page()
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto((tmp_path / "alone.html").as_uri())
    tab.wait_for_selector(".plot[data-drawn='sink_free intra_cosine linear light']")
    assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [(tmp_path / "alone.html").as_uri()]
    assert [link.get_attribute("href") for link in tab.locator("a").all()] == ["#main"]
    context.close()


def test_a_phone_shows_a_training_run_without_sideways_scrolling(browser: Any, run_site: Path) -> None:
    with opened(browser, run_site, run_page(run_site), **PHONE) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth") == 360


def test_a_phone_needs_no_sideways_scrolling(browser: Any, site: Path) -> None:
    with opened(browser, site, "models/alpha.html", **PHONE) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth") == 360
        for plot in tab.locator(".plot svg.main-svg").all():
            assert plot.bounding_box()["width"] <= 360
        table = tab.locator(".scroll").first
        assert table.evaluate("div => getComputedStyle(div).overflowX") == "auto"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser: Any, site: Path, scheme: str) -> None:
    """WCAG 2.2 AA: 4.5 to 1 for text, 3 to 1 for the marks of verdicts that are not also a word."""
    with opened(browser, site, "models/alpha.html", color_scheme=scheme) as tab:
        names = ("--ink", "--paper", "--soft", "--muted", "--link")
        style = "getComputedStyle(document.documentElement)"
        colours = {name: tab.evaluate(f"{style}.getPropertyValue('{name}').trim()") for name in names}
        for text in ("--ink", "--muted", "--link"):
            for ground in ("--paper", "--soft"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        ink = tab.locator(".plot[data-plot='ranks'] .xtitle").first.evaluate("e => getComputedStyle(e).fill")
        wanted = ", ".join(str(int(colours["--ink"][i : i + 2], 16)) for i in (1, 3, 5))
        assert ink == f"rgb({wanted})"


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_the_plots_follow_a_change_of_scheme(browser: Any, site: Path) -> None:
    with opened(browser, site, "models/zeta.html", color_scheme="light") as tab:
        tab.emulate_media(color_scheme="dark")
        tab.wait_for_selector(".plot[data-drawn='raw dark'] >> nth=3")
        assert tab.locator(".plot[data-drawn='raw light']").count() == 0


def test_verdicts_are_words_and_signs_and_not_colours_alone(browser: Any, site: Path) -> None:
    with opened(browser, site, "models/alpha.html") as tab:
        signs = {"✓": "PASS", "✗": "FAIL", "!": "WARN", "?": "INCONCLUSIVE", "–": "NOT MEASURED"}
        seen = set()
        for text in tab.locator(".verdict").all_text_contents():  # those of folded claims, too
            sign, word = text.split(maxsplit=1)
            assert word.startswith(signs[sign]), text
            seen.add(signs[sign])
        assert {"PASS", "INCONCLUSIVE", "NOT MEASURED"} <= seen
        assert "vacuous" in tab.locator("ul.verdicts").first.text_content()
        assert "reliability: 3 of 4 layers below 0.9" in tab.locator("ul.verdicts").first.text_content()


def test_without_scripts_every_number_is_still_there(browser: Any, site: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto((site / "models" / "alpha.html").as_uri())
    assert tab.locator("table[id^='multiverse-'] tbody tr").count() == 2 * CLAIMS
    assert "need JavaScript" in tab.locator("noscript").first.inner_text()
    context.close()
