import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import itk
import make_sample
import nibabel as nib
import numpy as np
import psutil
import pytest
from conftest import InThreads, small_brain
from monai.data import load_decathlon_datalist
from nilearn import datasets
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from voxelmorph_monai.affines import Affine, ImageGrid
from voxelmorph_monai.apps import prepare as preparation
from voxelmorph_monai.apps.prepare import prepare
from voxelmorph_monai.io.images import read_image, read_labels, save_image
from voxelmorph_monai.pages.cohort import find_entries
from voxelmorph_monai.space.alignment import align
from voxelmorph_monai.space.itk_bridge import from_itk, to_itk, transform_affine
from voxelmorph_monai.space.resampling import resample, resample_intensities, rescale
from voxelmorph_monai.space.scan import Scan
from voxelmorph_monai.space.template import (
    STANDARD_GRID,
    WorkingGrid,
    check_brain,
    mni152,
    mni152_tissue,
    sample_scan,
)

GRID = WorkingGrid((54, 60, 70), 3.0)


def write_scan(folder: Path, name: str, pose: Affine | None = None) -> Path:
    """A scan and its labels (tissue numbers times 50, int16), the header moved by ``pose``."""
    image, tissue, affine = small_brain()
    folder.mkdir(parents=True, exist_ok=True)
    affine = affine if pose is None else pose @ affine
    save_image(folder / f"{name}_t1.nii.gz", 900 * image, affine)
    save_image(folder / f"{name}_labels.nii.gz", (50 * tissue).astype(np.int16), affine)
    return folder / f"{name}_t1.nii.gz"


PATTERNS = {"images": "*_t1.nii.gz", "labels": "*_labels.nii.gz"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven scans that differ in name alone."""
    folder = tmp_path_factory.mktemp("written")
    write_scan(folder, "a")
    for name in "bcdefg":
        for pattern in PATTERNS.values():
            shutil.copyfile(folder / pattern.replace("*", "a"), folder / pattern.replace("*", name))
    return folder


@pytest.fixture
def scans(tmp_path: Path, written: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "scans"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No processes and no registration, for what does not depend on them; lists the scans that were registered."""
    names: list[str] = []
    process = preparation._prepare_scan

    def noted(scan: Any, *args: Any) -> None:
        names.append(scan.name)
        process(scan, *args)

    monkeypatch.setattr(preparation, "Processes", InThreads)
    monkeypatch.setattr(preparation, "align_to_mni152", lambda scan, head, alignment: np.eye(4))
    monkeypatch.setattr(preparation, "_prepare_scan", noted)
    return names


def dice(first: NDArray[Any], second: NDArray[Any]) -> float:
    return float(2 * (first & second).sum() / (first.sum() + second.sum()))


class Pickled(InThreads):
    """As processes get it: what cannot be sent to them fails."""

    def submit(self, function: Callable[..., object], /, *args: Any) -> "Future[str | None]":  # type: ignore[override]
        return super().submit(*pickle.loads(pickle.dumps((function, *args))))


def test_scans_in_any_pose_come_out_aligned_on_the_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def coarsely(scan: Scan, head: object, alignment: str) -> Affine:
        """To the template at 3 mm, which takes seconds less."""
        coarse = ndimage.uniform_filter(mni152().array, 3)[::3, ::3, ::3]
        return align(scan, Scan(coarse, mni152().affine @ np.diag([3, 3, 3, 1])))

    monkeypatch.setattr(preparation, "Processes", Pickled)
    monkeypatch.setattr(preparation, "align_to_mni152", coarsely)
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_euler("xyz", (140, -30, 20), degrees=True).as_matrix()
    pose[:3, 3] = (50, -70, 40)
    write_scan(tmp_path / "scans", "turned", pose)
    write_scan(tmp_path / "scans", "straight")
    out = tmp_path / "out"
    prepared = prepare([tmp_path / "scans"], out, **PATTERNS, grid=GRID)
    assert prepared == (out / "datalist.json", {})
    grid = GRID.around()
    template = resample(mni152(), grid, np.eye(4)).array
    tissue = resample(mni152_tissue(), grid, np.eye(4), order=0).array
    for name in ("turned", "straight"):
        image, found = read_image(out / "images" / f"{name}.nii.gz")
        assert image.shape == GRID.size
        np.testing.assert_allclose(found, grid.affine, atol=1e-4)  # a header's float32
        assert (image.min(), image.max()) == (0, pytest.approx(1, abs=0.05))  # the brightest voxel may be cut off
        # One brain, thinned from 1 mm to 4 and sampled at 3: turned by a degree or shifted by 2 mm it is below these.
        assert np.corrcoef(image[template > 0], template[template > 0])[0, 1] > 0.9
        labels, _ = read_labels(out / "labels" / f"{name}.nii.gz")
        assert labels.dtype == np.int16
        assert set(np.unique(labels)) == {0, 50, 100, 150}
        assert dice(labels > 0, tissue > 0) > 0.95
        assert dice(labels == 150, tissue == 3) > 0.75
    # The file that is left is enough to do it again: ITK resamples the scan to the same image.
    (transform,) = itk.transformread(str(out / "transforms" / "turned.txt"))
    turned = rescale(Scan.read(tmp_path / "scans" / "turned_t1.nii.gz"))
    again = itk.resample_image_filter(
        to_itk(turned.array, turned.affine),
        transform=transform,
        reference_image=to_itk(template, grid.affine),
        use_reference_image=True,
    )
    image, _ = read_image(out / "images" / "turned.nii.gz")
    assert np.abs(from_itk(again)[0] - image)[template > 0].max() < 1e-3  # float32 coordinates inside ITK's filter


def test_resampling_is_that_of_itk() -> None:
    rng = np.random.default_rng(0)
    array = rng.uniform(size=(12, 9, 11)).astype(np.float32)
    labels = rng.integers(0, 30000, array.shape).astype(np.int16)
    affine = np.array([[0, -1.5, 0, 7], [0, 0, 2, -9], [1, 0, 0, -4], [0, 0, 0, 1.0]])
    transform = itk.AffineTransform[itk.D, 3].New()
    transform.SetParameters(itk.OptimizerParameters[itk.D]([0.9, 0.1, 0.2, -0.1, 1.1, 0.05, 0, 0.2, 1, 1, -2, 0.5]))
    grid = np.diag([-1.013, 0.717, 1.219, 1])  # no voxel falls halfway between two others
    grid[:3, 3] = (3, -6, -7)
    size = (10, 13, 14)
    reference = to_itk(np.zeros(size, np.float32), grid)
    for image, order, interpolator in (
        (array, 1, itk.LinearInterpolateImageFunction),
        (labels, 0, itk.NearestNeighborInterpolateImageFunction),
    ):
        ours = resample(Scan(image, affine), ImageGrid(size, grid), transform_affine(transform), order=order).array
        moving = to_itk(image, affine)
        theirs = from_itk(
            itk.resample_image_filter(
                moving,
                transform=transform,
                interpolator=interpolator.New(moving),
                reference_image=reference,
                use_reference_image=True,
            )
        )[0]
        inside = ours > 0  # ITK goes on for half a voxel beyond the outermost ones
        assert inside.mean() > 0.2
        assert ours.dtype == image.dtype
        np.testing.assert_allclose(ours[inside], theirs[inside], atol=1e-5)  # float32


@pytest.mark.parametrize(
    ("size", "spacing"),
    [((3,), 1), ((4, 5, 6, 7), 1), ((0, 10, 10), 1), ((8, 8), 0), ((8, 8), float("nan")), ((8, 8), float("inf"))],
)
def test_a_grid_that_is_not_possible_is_refused_when_it_is_made(size: tuple[int, ...], spacing: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"a grid of size {size} and spacing {spacing} is not possible. ")):
        WorkingGrid(size, spacing)


@pytest.mark.parametrize("grid", [STANDARD_GRID, WorkingGrid((80, 96, 112), 2.0), WorkingGrid((61, 67, 75), 2.5)])
def test_the_grid_runs_left_down_forward_around_the_middle_of_the_template(grid: WorkingGrid) -> None:
    placed = grid.around()
    assert nib.aff2axcodes(placed.affine) == ("L", "I", "A")
    np.testing.assert_allclose(nib.affines.voxel_sizes(placed.affine), grid.spacing)
    brain = np.argwhere(resample(mni152(), placed, np.eye(4)).array > 0)
    middle = (brain.min(axis=0) + brain.max(axis=0)) / 2
    # Half a voxel on either side, and the brain's outermost voxels may fall between those of a coarse grid.
    np.testing.assert_allclose(middle, (np.array(grid.size) - 1) / 2, atol=1.0)


def test_intensities_do_not_depend_on_their_scale() -> None:
    image = np.random.default_rng(0).gamma(3.0, 100.0, (30, 20, 25)).astype(np.float32)
    image[:10] = -4
    scaled = rescale(Scan(image, np.eye(4))).array
    assert (scaled.min(), scaled.max()) == (0, 1)
    np.testing.assert_allclose(rescale(Scan(7 * image, np.eye(4))).array, scaled, rtol=1e-6)
    assert np.mean(scaled[10:] == 1) == pytest.approx(0.005, abs=1e-4)  # the 0.5 % that are cut off: 1 voxel in 10000


def test_a_finer_scan_is_smoothed_to_the_grid(tmp_path: Path, quick: list[str]) -> None:
    tissue, affine = mni152_tissue().array, mni152_tissue().affine
    stripes = (tissue > 0) * (100 + 50 * (-1.0) ** np.arange(tissue.shape[1])[:, None])
    save_image(tmp_path / "scan.nii.gz", stripes.astype(np.float32), affine)
    # 2.9 mm, so that voxels fall anywhere between the middles of stripes
    prepare([tmp_path / "scan.nii.gz"], tmp_path / "out", grid=WorkingGrid((54, 60, 70), 2.9))
    prepared, _ = read_image(tmp_path / "out" / "images" / "scan.nii.gz")
    inside = ndimage.binary_erosion(prepared > 0.2, iterations=3)
    # Stripes of 1 mm cannot be seen at 2.9 mm. Sampled as they are they would stay, with a deviation of 0.2.
    assert prepared[inside].std() < 0.01
    assert prepared[inside].mean() == pytest.approx(100 / 150, abs=0.01)


def test_the_datalist_is_one_of_monai(tmp_path: Path, scans: Path, quick: list[str]) -> None:
    path, _ = prepare([scans], tmp_path / "out", **PATTERNS, grid=GRID, validation=0.3, test=0.15)
    for section, number in (("training", 3), ("validation", 2), ("test", 2)):
        entries = load_decathlon_datalist(str(path), data_list_key=section)
        assert len(entries) == number
        assert all(Path(entry["image"]).is_file() and Path(entry["label"]).is_file() for entry in entries)
        assert all(set(entry) == {"image", "label"} for entry in entries)
    assert json.loads(path.read_text())["grid"] == {"size": [54, 60, 70], "spacing": 3.0, "orientation": "LIA"}


def test_scans_without_labels_have_none(tmp_path: Path, scans: Path, quick: list[str]) -> None:
    path, _ = prepare([scans / "a_t1.nii.gz"], tmp_path / "out", images="*_t1.nii.gz", grid=GRID)
    assert json.loads(path.read_text())["training"] == [{"image": "images/a.nii.gz"}]
    assert not list((tmp_path / "out" / "labels").iterdir())


def test_maps_are_painted(tmp_path: Path, quick: list[str]) -> None:
    _, tissue, affine = small_brain()
    codes = np.array([0, 24, 3, 2], np.float32)  # FreeSurfer's, as SynthSeg stores them
    maps = tmp_path / "maps"
    maps.mkdir()
    save_image(maps / "a.nii.gz", codes[tissue], affine)
    prepare([maps], tmp_path / "out", images="*.nii.gz", maps=True, grid=GRID)
    image, labels = (read_image(tmp_path / "out" / kind / "a.nii.gz")[0] for kind in ("images", "labels"))
    white, grey = (image[labels == code] for code in (2, 3))
    assert np.median(white) > np.median(grey) > np.median(image[labels == 24]) > 0
    assert image[labels == 0].mean() < 0.01
    with pytest.raises(ValueError, match=r"^labels '\*_x\.nii\.gz' .* maps"):
        prepare([maps], tmp_path / "other", images="*.nii.gz", labels="*_x.nii.gz", maps=True, grid=GRID)


def test_the_draw_depends_on_the_seed_alone() -> None:
    names = [f"{i:02}" for i in range(40)]
    first = preparation._random_sections(names, 0.1, 0.2, seed=3)
    assert first == preparation._random_sections(names, 0.1, 0.2, seed=3)
    assert first != preparation._random_sections(names, 0.1, 0.2, seed=4)
    assert [len(part) for part in first.values()] == [28, 4, 8]
    assert sorted(name for part in first.values() for name in part) == names
    few = preparation._random_sections(names[:6], 0.1, 0.1, seed=0)
    assert [len(part) for part in few.values()] == [2, 2, 2]  # each enough for a pair


def test_strangers_files_and_broken_records_are_no_obstacle(tmp_path: Path, scans: Path, quick: list[str]) -> None:
    output = tmp_path / "out"
    prepare([scans], output, **PATTERNS, grid=GRID)
    (output / "images" / ".DS_Store").write_text("not ours")
    (output / "images" / ".ipynb_checkpoints").mkdir()
    leftover = output / "images" / ".4711-0a1b2c3d.a.nii.gz"
    leftover.write_text("half an ima")
    (output / "transforms" / "a.json").write_text("{}")
    (output / "datalist.json").write_text("{")
    quick.clear()
    _, errors = prepare([scans], output, **PATTERNS, grid=GRID)
    assert (quick, errors) == (["a"], {})
    assert (output / "images" / ".DS_Store").exists()
    assert not leftover.exists()
    assert (output / "datalist.previous.json").read_text() == "{"
    assert len(json.loads((output / "datalist.json").read_text())["training"]) == 3


def test_a_given_split_is_kept(tmp_path: Path, scans: Path, quick: list[str]) -> None:
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"training": list("gcab"), "test": ["d"], "rescan": ["e", "f"]}))
    path, _ = prepare([scans], tmp_path / "out", **PATTERNS, grid=GRID, split=split)
    datalist = json.loads(path.read_text())
    assert [entry["image"][7] for entry in datalist["training"]] == list("gcab")
    assert [len(datalist[section]) for section in ("validation", "test", "rescan")] == [0, 1, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"JSON object .*: Expecting"),
        ("[1]", r"JSON object .*: .*no attribute"),
        ('{"training": 3}', r"JSON object .*: a section is not a list"),
        ('{"training": ["a", "b", "b"]}', r"Missing: \[c, d, e, f, g\]; repeated: \[b\]; unknown: \[\]"),
        (
            '{"training": ["a","b","c","d","e","f","g"], "test": ["h"]}',
            r"Missing: \[\]; repeated: \[\]; unknown: \[h\]",
        ),
        ('{"grid": ["a","b","c","d","e","f","g"]}', "has a section 'grid'"),
    ],
)
def test_a_bad_split_is_refused(tmp_path: Path, scans: Path, content: str, message: str) -> None:
    (tmp_path / "split.json").write_text(content)
    with pytest.raises(ValueError, match=r"split\.json .*" + message):
        prepare([scans], tmp_path / "out", **PATTERNS, split=tmp_path / "split.json")


def test_only_what_is_missing_or_changed_is_done_again(tmp_path: Path, scans: Path, quick: list[str]) -> None:
    def again(**options: Any) -> list[str]:
        quick.clear()
        prepare([scans], tmp_path / "out", **{**PATTERNS, "grid": GRID, **options})
        return sorted(quick)

    assert again() == list("abcdefg")
    assert again() == []
    (tmp_path / "out" / "labels" / "c.nii.gz").unlink()
    (tmp_path / "out" / "transforms" / "d.json").unlink()  # what is written last: d was interrupted
    (tmp_path / "out" / "images" / ".17-0a1b2c3d.d.nii.gz").write_text("half a file")
    os.utime(scans / "e_t1.nii.gz", (1, 1))
    os.utime(scans / "f_labels.nii.gz", (1, 1))
    assert again() == list("cdef")
    assert not list((tmp_path / "out").glob("*/.*"))
    assert again(labels=None) == list("abcdefg")
    assert again(labels=None, jobs=2) == []
    with pytest.raises(ValueError, match=r"out was prepared on the grid .*3\.0.*, not .*4\.0"):
        again(grid=WorkingGrid((54, 60, 70), 4.0))


def test_a_datalist_that_changes_is_kept_aside(tmp_path: Path, scans: Path, quick: list[str]) -> None:
    path, _ = prepare([scans], tmp_path / "out", **PATTERNS, grid=GRID)
    previous = path.with_name("datalist.previous.json")
    prepare([scans], tmp_path / "out", **PATTERNS, grid=GRID)
    assert not previous.exists()
    before = path.read_text()
    prepare([scans], tmp_path / "out", **PATTERNS, grid=GRID, seed=1)
    assert previous.read_text() == before
    assert path.read_text() != before


def test_a_folder_of_somebody_else_is_not_touched(tmp_path: Path, scans: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out was not made by 'vxm prepare'"):
        prepare([scans], out, **PATTERNS)
    with pytest.raises(ValueError, match=r"thesis\.txt was not made by 'vxm prepare'"):
        prepare([scans], out / "thesis.txt", **PATTERNS)
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [("thesis.txt", "mine")]


def test_one_scan_that_fails_does_not_stop_the_others(
    tmp_path: Path, scans: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Scan.save

    def full(scan: Scan, path: Path) -> None:
        if path.name == "c.nii.gz" and path.parent.name == "labels":
            raise OSError("no space left")
        save(scan, path)

    monkeypatch.setattr(Scan, "save", full)
    path, errors = prepare([scans], tmp_path / "out", **PATTERNS, grid=GRID, validation=0, test=0)
    assert errors == {"c": "no space left"}
    assert [entry["image"][7] for entry in json.loads(path.read_text())["training"]] == list("abdefg")
    monkeypatch.setattr(Scan, "save", save)
    quick.clear()
    _, errors = prepare([scans], tmp_path / "out", **PATTERNS, grid=GRID, validation=0, test=0)
    assert (quick, errors) == (["c"], {})


def test_the_index_shows_every_scan_and_why_one_failed(
    tmp_path: Path, scans: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shift = np.eye(4)
    shift[:3, 3] = (0, 30, 0)
    write_scan(scans, "d", shift)  # without registration it stays 30 mm too far to the front
    mapping = np.diag([1.1, 1.0, 1.0, 1.0])
    monkeypatch.setattr(preparation, "align_to_mni152", lambda scan, head, alignment: mapping)
    save = Scan.save

    def full(scan: Scan, path: Path) -> None:
        if path.name == "c.nii.gz":
            raise OSError("no space left")
        save(scan, path)

    monkeypatch.setattr(Scan, "save", full)
    prepare([scans], tmp_path / "out", **PATTERNS, grid=GRID)
    index = find_entries(tmp_path / "out")
    found = {entry.name: entry for entry in index.entries}
    assert list(found) == list("cabdefg")
    assert found["c"].failed == "no space left"
    assert found["a"].values["ncc"] > found["d"].values["ncc"] + 0.2
    assert "template" in found["d"].odd[0]
    assert found["a"].values["volume"] == pytest.approx(1.1)
    assert (tmp_path / "out" / found["d"].picture).exists()
    assert '"no space left"' in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("pattern", "files", "names"),
    [
        ("*_t1.nii.gz", ["a_t1.nii.gz", "b_t1.nii.gz", "b_t2.nii.gz", "._b_t1.nii.gz"], ["a", "b"]),
        ("*/mri/norm.mgz", ["s1/mri/norm.mgz", "s2/mri/norm.mgz", "s2/mri/orig.mgz"], ["s1", "s2"]),
        ("sub-*/anat/sub-*_T1w.nii.gz", ["sub-1/anat/sub-1_T1w.nii.gz", "sub-2/anat/sub-3_T1w.nii.gz"], ["1"]),
        ("*.nii.gz", ["x.y.nii.gz", "xynniixgz"], ["x.y"]),
    ],
)
def test_the_star_stands_for_the_name(tmp_path: Path, pattern: str, files: list[str], names: list[str]) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    found = preparation._find_scans([tmp_path], pattern, None)
    assert [scan.name for scan in found] == names
    assert all(scan.image.is_file() and scan.label is None for scan in found)
    one = preparation._find_scans([found[0].image], pattern, None)
    assert one == found[:1]


def test_inputs_that_cannot_be_found_are_refused(tmp_path: Path, scans: Path) -> None:
    def find(*inputs: Path, images: str = "*_t1.nii.gz", labels: str | None = None) -> None:
        prepare(inputs, tmp_path / "out", images=images, labels=labels)

    with pytest.raises(FileNotFoundError, match=r"inputs do not exist: .*nowhere"):
        find(scans, tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no scan matches '\*\.mgz' in .*scans"):
        find(scans, images="*.mgz")
    with pytest.raises(ValueError, match=r"no scan matches .* in no input"):
        find()
    with pytest.raises(ValueError, match=r"a_labels\.nii\.gz does not match '\*_t1\.nii\.gz'"):
        find(scans / "a_labels.nii.gz")
    for pattern in ("t1.nii.gz", "**/*.nii.gz", "/data/*.nii.gz"):
        with pytest.raises(ValueError, match="^" + re.escape(f"'{pattern}' is not a pattern")):
            find(scans, images=pattern)
    (scans / "b_labels.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"labels; these files do not exist: .*b_labels\.nii\.gz"):
        find(scans, labels="*_labels.nii.gz")
    (scans / "b_t1.nii.gz").unlink()
    (scans / "a_t1.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"labels belong to no scan .*'\*_t1\.nii\.gz': .*a_labels\.nii\.gz"):
        find(scans, labels="*_labels.nii.gz")
    write_scan(tmp_path / "more", "c")
    with pytest.raises(ValueError, match=r"same name: .*c_t1.*c_t1"):
        find(scans, tmp_path / "more")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image, affine: (image * np.nan, affine), "voxels of NaN or infinity"),
        (lambda image, affine: (image * 0, affine), "is constant: every voxel is 0"),
        (lambda image, affine: (-image, affine), r"has a background of -"),
        (lambda image, affine: (0 * image - (image > 0) * 1e-9, affine), "has a background of -1e-09"),
        (lambda image, affine: (image, affine + 0.5 * np.eye(4, k=3)), r"not on one grid.* 0\.5 mm apart"),
        (lambda image, affine: (image[:-1], affine), "has shape"),
        (lambda image, affine: (image, affine + 0.5 * np.eye(4, k=1) * (affine[3] == 0)), "are not at right angles"),
    ],
)
def test_bad_scans_are_found_before_the_work(
    tmp_path: Path, scans: Path, quick: list[str], change: Any, message: str
) -> None:
    image, affine = read_image(scans / "f_t1.nii.gz")
    save_image(scans / "f_t1.nii.gz", *change(image, affine))
    found = rf"^1 of 7 scans \(f\) cannot be used\. f: .*f_t1\.nii\.gz.* {message}"
    with pytest.raises(ValueError, match=found):
        prepare([scans], tmp_path / "out", **PATTERNS, grid=GRID)
    assert not quick
    assert not (tmp_path / "out").exists()


def test_a_resampled_brain_may_have_a_rim() -> None:
    larger = np.diag([0.93, 0.93, 0.93, 1.0])  # in MNI152 a brain gains a third
    brain = resample_intensities(Scan.read(sample_scan("colin27")), WorkingGrid((80, 96, 112), 2.0).around(), larger)
    assert np.count_nonzero(brain.array > 0) * 8e-6 > 2.5  # litres
    check_brain(brain)


def test_bad_options_are_refused(tmp_path: Path, scans: Path) -> None:
    for options, message in (
        ({"jobs": 0}, r"^jobs is 0\."),
        ({"seed": -1}, r"^seed is -1\."),
        ({"validation": 0.7, "test": 0.4}, r"^validation is 0\.7 and test is 0\.4\."),
        ({"validation": -0.1}, r"^validation is -0\.1 and test is 0\.1\."),
        ({"grid": WorkingGrid((10, 10), 20.0)}, r"^a grid of size \(10, 10\) .* the template's brain\. Give 3 sizes"),
        ({"grid": WorkingGrid((80, 96, 112))}, r"a grid of \[80\.0, 96\.0, 112\.0\] mm is too small for the template"),
        # Axes in another order: 224 voxels from left to right, 160 to the front where the brain is 180 mm long.
        ({"grid": WorkingGrid((224, 192, 160))}, "too small for the template's brain"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare([scans], tmp_path / "out", **{**PATTERNS, **options})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("jobs", "expected"), [(None, 3), (2, 2)])
def test_as_many_processes_as_find_processors_and_memory(
    tmp_path: Path, scans: Path, monkeypatch: pytest.MonkeyPatch, jobs: int | None, expected: int
) -> None:
    def stop(jobs: int, threads: int) -> None:
        raise InterruptedError(jobs, threads)

    monkeypatch.setattr(preparation, "Processes", stop)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(3)), raising=False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=99 * 2**30))
    with pytest.raises(InterruptedError) as caught:
        prepare([scans], tmp_path / "out", **PATTERNS, jobs=jobs)
    assert caught.value.args == (expected, 1)


def test_the_template_is_a_brain_whose_tissues_differ() -> None:
    image, affine, tissue = mni152().array, mni152().affine, mni152_tissue().array
    np.testing.assert_array_equal(affine, mni152_tissue().affine)
    assert image.dtype == np.float32
    assert (image.min(), image.max()) == (0, 1)
    assert nib.aff2axcodes(affine) == ("R", "A", "S")
    assert tissue.dtype == np.uint8
    check_tissue(image, tissue)


def test_the_template_is_that_of_nilearn() -> None:
    image, mask = datasets.load_mni152_template(resolution=1), datasets.load_mni152_brain_mask(resolution=1)
    expected = (image.get_fdata() * mask.get_fdata()).astype(np.float32)
    np.testing.assert_array_equal(mni152().array, expected)  # bit by bit: both divide bytes by 255
    np.testing.assert_array_equal(mni152().affine, image.affine)
    assert "McConnell" in sample_scan("mni152").with_name("NOTICE.txt").read_text()


def test_the_sample_is_a_brain_whose_tissues_differ() -> None:
    image, affine = read_image(sample_scan("colin27"))
    tissue, tissue_affine = read_labels(sample_scan("colin27_tissue"))
    np.testing.assert_array_equal(affine, tissue_affine)
    check_tissue(image, tissue)
    with pytest.raises(ValueError, match="no sample 'colin', only colin27, colin27_tissue, mni152"):
        sample_scan("colin")
    assert "MRIcron" in sample_scan("colin27").with_name("NOTICE.txt").read_text()


def check_tissue(image: NDArray[Any], tissue: NDArray[Any]) -> None:
    fluid, grey, white = (float(np.median(image[tissue == number])) for number in (1, 2, 3))
    assert fluid < 0.9 * grey < 0.9 * 0.9 * white  # T1
    volumes = np.bincount(tissue.ravel())[1:] / 1e6  # litres, at 1 mm
    assert 0.1 < volumes[0] < 0.3
    assert 0.6 < volumes[1] < 1.2  # grey and white matter of an adult
    assert 0.4 < volumes[2] < 0.8


def test_the_tissue_of_the_sample_can_be_computed_again() -> None:
    image, affine = read_image(sample_scan("colin27"))
    tissue, _ = read_labels(sample_scan("colin27_tissue"))
    part = (slice(20, 160), slice(60, 130), slice(30, 110))
    again = make_sample.tissue(image[part], affine)
    assert np.mean(again == tissue[part]) > 0.95  # the means of a part differ a little: 0.97 was seen
