"""The index of many registrations, in a real browser, from a file."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.browser.chromium import Open, serious
from tests.pages.test_index import add, summary
from tests.pages.test_scans import evaluated  # noqa: F401 (a fixture)
from voxelmorph_monai.pages.cohort import save_index

MANY = 2000


def icon(folder: Path) -> None:
    Image.fromarray(np.zeros((30, 60), np.uint8)).save(folder / "report.png")


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(12):
        add(tmp_path, f"sub-{i:02}", summary(0.4 if i == 5 else 0.8 + 0.001 * i, sdlogj=rng.normal(0.3, 0.01)))
        icon(tmp_path / f"sub-{i:02}")
    add(tmp_path, 'Zoë "<b>&', summary(None))
    (tmp_path / "cohort.csv").write_text("name,status,reason\nlost,failed,no brain in it\n", encoding="utf-8")
    for path in tmp_path.glob("*/report.html"):
        path.write_text(path.read_text(encoding="utf-8").replace("/9j/2Q==", "AAAA"), encoding="utf-8")
    save_index(tmp_path)
    return tmp_path / "index.html"


def names(page: Any) -> list[str]:
    found: list[str] = page.eval_on_selector_all("#pairs .name", "all => all.map((each) => each.textContent)")
    return found


def test_search_filter_and_sort(show: Open, cohort: Path) -> None:
    page = show(cohort)
    assert names(page)[0] == "lost"  # what failed is on top
    assert len(names(page)) == 14
    page.fill("#search", "sub-1")
    assert names(page) == ["sub-10", "sub-11"]
    page.fill("#search", "zoë")
    assert names(page) == ['Zoë "<b>&']
    page.fill("#search", "")
    page.click('[data-sort="1"] button')  # Dice after
    order = names(page)
    assert order[:2] == ["sub-05", "sub-00"]
    assert set(order[-2:]) == {"lost", 'Zoë "<b>&'}  # what has none comes last, either way
    assert page.get_attribute('[data-sort="1"]', "aria-sort") == "ascending"
    page.click('[data-sort="1"] button')
    assert names(page)[0] == "sub-11"
    assert set(names(page)[-2:]) == {"lost", 'Zoë "<b>&'}
    page.click("text=Filter by measures")
    page.fill('[data-high="1"]', "0.5")
    assert names(page) == ["sub-05"]
    page.fill('[data-high="1"]', "")
    page.select_option("#which", "failed")
    assert names(page) == ["lost"]
    page.select_option("#which", "odd")
    assert names(page) == ["sub-05"]
    page.fill("#search", "nobody")
    assert "No pair" in page.inner_text("#shown")


def test_walk_decide_and_keep(show: Open, cohort: Path) -> None:
    page = show(cohort)
    page.keyboard.press("j")
    assert page.inner_text("#detail-title") == "lost"
    assert "no brain in it" in page.inner_text("#detail-body")
    for key in "jja":
        page.keyboard.press(key)
    chosen = page.inner_text("#detail-title")
    page.keyboard.press("j")
    page.keyboard.press("r")
    page.keyboard.press("n")
    page.keyboard.type('left, "cut" jar')  # letters that are keys elsewhere
    page.keyboard.press("Escape")
    rejected = page.inner_text("#detail-title")
    page.keyboard.press("k")
    assert page.inner_text("#detail-title") == chosen
    assert "1 accepted, 1 rejected, 12 undecided" in page.inner_text("#counts")
    page.reload()
    assert "1 accepted, 1 rejected, 12 undecided" in page.inner_text("#counts")
    with page.expect_download() as download:
        page.click("#export")
    saved = cohort.with_name("saved.csv")
    download.value.save_as(saved)
    with saved.open(encoding="utf-8", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert rows[chosen]["decision"] == "accept"
    assert rows[rejected]["decision"] == "reject"
    assert rows[rejected]["note"] == 'left, "cut" jar'
    page.evaluate("localStorage.clear()")
    page.reload()
    assert "0 accepted, 0 rejected" in page.inner_text("#counts")
    with saved.open("a", encoding="utf-8") as file:
        file.write("stranger,accept,\nsub-00,perhaps,\n")
    page.set_input_files("#import", saved)
    page.wait_for_function("document.getElementById('message').textContent !== ''")
    assert (
        page.inner_text("#message")
        == "2 decisions read, 1 of pairs that are not in this index, 1 that are neither accept nor reject."
    )
    assert "1 accepted, 1 rejected" in page.inner_text("#counts")
    page.click(f'#pairs button:text-is("{rejected}")')
    assert page.input_value("#note") == 'left, "cut" jar'
    page.keyboard.press("r")  # once more takes it back
    assert "1 accepted, 0 rejected" in page.inner_text("#counts")


def test_plots(show: Open, cohort: Path) -> None:
    page = show(cohort)
    assert "12 pairs" in page.inner_text("#plot-text")
    counted = page.eval_on_selector_all(
        "#plot rect title", "all => all.map((t) => parseInt(t.textContent.split(': ')[1]))"
    )
    assert sum(counted) == 12
    page.locator("#plot rect").first.click()
    assert names(page) == ["sub-05"]
    page.fill('[data-low="1"]', "")
    page.fill('[data-high="1"]', "")
    page.select_option("#up", "5")
    assert page.locator("#plot circle").count() == 12
    page.locator("#plot circle.odd").first.dispatch_event("click")
    assert page.inner_text("#detail-title") == "sub-05"
    assert page.locator("#picture img").get_attribute("src") == "sub-05/report.png"


def test_pages_of_the_list_and_the_other_controls(show: Open, tmp_path: Path) -> None:
    for i in range(120):
        add(tmp_path, f"sub-{i:03}", summary(0.5 + 0.001 * i), page=i < 3)
    save_index(tmp_path)
    page = show(tmp_path / "index.html")
    assert page.inner_text("#shown") == "1 to 50 of 120"
    assert page.is_disabled("#previous")
    page.click("#next")
    page.click("#next")
    assert page.inner_text("#shown") == "101 to 120 of 120"
    assert page.is_disabled("#next")
    page.click("#previous")
    assert names(page)[0] == "sub-050"
    page.keyboard.press("/")
    page.keyboard.type("sub-00")
    assert len(names(page)) == 10
    page.fill("#search", "")
    page.click("text=Filter by measures")
    page.fill('[data-low="1"]', "0.6185")
    assert names(page) == ["sub-119"]
    page.fill('[data-low="1"]', "")
    page.click('#pairs button:text-is("sub-002")')
    page.click('[data-decide="accept"]')
    assert page.get_attribute('[data-decide="accept"]', "aria-pressed") == "true"
    page.select_option("#which", "accept")
    assert names(page) == ["sub-002"]
    page.select_option("#which", "open")
    assert page.inner_text("#shown") == "1 to 50 of 119"
    page.click('[data-decide="reject"]')
    page.select_option("#which", "reject")
    assert names(page) == ["sub-002"]
    page.select_option("#across", "0")
    assert page.inner_text("#plot-text").startswith("Dice before: 1 pair")
    with page.context.expect_page() as opened:
        page.keyboard.press("o")
    assert opened.value.url.endswith("/sub-002/report.html")


def test_the_median_of_an_even_number_lies_between(show: Open, tmp_path: Path) -> None:
    for name, dice in zip("abcd", (0.2, 0.4, 0.8, 0.9), strict=True):
        add(tmp_path, name, summary(dice), page=False)
    save_index(tmp_path)
    assert "median 0.600, 0.200 to 0.900" in show(tmp_path / "index.html").inner_text("#plot-text")


def test_on_a_phone_a_chosen_pair_is_in_sight(show: Open, cohort: Path) -> None:
    page = show(cohort, 390)
    assert page.is_hidden("#detail")  # nothing is chosen
    row = page.locator("#pairs tbody tr", has_text="sub-05")
    assert "Dice after 0.400" in " ".join(
        row.locator("td.number").evaluate_all(
            "all => all.map((each) => getComputedStyle(each, '::before').content.slice(1, -1) + each.textContent)"
        )
    )
    assert "no brain in it" in page.locator("#pairs tbody tr", has_text="lost").inner_text()
    row.locator(".name button").click()
    box = page.locator("#detail-title").bounding_box()
    assert 0 <= box["y"] < 900
    assert page.locator('[data-decide="accept"]').is_visible()


def test_boxes_say_what_they_are_and_lead_to_pairs(show: Open, evaluated: Path) -> None:  # noqa: F811
    save_index(evaluated)
    page = show(evaluated / "index.html")
    assert page.locator("#box g.before").count() == page.locator("#box g.after").count() == 3
    told = page.locator("#box g.after title").all_text_contents()
    assert told[0].startswith("left thalamus, after: median 0.8")
    assert told[1].endswith("19 pairs")
    beyond = page.locator("#box circle.after").filter(has_text="m04 to f")
    assert beyond.count() == 3
    beyond.first.dispatch_event("click")
    assert page.inner_text("#detail-title") == "m04 to f"
    page.click("text=As a table")
    assert page.locator("#box-table tr").count() == 1 + 3 * 2
    assert page.locator("#pairs tbody td").first.is_hidden()  # nothing has a picture
    assert serious(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (1440, "dark"), (390, "light"), (390, "dark")])
def test_nobody_is_kept_out(show: Open, cohort: Path, width: int, scheme: str) -> None:
    page = show(cohort, width, color_scheme=scheme)
    page.keyboard.press("j")
    page.keyboard.press("a")
    assert serious(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_thousands_stay_fluid(show: Open, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(MANY):
        add(tmp_path, f"sub-{i:04}", summary(rng.normal(0.8, 0.02), sdlogj=rng.normal(0.3, 0.02)), page=False)
    save_index(tmp_path)
    assert (tmp_path / "index.html").stat().st_size < 2e6
    page = show(tmp_path / "index.html")
    assert len(names(page)) == 50
    timed = """async (key) => {
        const box = document.getElementById("search"), times = [];
        for (const text of ["s", "su", "sub", "sub-", "sub-1", "sub-", ""]) {
            const start = performance.now();
            if (key) document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
            else { box.value = text; box.dispatchEvent(new Event("input")); }
            document.body.getBoundingClientRect(); // laid out anew
            times.push(performance.now() - start);
        }
        return Math.min(...times); // what else the machine does only adds
    }"""
    assert page.evaluate(timed, None) < 200  # ms
    for key in ("j", "k", "a"):
        assert page.evaluate(timed, key) < 200
    assert "2000" in page.inner_text("#shown")
