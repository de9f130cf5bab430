"""The page of a registration is one small file that tells nothing about whose scans they are."""

import base64
import html
import io
import json
import re
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from tests.pages.bodies import SIDE, SIZE, grid_of, head, labels_of, points_of, registered, wave
from voxelmorph_monai.apps.options import Options
from voxelmorph_monai.apps.register_files import register_files
from voxelmorph_monai.space.scan import Scan

SECRETS = ("DOE^JANE", "19800131", "MRN-123456", "doe_jane")


def made(path: Path, size: tuple[int, ...] = SIZE, side: float = SIDE, **given: object) -> str:
    scan = head(grid_of("LPI", size, (side,) * 3), size)
    registered(scan, scan, field=wave(scan.affine, size), **given).report(path)
    return path.read_text(encoding="utf-8")


def data_of(page: str) -> dict[str, object]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text, parse_constant=pytest.fail)


def pictures(page: str) -> list[Image.Image]:
    found = re.findall(r"data:image/(jpeg|png);base64,([A-Za-z0-9+/=]+)", page)
    shown = [Image.open(io.BytesIO(base64.b64decode(text))) for _, text in found]
    assert [picture.format.lower() for picture in shown] == [kind for kind, _ in found]
    for picture in shown:
        picture.load()
    return shown


def test_one_page_of_pictures_that_every_browser_shows(tmp_path: Path) -> None:
    scan = head(grid_of("LPI"))
    page = made(tmp_path / "report.html", fixed_labels=labels_of(scan), moving_labels=labels_of(scan))
    assert page.encode()[:1024].find(b'charset="utf-8"') > 0
    assert len(pictures(page)) == 1 + 3 * (3 + 1 + 2)  # icon; planes of three images, a change of volume, two labels
    assert {kind for kind in re.findall(r"data:image/(\w+)", page)} == {"jpeg", "png"}
    assert "Left Thalamus (10)" in html.unescape(page)
    data_of(page)


def test_without_labels_the_structures_of_heads_are_outlined(tmp_path: Path) -> None:
    scan = head(grid_of("LPI"))
    coarse = head(grid_of(size=(30, 34, 28), spacing=(6.0, 6.0, 6.0)), (30, 34, 28))
    matrix = np.eye(4)
    matrix[0, 3] = 12.0  # mm
    found = {"fixed": labels_of(coarse), "moving": labels_of(coarse)}
    result = registered(scan, scan, matrix, anatomy=found)
    for name, shift in (("fixed", 0), ("warped", -12)):
        number = result.outlines[name].array
        at = [points_of(scan.affine)[0][number == n].mean() for n in (10, 49)]
        assert at == pytest.approx([-18 + shift, 18 + shift], abs=1.5)
    result.report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "outlines, warped segmented structures" in page
    assert len(pictures(page)) == 1 + 3 * (3 + 1 + 2)
    given = registered(scan, scan, matrix, anatomy=found, fixed_labels=labels_of(scan))
    assert given.outlines == {"fixed": given.fixed_labels}
    assert "outlines, fixed labels" in made(tmp_path / "given.html", fixed_labels=labels_of(scan))


def test_the_size_does_not_grow_with_the_scan(tmp_path: Path) -> None:
    small = len(made(tmp_path / "small.html", (90, 100, 60), 2.1))
    large = len(made(tmp_path / "large.html", (270, 300, 42), 0.7))
    assert small < 2e6
    assert large < 2e6


def test_nothing_about_the_patient_is_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "doe_jane"
    folder.mkdir()
    scan = head(grid_of("LPI"))
    paths = {}
    for role in ("moving", "fixed"):
        image = nib.Nifti1Image(scan.array, scan.affine)
        image.header["descrip"], image.header["db_name"], image.header["aux_file"] = (
            SECRETS[0],
            "MRN-123456",
            "19800131",
        )
        image.header["intent_name"] = "DOE^JANE"
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"DOE^JANE 19800131"))
        paths[role] = folder / f"{role}_doe_jane_19800131.nii.gz"
        image.to_filename(paths[role])
        labels = labels_of(scan)
        paths[f"{role}_labels"] = folder / f"{role}_doe_jane_labels.nii.gz"
        nib.Nifti1Image(labels.array, labels.affine).to_filename(paths[f"{role}_labels"])
    options = Options(space="fixed", alignment="none", steps=1)
    summary = register_files(paths.pop("moving"), paths.pop("fixed"), tmp_path / "out", options=options, **paths)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    raw = page + (tmp_path / "out" / "report.png").read_bytes().decode("latin-1")
    for secret in (*SECRETS, str(tmp_path), tmp_path.name):
        assert secret not in raw
    assert not re.search(r"\b(19|20)\d\d-\d\d-\d\d\b", page)  # no date
    for name in ("moving", "fixed", "moving_labels", "fixed_labels"):
        assert summary["inputs"][name]["sha256"] in page
    command = "vxm register MOVING FIXED --output DIR --space fixed --alignment none --steps 1"
    assert f"{command} --moving-labels MOVING_LABELS --fixed-labels FIXED_LABELS" in page
    assert f"voxelmorph_monai {summary['versions']['voxelmorph_monai']}" in page


def test_no_report_writes_none(tmp_path: Path) -> None:
    scan = head(grid_of())
    registered(scan, scan).save(tmp_path / "with")
    registered(scan, scan).save(tmp_path / "without", report=False)
    gone = {path.name for path in (tmp_path / "with").iterdir()} - {
        path.name for path in (tmp_path / "without").iterdir()
    }
    assert gone == {"report.html", "report.png"}
    page = (tmp_path / "with" / "report.html").read_bytes()
    assert b'rel="icon"' in page[:60_000]  # where an index looks for it


SHIFTED = np.eye(4)
SHIFTED[2, 3] = 20.0  # mm


@pytest.mark.parametrize(
    ("wrong", "check", "words"),
    [
        ({"matrix": np.diag([-1.0, 1, 1, 1])}, "mirrored", "its determinant is negative"),
        ({"matrix": SHIFTED}, "place", "mm up"),
        ({"fixed_labels": (41, 2, 49, 10, 53, 17)}, "sides", "left and right are swapped"),
        ({"fixed_labels": (2, 41, 10, 49, 17, 53), "centre": (40, 30, 0)}, "labels", "another scan"),
    ],
    ids=["axis", "shift", "sides", "labels"],
)
def test_warnings_come_first(tmp_path: Path, wrong: dict[str, Any], check: str, words: str) -> None:
    scan = head(grid_of())
    given = {}
    if "fixed_labels" in wrong:
        labels = labels_of(scan, wrong["fixed_labels"])
        steps = [round(mm / SIDE) for mm in wrong.get("centre", (0, 0, 0))]
        given["fixed_labels"] = labels.like(np.roll(labels.array, steps, (0, 1, 2)))
    registered(scan, scan, wrong.get("matrix"), **given).report(tmp_path / "report.html")
    page = html.unescape((tmp_path / "report.html").read_text(encoding="utf-8"))
    (text,) = re.findall(rf'data-check="{check}">(.*?)</li>', page)
    assert words in text
    assert page.index(f'data-check="{check}"') < page.index('id="images"')
    assert "checks found nothing wrong" not in page


def test_methods_say_what_was_done(tmp_path: Path) -> None:
    scan = head(grid_of())
    plain = registered(scan, scan)
    options = {**plain.options, "similarity": "mind", "budget": 20.0, "alignment": "rigid"}
    registered(scan, scan, options=options).report(tmp_path / "a.html")
    page = html.unescape((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert "rigid transform" in page
    assert "at most 20 s" in page
    assert "10.1016/j.media.2012.05.008" in page  # MIND
    assert "10.1016/j.media.2007.06.004" not in page  # not LNCC
    assert "MNI152" not in page
    registered(scan, scan, options={**options, "space": "mni152", "budget": 0.0, "preset": "wide"}).report(
        tmp_path / "b.html"
    )
    page = html.unescape((tmp_path / "b.html").read_text(encoding="utf-8"))
    assert "MNI152 template" in page
    assert "preset “wide”" in page
    assert "10.1016/j.media.2012.05.008" not in page


def test_a_scan_without_structure_has_a_page(tmp_path: Path) -> None:
    scan = head(grid_of())
    flat = Scan(np.full(scan.shape, 5, np.int16), scan.affine)
    registered(flat, scan).report(tmp_path / "report.html")
    data_of((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_a_slice_has_a_page(tmp_path: Path) -> None:
    scan = head(grid_of())
    flat = Scan(scan.array[:, :, 24:25], scan.affine)
    registered(flat, flat).report(tmp_path / "report.html")
    assert len(data_of((tmp_path / "report.html").read_text(encoding="utf-8"))["planes"]) == 1  # type: ignore[arg-type]
