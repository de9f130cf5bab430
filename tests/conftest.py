"""What several test modules share: a small prepared data set, and real scans where there are any."""

import json
import locale
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

# The processes of pytest-xdist share the processors, and on a busy one threads wait long for each other. Libraries read
# this when they are imported, in the processes that tests start, too.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.update(OMP_NUM_THREADS="1", ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS="1")

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.ndimage import gaussian_filter

with warnings.catch_warnings():  # Ignite imports optimisers of torch that torch 2.13 itself finds old
    warnings.filterwarnings("ignore", r"`torch\.jit\..* is deprecated", DeprecationWarning)
    import ignite.handlers  # noqa: F401

from tests.browser.chromium import browser, show  # noqa: F401
from voxelmorph_monai.affines import Affine
from voxelmorph_monai.apps.processes import attempt
from voxelmorph_monai.io.images import save_image
from voxelmorph_monai.space.resampling import resample_intensities, rescale
from voxelmorph_monai.space.scan import Scan
from voxelmorph_monai.space.template import WorkingGrid, mni152, mni152_tissue, sample_scan

SIZE = (24, 32, 20)
SPACING = (8.0, 6.0, 10.0)  # mm, so that the field of view is that of a head
SECTIONS = {"training": 3, "validation": 2, "test": 2}
DATA = Path(os.environ.get("VXM_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data").resolve()  # real scans


@cache
def small_brain() -> tuple[NDArray[Any], NDArray[Any], Affine]:
    """MNI152 and its tissue at 4 mm."""
    image, affine, tissue = mni152().array, mni152().affine, mni152_tissue().array
    step = (slice(None, None, 4),) * 3
    return ndimage.uniform_filter(image, 4)[step] * (tissue[step] > 0), tissue[step], affine @ np.diag([4, 4, 4, 1])


def oblique_lia() -> NDArray[np.float64]:
    """Affine (RAS, mm) whose axes run left, down and forward, all 0.1 rad off the axes of the body."""
    c, s = np.cos(0.1), np.sin(0.1)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.array([[-1, 0, 0], [0, 0, 1], [0, -1, 0]]) @ np.diag(SPACING)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(SIZE) - 1) / 2) + [3.0, -12.0, 7.0]
    return affine


def brain(seed: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Image in [0, 1] and labels (1 rim, 2 core, 3 left nucleus, 4 right one) of one individual: an ellipsoid, bent."""
    rng = np.random.default_rng(seed)
    bend = [gaussian_filter(rng.standard_normal(SIZE), 4) for _ in SIZE]
    x, y, z = (
        (grid - (n - 1) / 2 + 1.2 * b / b.std()) / (n / 2 - 2)
        for grid, n, b in zip(np.indices(SIZE), SIZE, bend, strict=True)
    )
    radius = np.sqrt(x**2 + y**2 + z**2)
    nuclei = [np.sqrt((x - at) ** 2 + y**2 + (1.5 * z) ** 2) for at in (0.3, -0.3)]  # x runs left
    labels = (radius < 1).astype(np.uint8) + (radius < 0.75)
    for number, distance in zip((3, 4), nuclei, strict=True):
        labels[distance < 0.22] = number
    image = np.choose(labels, [0.0, 0.45, 0.9, 0.2, 0.3])
    return gaussian_filter(image, 0.6).clip(0, 1).astype(np.float32), labels


# Modules whose tests share what takes long to make.
TOGETHER = ("test_affine", "test_benchmarks", "test_wheel")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """``pytest -n 2``: each of these modules, first, is one process's work; all other tests are handed out one by one.

    Not by xdist's own marks and ``--dist loadgroup``: pytest-xdist 3.8 with pytest 9.2 overlooks the marks.
    """
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::")[0]
            return path if Path(path).stem in TOGETHER else nodeid

    return Scheduling(config, log)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On volumes as small as those of tests threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class InThreads(ThreadPoolExecutor):
    """What takes the place of :class:`Processes` where processes do not matter."""

    def __init__(self, jobs: int, threads: int) -> None:
        super().__init__(jobs)

    def submit(self, function: Callable[..., object], /, *args: Any) -> "Future[str | None]":  # type: ignore[override]
        return super().submit(attempt, function, args)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder as ``vxm prepare`` leaves it: 3 scans for training, 2 for validation, 2 for the test; nobody may write."""
    folder = tmp_path_factory.mktemp("prepared")
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    datalist: dict[str, list[dict[str, str]]] = {}
    number = 0
    for section, count in SECTIONS.items():
        datalist[section] = []
        for _ in range(count):
            number += 1
            paths = {kind: f"{kind}s/{number}.nii.gz" for kind in ("image", "label")}
            for path, array in zip(paths.values(), brain(number), strict=True):
                save_image(folder / path, array, oblique_lia())
            datalist[section].append(paths)
    (folder / "datalist.json").write_text(json.dumps(datalist), encoding="utf-8")
    return folder


@pytest.fixture
def save_dicom() -> Callable[..., None]:
    """A function that writes a volume ``(X, Y, Z)``, int16, as a DICOM series: a file for each slice."""

    def save(folder: Path, array: NDArray[np.int16], affine: NDArray[np.float64], series: int = 1) -> None:
        folder.mkdir(exist_ok=True)
        lps, sides = np.diag([-1.0, -1, 1, 1]) @ affine, np.linalg.norm(affine[:3, :3], axis=0)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        for index in range(array.shape[2]):
            image = sitk.GetImageFromArray(np.ascontiguousarray(array[..., index].T))
            image.SetSpacing(sides[:2].tolist())
            tags = {
                "0008|0060": "MR",
                "0018|0050": str(sides[2]),
                "0020|000d": "1.2.826.0.1.3680043.2.1125.1",
                "0020|000e": f"1.2.826.0.1.3680043.2.1125.1.{series}",
                "0008|0018": f"1.2.826.0.1.3680043.2.1125.1.{series}.{index + 1}",
                "0020|0013": str(index + 1),
                "0020|0032": "\\".join(f"{x:.8g}" for x in (lps @ [0, 0, index, 1])[:3]),
                "0020|0037": "\\".join(f"{x:.8g}" for x in (lps[:3, :2] / sides[:2]).T.ravel()),
            }
            for tag, value in tags.items():
                image.SetMetaData(tag, value)
            writer.SetFileName(str(folder / f"{series}_{index:03d}.dcm"))
            found = locale.setlocale(locale.LC_ALL)
            writer.Execute(image)
            locale.setlocale(locale.LC_ALL, found)  # SimpleITK leaves another behind

    return save


@pytest.fixture(scope="session")
def real_pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Colin27 (``moving``) and MNI152 (``fixed``), on one grid of 2 mm where their headers put them."""
    grid, folder = WorkingGrid((80, 96, 112), 2.0).around(), tmp_path_factory.mktemp("real")
    paths = {role: folder / f"{role}.nii.gz" for role in ("moving", "fixed")}
    for path, scan in zip(paths.values(), (Scan.read(sample_scan("colin27")), mni152()), strict=True):
        rescale(resample_intensities(scan, grid, np.eye(4))).save(path)
    return paths


def real_scans(name: str, files: str) -> Path:
    """Folder ``name`` of real scans; without it the test is skipped, or fails where ``VXM_TEST_NEEDS_DATA`` is set."""
    folder = DATA / name
    if not folder.is_dir():
        reason = f"needs real scans: set VXM_TEST_DATA to a folder that holds {name}/ with {files}"
        (pytest.fail if os.environ.get("VXM_TEST_NEEDS_DATA") else pytest.skip)(reason)
    return folder


@pytest.fixture(scope="session")
def malf() -> Path:
    """Real scans: T1 brains with their labels."""
    return real_scans("malf", "T1 brains (1000_t1.nii.gz) and their labels (1000_labels.nii.gz)")


@pytest.fixture(scope="session")
def colin27() -> Path:
    """Real scans: a whole head in the space of MNI152, and its brain."""
    return real_scans("colin27", "the head of Colin27 (ch2.nii.gz) and its brain (ch2bet.nii.gz)")
