"""The first page, the comparison and the hypothesis files in a real browser, and every page for every reader.

Needs playwright, axe and an installed Chromium: make test-site. Without them the tests are skipped, and say so.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import quote, unquote, urljoin, urlsplit
from urllib.request import urlopen

import pytest
from delta_suite.claims.loader import load_hypotheses
from delta_suite.paths import bundled
from delta_suite.publish.leaderboard import files, write

from tests.publish.browser import MARKS, PHONE, opened
from tests.publish.conftest import (
    Measured,
    make_place,
    trained,
    turned,
    with_boundaries,
    with_calibration,
    with_intervals,
)
from tests.publish.test_leaderboard import marked

pytestmark = MARKS

CLAIMS = sum(len(hypothesis.expect) for hypothesis in load_hypotheses([bundled("hypotheses")]))

PAGES = (
    *("index.html", "compare.html", "hypotheses/phase-c.html", "models/alpha.html"),
    "trajectories/big--checkpoint-RUN.html",
)


def of_family(record: dict[str, Any]) -> None:
    with_intervals(record)
    record["model"].update(architecture="GPT2LMHeadModel")


@pytest.fixture(scope="module")
def site(measured: Measured, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site with its records, away from the results folder that it was built in."""
    place = make_place(tmp_path_factory.mktemp("first") / "repository", measured)
    place.add("zeta", change=of_family)
    place.add("alpha", change=with_boundaries)
    place.add("alpha", file="core", change=with_calibration("core", "e" * 64))
    for step in (0, 10, 100):
        place.add(f"big--checkpoint-{step}", change=trained(step))
    write(place.results, files(turned(marked(place.board(with_records=True)))))
    alone = tmp_path_factory.mktemp("served") / "site"
    shutil.copytree(place.results / "site", alone)
    (run,) = (alone / "trajectories").iterdir()
    run.rename(run.with_name("big--checkpoint-RUN.html"))  # a name with a hash in it, known to these tests
    for page in alone.rglob("*.html"):
        page.write_text(page.read_text("utf-8").replace(quote(run.name), "big--checkpoint-RUN.html"), "utf-8")
    return alone


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """The address of a bare web server that has the site's folder alone."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def rows(tab: Any) -> list[str]:
    """The names of the rows that are shown."""
    names: list[str] = tab.locator(".board:not([hidden]) tbody:not([hidden])").evaluate_all(
        "all => all.map(body => body.dataset.name).filter(Boolean)"
    )
    return sorted(names)


def test_a_mark_tells_its_figures_on_hover_and_on_focus(browser: Any, address: str) -> None:
    with opened(browser, address, "index.html") as tab:
        marks = tab.locator("tbody[data-name='zeta'] .mark")
        mark, second = marks.nth(0), marks.nth(1)
        assert tab.locator("#detail").is_hidden()
        mark.hover()
        text = tab.locator("#detail").inner_text()
        assert text.startswith(
            "zeta: FAIL\nboundaries/declared-among-the-best: boundary_cost_rank over model <= 0.05\n"
        )
        tab.locator("tbody[data-name='zeta'] .mark[data-detail*='observed']").first.hover()
        text = tab.locator("#detail").inner_text()
        assert "\nobserved " in text
        assert "\nmargin " in text
        tab.keyboard.press("Escape")
        assert tab.locator("#detail").is_hidden()
        mark.focus()
        tab.keyboard.press("ArrowRight")
        assert second.evaluate("mark => mark === document.activeElement")
        assert second.get_attribute("aria-describedby") == "detail"
        assert "INCONCLUSIVE" in tab.locator("#detail").inner_text()
        tab.keyboard.press("Enter")
        tab.wait_for_selector("details[open]")
        assert "/models/zeta.html#" in tab.url
        claims = tab.locator("ul.verdicts details[open]")
        assert claims.count() == 1
        assert claims.get_attribute("id") == urlsplit(tab.url).fragment


def test_the_signs_beside_a_mark_do_not_cover_its_symbol(browser: Any, address: str) -> None:
    with opened(browser, address, "index.html") as tab:
        room = tab.evaluate(
            """() => [...document.querySelectorAll("a.mark")].filter(mark => mark.getClientRects().length).map(mark => {
                mark.querySelector("b")?.remove();
                const signs = mark.appendChild(document.createElement("b"));
                signs.textContent = "*\u25b3";
                const symbol = document.createRange();
                symbol.selectNodeContents([...mark.childNodes].find(node => node.nodeType === Node.TEXT_NODE));
                return signs.getBoundingClientRect().left - symbol.getBoundingClientRect().right;
            })"""
        )
        assert len(room) > CLAIMS
        assert min(room) >= 0


def test_a_finger_shows_the_figures_and_then_goes_on(browser: Any, address: str) -> None:
    with opened(browser, address, "index.html", **PHONE) as tab:
        tab.locator("tbody[data-name='zeta'] .mark").first.tap()
        assert tab.locator("#detail").inner_text().startswith("zeta: FAIL")
        tab.locator("#detail a").tap()
        tab.wait_for_url("**/models/zeta.html#*")


def test_a_training_run_is_one_row_that_unfolds(browser: Any, address: str) -> None:
    with opened(browser, address, "index.html") as tab:
        run = tab.locator("tbody[data-name='big--checkpoint-*']")
        assert run.locator("tr:visible").count() == 1
        button = run.get_by_role("button", name="3 checkpoints")
        assert button.get_attribute("aria-expanded") == "false"
        changed = run.locator("tr").first.locator(".mark").first
        assert "△" in changed.inner_text()
        changed.hover()
        assert "PASS -> FAIL at step 10" in tab.locator("#detail").inner_text()
        button.focus()
        tab.keyboard.press("Enter")
        assert run.locator("tr:visible").count() == 4
        steps = [text.strip() for text in run.locator("tr:visible th a").all_inner_texts()]
        assert steps == [*("big--checkpoint-*", "big--checkpoint-0", "big--checkpoint-10", "big--checkpoint-100")]


def test_rows_are_filtered_and_the_address_keeps_it(browser: Any, address: str) -> None:
    with opened(browser, address, "index.html") as tab:
        assert rows(tab) == ["alpha", "alpha", "big--checkpoint-*", "zeta"]
        tab.get_by_label("Family", exact=True).select_option("GPT2")
        assert rows(tab) == ["zeta"]
        assert tab.locator("#shown").inner_text() == "1 of 4 rows"
        assert tab.url.endswith("?family=GPT2")
        tab.get_by_role("button", name="Show all").click()
        tab.wait_for_function("location.search === ''")
        assert len(rows(tab)) == 4
        tab.get_by_label("Calibration", exact=True).select_option("core")
        assert rows(tab) == ["alpha"]
        tab.get_by_role("button", name="Show all").click()
        tab.get_by_label("Hypothesis", exact=True).select_option("phase-e")
        assert tab.locator("tbody[data-name='zeta'] .mark:visible").count() == 4
        tab.get_by_label("Model", exact=True).fill("zet")
        assert rows(tab) == ["zeta"]
        kept = tab.url.removeprefix(f"{address}/")
    with opened(browser, address, kept) as tab:
        assert rows(tab) == ["zeta"]
        assert tab.get_by_label("Hypothesis", exact=True).input_value() == "phase-e"
        assert tab.locator(".matrix thead tr:last-child th:visible").count() == 4
    with opened(browser, address, "index.html?verdict=WARN&size=nonsense") as tab:
        shown = tab.locator("tbody:not([hidden]) .mark:visible:not(.faded)")
        assert {mark.get_attribute("data-word") for mark in shown.all()} <= {"WARN"}
        assert tab.get_by_label("Size", exact=True).input_value() == ""


def test_any_two_models_are_compared_and_the_address_keeps_it(browser: Any, address: str) -> None:
    with opened(browser, address, "compare.html") as tab:
        options = {o.inner_text(): o.get_attribute("value") for o in tab.locator("#pair-a option").all()}
        one, other = options["zeta"], options["big--checkpoint-10"]
        tab.locator("#pair-a").select_option(one)
        tab.locator("#pair-b").select_option(other)
        assert tab.locator("#comparison h2").all_inner_texts() == ["zeta", "big--checkpoint-10"]
        assert tab.locator("#comparison svg[role='img']").count() == 2
        table = tab.locator("#comparison table").first
        assert table.locator("tbody tr").count() == CLAIMS
        assert "✗ FAIL" in table.locator("tbody tr").first.inner_text()
        assert "different tables" not in tab.locator("#comparison").inner_text()
        kept = tab.url.removeprefix(f"{address}/")
        seed, core = (o.get_attribute("value") for o in tab.locator("#pair-b option", has_text="alpha").all())
    with opened(browser, address, kept) as tab:
        assert tab.locator("#comparison h2").all_inner_texts() == ["zeta", "big--checkpoint-10"]
        tab.get_by_role("button", name="Swap").click()
        assert tab.locator("#comparison h2").all_inner_texts() == ["big--checkpoint-10", "zeta"]
    with opened(browser, address, f"compare.html?a={quote(seed)}&b={quote(core)}") as tab:
        note = tab.locator("#comparison .note").inner_text()
        assert "different tables" in note
        assert "calibration: " in note


def test_a_claim_leads_to_its_line(browser: Any, address: str) -> None:
    with opened(browser, address, "index.html") as tab:
        tab.locator(".matrix thead a", has_text="few-ranks").first.click()
        tab.wait_for_url("**/hypotheses/phase-c.html#L*")
        line = tab.locator(f"[id='{urlsplit(tab.url).fragment}']")
        assert "[[expect]]" in line.inner_text()
        assert line.evaluate("line => line.getBoundingClientRect().top < innerHeight")


class Links(HTMLParser):
    """What a page links to and loads, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.links += [str(values[name]) for name in ("href", "src") if name in values]
        self.anchors |= {str(values["id"])} if "id" in values else set()


def test_no_link_is_dead_where_the_folder_is_served_alone(site: Path, address: str) -> None:
    pages = {path.relative_to(site).as_posix(): Links(path.read_text("utf-8")) for path in site.rglob("*.html")}
    assert len(pages) == 2 + 4 + 5 + 1
    known: dict[str, bool] = {}
    for name, page in pages.items():
        for link in page.links:
            target = urlsplit(urljoin(f"{address}/{quote(name)}", link))
            if target.scheme == "data":
                continue
            assert f"http://{target.netloc}" == address, link
            path = target.path.lstrip("/")
            if path not in known:
                with urlopen(f"{address}/{path}") as answer:  # a dead link raises
                    known[path] = answer.status == 200
            if target.fragment and path.endswith(".html"):
                assert unquote(target.fragment) in pages[unquote(path)].anchors, (name, link)
    assert sum(path.startswith("records/") for path in known) == 6
    assert {"leaderboard.csv", "leaderboard.json"} <= set(known)


@pytest.mark.parametrize("page", PAGES)
def test_axe_finds_nothing_at_any_width_or_in_the_dark(browser: Any, address: str, page: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed: make test-site")
    for width, scheme in ((360, "light"), (768, "dark"), (1400, "light")):
        options = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
        with opened(browser, address, page, **options) as tab:
            tab.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
            result = axe.Axe().run(tab)
            assert result.violations_count == 0, result.generate_report()
            assert tab.evaluate("document.documentElement.scrollWidth") == width


def test_the_first_plot_on_a_phone_lies_within_two_screens(browser: Any, address: str) -> None:
    for page, plot in (("index.html", ".spark"), ("models/alpha.html", ".plot"), ("compare.html", "svg.profile")):
        with opened(browser, address, page, **PHONE) as tab:
            box = tab.locator(plot).first.bounding_box()
            assert box["y"] + min(box["height"], 200) <= 2 * 740, page


def test_the_keyboard_reaches_everything_and_is_seen(browser: Any, address: str) -> None:
    with opened(browser, address, "index.html") as tab:
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.className") == "skip"
        assert tab.locator(".skip").bounding_box()["x"] >= 0
        tab.keyboard.press("Enter")
        assert tab.evaluate("document.activeElement.id") == "main"
        kinds = set()
        for _ in range(60):
            tab.keyboard.press("Tab")
            kinds.add(tab.evaluate("document.activeElement.localName"))
            width = tab.evaluate("getComputedStyle(document.activeElement).outlineWidth")
            assert float(width.removesuffix("px")) >= 2
        assert {"summary", "input", "select", "div", "button", "a"} <= kinds
        # A table of marks is one stop; from there on arrows lead.
        assert tab.locator(".matrix .mark[tabindex='0']").count() == tab.locator(".matrix").count()


def test_nothing_can_leave_the_page(browser: Any, site: Path) -> None:
    """The policy refuses a script, a picture and a call to elsewhere, even where the page itself tries."""
    context = browser.new_context()
    tab = context.new_page()
    asked: list[str] = []
    context.route("http*://**", lambda route: (asked.append(route.request.url), route.abort()))
    tab.goto((site / "index.html").as_uri())
    refused = tab.evaluate(
        """async () => {
          const seen = [];
          addEventListener("securitypolicyviolation", (event) => seen.push(event.effectiveDirective));
          await fetch("https://example.org/").catch(() => 0);
          new Image().src = "https://example.org/x.png";
          const script = document.createElement("script");
          script.src = "https://example.org/x.js";
          document.head.append(script);
          await new Promise((done) => setTimeout(done, 300));
          return seen.sort();
        }"""
    )
    assert refused == ["connect-src", "img-src", "script-src-elem"]
    assert asked == []
    context.close()


def test_without_scripts_every_mark_is_there(browser: Any, address: str) -> None:
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(f"{address}/index.html")
    assert tab.locator(".matrix .mark:visible").count() == (2 + 1 + 1 + 3) * CLAIMS  # a run is one row more
    context.close()
