"""Every control of a registration's page does what it says, in a real browser, from a file."""

import base64
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.browser.chromium import Open, serious, wait_for_text
from tests.pages.bodies import SIDE, chest, grid_of, head, labels_of, registered, wave
from voxelmorph_monai.pages.registration import save_page
from voxelmorph_monai.pages.views import CT_WINDOWS, Views
from voxelmorph_monai.space.scan import Scan

SHIFT = 12.0  # mm that the moving head lies to the right


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pair_7") / "report.html"
    fixed, moving = head(grid_of("LPI")), head(grid_of("RAS"), centre=(SHIFT, 0, 0))
    matrix = np.eye(4)
    matrix[0, 3] = SHIFT
    labels = {"fixed_labels": labels_of(fixed), "moving_labels": labels_of(fixed)}
    registered(fixed, moving, matrix, wave(grid_of("RAS")), **labels).report(path)
    return path


def picture(page: Any, plane: int = 0, pane: int = 0) -> np.ndarray:
    """Pixels ``(rows, columns, 3)`` of a canvas, after the page has drawn what it wants to draw."""
    script = """([plane, pane]) => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => {
        const canvas = document.querySelectorAll(`figure[data-plane="${plane}"] canvas`)[pane];
        const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d");  // reading slows a canvas down
        copy.drawImage(canvas, 0, 0);
        const image = copy.getImageData(0, 0, canvas.width, canvas.height);
        done([canvas.width, canvas.height, btoa(Array.from(image.data, (x) => String.fromCharCode(x)).join(""))]);
    })))"""
    width, height, data = page.evaluate(script, [plane, pane])
    return np.frombuffer(base64.b64decode(data), np.uint8).reshape(height, width, 4)[..., :3].astype(int)


def choose(page: Any, mode: str) -> np.ndarray:
    page.click(f'[data-mode="{mode}"]')
    assert page.get_attribute(f'[data-mode="{mode}"]', "aria-pressed") == "true"
    return picture(page)


def inner(image: np.ndarray) -> np.ndarray:
    """Without the margins, where letters are."""
    rows, columns = image.shape[:2]
    return image[rows // 6 : -rows // 6, columns // 6 : -columns // 6]


def same(first: np.ndarray, second: np.ndarray) -> bool:
    # at the edge of what is clipped, scaling takes other neighbours
    return bool(np.percentile(np.abs(inner(first) - inner(second)), 99) <= 2)


def test_the_folder_names_the_page(show: Open, report: Path) -> None:
    page = show(report)
    assert page.inner_text("#place") == report.parent.name
    assert report.parent.name in page.title()
    assert report.parent.name not in report.read_text(encoding="utf-8")


def test_ways_to_compare(show: Open, report: Path) -> None:
    page = show(report)
    page.emulate_media(reduced_motion="reduce")  # nothing blinks by itself
    page.select_option("#second", "aligned")
    fixed = choose(page, "blink")
    page.click("#images-title")
    page.keyboard.press(" ")
    moving = picture(page)
    assert not same(fixed, moving)
    page.keyboard.press(" ")
    assert same(picture(page), fixed)
    slider, middle = choose(page, "slider"), fixed.shape[1] // 2
    assert same(slider[:, : middle - 3], fixed[:, : middle - 3])
    assert same(slider[:, middle + 3 :], moving[:, middle + 3 :])
    page.fill("#divider", "0")
    assert same(picture(page)[:, 5:], moving[:, 5:])
    board = choose(page, "checkerboard")
    squares = np.abs(inner(board) - inner(fixed)).max(axis=2) > 2
    assert 0.2 < squares.mean() / (np.abs(inner(moving) - inner(fixed)).max(axis=2) > 2).mean() < 0.8
    edges = choose(page, "edges")
    red = (edges[..., 0] - edges[..., 1] > 80).mean()
    assert 0.005 < red < 0.2
    assert "edges of" in page.inner_text("#legends")
    assert same(choose(page, "both"), fixed)
    assert same(picture(page, pane=1), moving)
    page.keyboard.press("s")
    assert same(picture(page), moving)
    page.keyboard.press("1")
    assert page.get_attribute('[data-mode="slider"]', "aria-pressed") == "true"
    assert page.is_hidden('figure[data-plane="0"] .pane:nth-of-type(2)')


def test_keys_choose_the_way_to_compare(show: Open, report: Path) -> None:
    page = show(report)
    page.emulate_media(reduced_motion="reduce")
    for key, mode in zip(
        "2345bb1", ("blink", "checkerboard", "edges", "both", "blink", "slider", "slider"), strict=True
    ):
        page.keyboard.press(key)
        pressed = page.eval_on_selector_all(
            "[data-mode][aria-pressed=true]", "all => all.map((each) => each.dataset.mode)"
        )
        assert pressed == [mode]


def test_either_image_can_be_chosen(show: Open, report: Path) -> None:
    page = show(report)
    choose(page, "both")
    shown = {}
    for name in ("fixed", "aligned", "warped"):
        page.select_option("#first", name)
        page.select_option("#second", name)
        shown[name] = picture(page)
        assert same(picture(page, pane=1), shown[name])
    assert not same(shown["fixed"], shown["aligned"])
    assert not same(shown["aligned"], shown["warped"])


def test_the_divider_is_dragged(show: Open, report: Path) -> None:
    page = show(report)
    page.select_option("#second", "aligned")
    before = picture(page)
    box = page.locator('figure[data-plane="0"] canvas').first.bounding_box()
    middle = box["y"] + 0.3 * box["height"]
    page.mouse.move(box["x"] + 0.5 * box["width"], middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.25 * box["width"], middle, steps=4)
    page.mouse.up()
    assert page.input_value("#divider") == "25"
    assert "Click a point" in page.inner_text("#readout")  # dragging is not clicking
    assert not same(picture(page), before)


def test_it_blinks_and_stops(show: Open, report: Path) -> None:
    page = show(report)
    page.select_option("#second", "aligned")
    first = choose(page, "blink")
    page.wait_for_timeout(900)
    assert not same(picture(page), first) or page.wait_for_timeout(700) or not same(picture(page), first)
    page.click("#running")
    assert page.inner_text("#running") == "Stopped"
    still = picture(page)
    page.wait_for_timeout(1500)
    assert same(picture(page), still)


def test_slices(show: Open, report: Path) -> None:
    page = show(report)
    before = [picture(page, plane) for plane in range(3)]
    page.fill("#slice-0", "2")
    wait_for_text(page, 'figure[data-plane="0"] output', "3 of 12")
    assert not same(picture(page, 0), before[0])
    assert same(picture(page, 1), before[1])
    page.focus('figure[data-plane="0"] canvas')
    page.keyboard.press("PageUp")
    wait_for_text(page, 'figure[data-plane="0"] output', "4 of 12")
    page.keyboard.press(",")
    wait_for_text(page, 'figure[data-plane="0"] output', "3 of 12")


def test_every_plane_has_its_slices_and_the_wheel_turns_them_with_shift(show: Open, report: Path) -> None:
    page = show(report)
    for plane in range(3):
        before = picture(page, plane)
        page.fill(f"#slice-{plane}", "9")
        wait_for_text(page, f'figure[data-plane="{plane}"] output', "10 of 12")
        assert not same(picture(page, plane), before)
    page.keyboard.press(".")
    for plane in range(3):
        wait_for_text(page, f'figure[data-plane="{plane}"] output', "11 of 12")
    page.hover('figure[data-plane="1"] canvas >> nth=0')
    page.keyboard.down("Shift")
    page.mouse.wheel(0, -100)
    page.keyboard.up("Shift")
    wait_for_text(page, 'figure[data-plane="1"] output', "10 of 12")
    page.focus('figure[data-plane="1"] canvas')
    page.keyboard.press("PageDown")
    wait_for_text(page, 'figure[data-plane="1"] output', "9 of 12")


def test_arrows_move_the_point(show: Open, report: Path) -> None:
    page = show(report)
    page.click('[data-mode="both"]')
    canvas = 'figure[data-plane="0"] canvas'
    box = page.locator(canvas).first.bounding_box()
    page.mouse.click(box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"])

    def point() -> np.ndarray:
        words = re.findall(r"Fixed scan (-?[\d.]+), (-?[\d.]+), (-?[\d.]+) mm", page.inner_text("#readout"))
        return np.array(words[0], float)

    start = point()
    for key, step in (("ArrowRight", (SIDE, 0, 0)), ("ArrowUp", (0, SIDE, 0)), ("ArrowLeft", (-SIDE, 0, 0))):
        page.focus(canvas)
        page.keyboard.press(key)
        assert np.allclose(point() - start, step, atol=0.11)  # written with one decimal
        start = point()
    assert "Label, fixed:" in page.inner_text("#readout")


def test_methods_are_copied(show: Open, report: Path) -> None:
    page = show(report, permissions=["clipboard-read", "clipboard-write"])
    page.click("#copy")
    page.wait_for_function("document.getElementById('copied').textContent !== ''")
    assert page.inner_text("#copied") == "Copied."
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith(page.inner_text("#methods-text"))
    assert "1. Balakrishnan" in copied


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    size, path = (84, 64, 50), tmp_path_factory.mktemp("ct") / "report.html"
    scan = chest(grid_of(size=size, spacing=(5.0, 5.0, 6.0)), size)
    result = registered(scan, scan)
    summary = {**result.measures(), "options": dict(result.options)}
    save_page(path, Views(result), result.volume_change, summary)
    return path


def test_a_ct_is_seen_in_its_windows(show: Open, ct: Path) -> None:
    page = show(ct)
    assert page.locator("#window option").all_text_contents()[0] == "soft tissue, \N{MINUS SIGN}160 to 240 HU"
    page.click('[data-mode="blink"]')
    page.click("#running")
    shown = []
    for number in range(len(CT_WINDOWS)):
        page.select_option("#window", str(number))
        shown.append(picture(page))
    dark = [float((image.max(axis=2) < 8).mean()) for image in shown]
    assert dark[0] > dark[1] + 0.3  # air and lungs are black in the first, and grey in the second
    assert not same(shown[1], shown[2])
    page.click("#images-title")
    page.keyboard.press("w")
    assert page.input_value("#window") == "0"
    page.select_option("#colour", "size")
    assert np.ptp(inner(picture(page)), axis=2).max() > 30  # lungs, too, are shown in colour
    assert "Hounsfield" in page.inner_text("#images")
    assert serious(page) == []


def test_a_slice_has_an_area(show: Open, tmp_path: Path) -> None:
    scan = head(grid_of())
    flat = Scan(scan.array[:, :, 24:25], scan.affine)
    result = registered(flat, flat)
    summary = {**result.measures(), "options": dict(result.options)}
    save_page(tmp_path / "report.html", Views(result), result.volume_change, summary)
    page = show(tmp_path / "report.html", 390)
    assert page.locator("#slice-0").is_hidden()
    page.select_option("#colour", "volume")
    assert "area of the moving tissue" in page.inner_text("#legends")
    box = page.locator("canvas").first.bounding_box()
    page.mouse.click(box["x"] + 0.4 * box["width"], box["y"] + 0.4 * box["height"])
    assert "Area +0 %" in page.inner_text("#readout")
    assert "Area, linear part" in page.inner_text("#numbers")
    wide = show(tmp_path / "report.html")
    wide.click('[data-mode="both"]')
    first, second = (wide.locator("canvas").nth(pane).bounding_box() for pane in (0, 1))
    assert first["y"] == second["y"]  # beside each other
    assert first["x"] + first["width"] < second["x"]
    assert first["height"] < 900
    assert "olume" not in page.inner_text("#tools") + page.inner_text("#numbers").replace("SDlogJ", "")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_grid_outlines_and_colours(show: Open, report: Path) -> None:
    page = show(report)
    plain = picture(page)
    for control, words in (
        ("#grid", "straight rows"),
        ("#outline-fixed", "fixed labels"),
        ("#outline-warped", "warped labels"),
    ):
        page.check(control)
        assert not same(picture(page), plain)
        assert words in page.inner_text("#legends")
        page.uncheck(control)
        assert same(picture(page), plain)
    for colour, words in (("volume", "%"), ("size", "displacement, mm")):
        page.select_option("#colour", colour)
        coloured = inner(picture(page))
        assert (np.ptp(coloured, axis=2) > 30).mean() > 0.02
        assert words in page.inner_text("#legends")
    page.select_option("#colour", "")
    page.click("#images-title")
    for key in "gocc":
        page.keyboard.press(key)
    assert page.is_checked("#grid")
    assert page.is_checked("#outline-fixed")
    assert page.input_value("#colour") == "size"


def test_a_click_finds_its_partner(show: Open, report: Path) -> None:
    page = show(report)
    page.click('[data-mode="both"]')
    page.select_option("#second", "aligned")
    box = page.locator('figure[data-plane="0"] canvas').first.bounding_box()
    page.mouse.click(box["x"] + 0.45 * box["width"], box["y"] + 0.5 * box["height"])

    def points() -> tuple[np.ndarray, np.ndarray]:
        words = page.inner_text("#readout")
        groups = re.findall(r"(-?[\d.]+), (-?[\d.]+), (-?[\d.]+) mm", words)
        return np.array(groups[0], float), np.array(groups[1], float)

    fixed, moving = points()
    true = fixed + np.array([SHIFT, 0, 0])
    assert np.abs(moving - true).max() < 1.2 * SIDE * 1.01  # the wave is at most 1.2 voxels high
    assert np.abs(moving - true).max() > 0.2
    assert "Displacement without the linear part" in page.inner_text("#readout")
    # a click on the partner in the other pane leads back
    second = page.locator('figure[data-plane="0"] canvas').nth(1)
    other = second.bounding_box()
    aligned = moving - np.array([SHIFT, 0, 0])
    data = page.evaluate("[data.box, data.affine]")
    (x0, x1), (y0, y1), _ = data[0]
    index = np.linalg.inv(np.array(data[1])) @ [*aligned, 1]
    at = (index[0] - x0 + 0.5) / (x1 - x0 + 1), 1 - (index[1] - y0 + 0.5) / (y1 - y0 + 1)
    page.mouse.click(other["x"] + at[0] * other["width"], other["y"] + at[1] * other["height"])
    assert np.abs(points()[0] - fixed)[:2].max() < 2.0  # mm: a pixel or so, and the slice is the nearest one


def test_warnings_are_on_the_page(show: Open, tmp_path: Path) -> None:
    fixed = head(grid_of("LPI"))
    matrix = np.diag([-1.0, 1, 1, 1])
    matrix[1, 3] = 20
    wrong = labels_of(fixed, (41, 2, 49, 10, 53, 17))
    registered(fixed, fixed, matrix, moving_labels=wrong).report(tmp_path / "report.html")
    page = show(tmp_path / "report.html")
    checks = page.eval_on_selector_all("#concerns li", "all => all.map((each) => each.dataset.check)")
    assert {"mirrored", "sides"} <= set(checks)
    assert {"place", "shift"} & set(checks)
    assert page.locator("#concerns").bounding_box()["y"] < page.locator("#images").bounding_box()["y"]


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (1440, "dark"), (390, "light"), (390, "dark")])
def test_nobody_is_kept_out(show: Open, report: Path, width: int, scheme: str) -> None:
    page = show(report, width, color_scheme=scheme)
    page.click('[data-mode="both"]')
    page.select_option("#colour", "volume")
    page.check("#outline-fixed")
    assert serious(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing to scroll sideways


def test_it_prints(show: Open, report: Path) -> None:
    page = show(report)
    page.emulate_media(media="print")
    assert page.is_hidden("#tools")
    assert page.is_visible('figure[data-plane="2"] canvas')
