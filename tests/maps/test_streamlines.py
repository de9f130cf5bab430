"""Streamlines of every format, against nibabel and trx-python."""

import json
import tracemalloc
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from fields import FIXED, MIRRORED, MOVING, OBLIQUE, affine_map, fade, image, inner, smooth
from nibabel.streamlines import ArraySequence, Tractogram
from numpy.typing import NDArray

from voxelmorph_monai import cli
from voxelmorph_monai.affines import ImageGrid
from voxelmorph_monai.io.images import save_image
from voxelmorph_monai.maps.chains import invert_points
from voxelmorph_monai.maps.displacements import save_displacement
from voxelmorph_monai.maps.files import read_chain
from voxelmorph_monai.maps.streamlines import move_streamlines
from voxelmorph_monai.space.itk_bridge import linear_transform, save_transform

trx = pytest.importorskip("trx.trx_file_memmap")

LENGTHS = (50, 1, 20, 129)
GRID = ImageGrid(FIXED, OBLIQUE)
EMPTY = {"NB_VERTICES": 0, "NB_STREAMLINES": 0, "DIMENSIONS": [9, 9, 9]}


def lines() -> list[NDArray[Any]]:
    return np.split(inner().astype(np.float32), np.cumsum(LENGTHS)[:-1])


def tractogram(count: int | None = None) -> Tractogram:
    chosen = lines()[:count]
    n = len(chosen)
    return Tractogram(
        chosen,
        {"weight": np.arange(n, dtype=np.float32)[:, None]} if n else {},
        {"fa": [each[:, :1] / 7 for each in chosen]} if n else {},
        affine_to_rasmm=np.eye(4),
    )


def write(path: Path, count: int | None = None) -> None:
    if path.suffix == ".trk":
        header = {"voxel_to_rasmm": MIRRORED, "dimensions": MOVING, "voxel_order": "LAS"}
        header["voxel_sizes"] = np.linalg.norm(MIRRORED[:3, :3], axis=0)
        nib.streamlines.save(tractogram(count), str(path), header=header)
    elif path.suffix == ".tck":
        nib.streamlines.save(Tractogram(lines()[:count], affine_to_rasmm=np.eye(4)), str(path))
    else:
        data = tractogram(count)
        if not len(data):
            with zipfile.ZipFile(path, "w") as empty:
                empty.writestr("header.json", json.dumps({**EMPTY, "VOXEL_TO_RASMM": MIRRORED.tolist()}))
            return
        made = trx.TrxFile(nb_vertices=len(data.streamlines.get_data()), nb_streamlines=len(data))
        made.header["VOXEL_TO_RASMM"], made.header["DIMENSIONS"] = MIRRORED.astype(np.float32), np.array(MOVING, "u2")
        made.streamlines._data[:] = data.streamlines.get_data()
        made.streamlines._offsets[:] = data.streamlines._offsets
        made.streamlines._lengths[:] = data.streamlines._lengths
        made.data_per_streamline["weight"] = np.arange(len(data), dtype=np.float32)[:, None]
        trx.save(made, str(path))
        made.close()


def read(path: Path) -> tuple[ArraySequence, Any]:
    if path.suffix == ".trx":
        found = trx.load(str(path))
        copied, header = ArraySequence([np.array(each) for each in found.streamlines]), dict(found.header)
        dtype, data = found.streamlines._data.dtype, {k: np.array(v) for k, v in found.data_per_streamline.items()}
        found.close()
        return copied, SimpleNamespace(header=header, data_per_streamline=data, dtype=dtype)
    found = nib.streamlines.load(str(path))
    return found.streamlines, found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_image("fixed.nii.gz", image(FIXED), OBLIQUE)
    save_displacement("1Warp.nii.gz", fade(smooth(FIXED, 1)), OBLIQUE)
    save_transform("0GenericAffine.mat", linear_transform(affine_map()))
    return tmp_path


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("ending", ["trk", "tck", "trx"])
def test_streamlines_go_where_points_go(ending: str) -> None:
    path = Path(f"bundle.{ending}")
    write(path)
    command = f"apply 1Warp.nii.gz 0GenericAffine.mat --streamlines {path} --output out.{ending} --points-of moving"
    assert cli.main(f"{command} --reference fixed.nii.gz".split()) == 0
    found, file = read(Path(f"out.{ending}"))
    expected = invert_points(read_chain(["1Warp.nii.gz", "0GenericAffine.mat"]).transform, np.vstack(read(path)[0]))[0]
    np.testing.assert_allclose(np.vstack(list(found)), expected, atol=2e-3)
    assert tuple(len(each) for each in found) == LENGTHS
    if ending == "trk":
        np.testing.assert_allclose(file.header["voxel_to_rasmm"], OBLIQUE, atol=1e-5)
        np.testing.assert_array_equal(file.header["dimensions"], FIXED)
        np.testing.assert_array_equal(file.tractogram.data_per_streamline["weight"][:, 0], range(4))
        np.testing.assert_allclose(np.vstack(file.tractogram.data_per_point["fa"]), inner()[:, :1] / 7, rtol=1e-6)
    if ending == "trx":
        np.testing.assert_allclose(file.header["VOXEL_TO_RASMM"], OBLIQUE, atol=1e-5)
        np.testing.assert_array_equal(file.header["DIMENSIONS"], FIXED)
        np.testing.assert_array_equal(np.asarray(file.data_per_streamline["weight"])[:, 0], range(4))
        assert read(path)[1].dtype == np.float16  # as trx-python writes
        assert file.dtype == np.float32
    if ending == "tck":
        assert Path("out.tck").read_bytes().startswith(b"mrtrix tracks")


@pytest.mark.parametrize("ending", ["trk", "tck", "trx"])
def test_no_streamlines_are_none(ending: str, tmp_path: Path) -> None:
    write(tmp_path / f"a.{ending}", 0)
    assert move_streamlines(tmp_path / f"a.{ending}", tmp_path / f"b.{ending}", lambda points: points + 1, GRID) == 0
    if ending == "trx":  # trx-python leaves a temporary folder behind where there is nothing to read
        with zipfile.ZipFile(tmp_path / "b.trx") as written:
            found = json.loads(written.read("header.json"))
        np.testing.assert_allclose(found["VOXEL_TO_RASMM"], OBLIQUE)
    else:
        assert len(read(tmp_path / f"b.{ending}")[0]) == 0


@pytest.mark.parametrize("pattern", [0x7FC00000, 0xFFC00000])
def test_tck_ends_a_streamline_by_any_nan(pattern: int, tmp_path: Path) -> None:
    write(tmp_path / "a.tck")
    content = (tmp_path / "a.tck").read_bytes()
    start = int(content.split(b"file: . ")[1].split(b"\n")[0])
    numbers = np.frombuffer(content[start:], "<u4").copy()
    numbers[np.isnan(numbers.view("<f4"))] = pattern
    (tmp_path / "a.tck").write_bytes(content[:start] + numbers.tobytes())
    assert move_streamlines(tmp_path / "a.tck", tmp_path / "b.tck", lambda points: points + 1) == len(LENGTHS)
    np.testing.assert_allclose(np.vstack(list(read(tmp_path / "b.tck")[0])), inner() + 1, atol=1e-5)  # float32


def test_memory_does_not_grow_with_the_number_of_streamlines(tmp_path: Path) -> None:
    """1 MB in the file; 0.1 MB are held at a time."""
    path, many = tmp_path / "a.trk", 4_000
    each = np.zeros((20, 3), np.float32)
    nib.streamlines.save(Tractogram([each] * many, affine_to_rasmm=np.eye(4)), str(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("voxelmorph_monai.maps.streamlines._PART", 1 << 10)
        tracemalloc.start()
        try:
            assert move_streamlines(path, tmp_path / "b.trk", lambda points: points + 1, GRID) == many
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert (tmp_path / "b.trk").stat().st_size > 9e5
    assert peak < 6e5


def test_what_is_no_file_of_streamlines_is_named(tmp_path: Path) -> None:
    for name in ("a.trk", "a.tck", "a.trx"):
        (tmp_path / name).write_text("nothing of the kind")
        with pytest.raises(ValueError, match=name):
            move_streamlines(tmp_path / name, tmp_path / f"b{name}", lambda points: points, GRID)
        assert not (tmp_path / f"b{name}").exists()
    write(tmp_path / "a.trk")
    with pytest.raises(ValueError, match=r"a\.trk .*--reference"):
        move_streamlines(tmp_path / "a.trk", tmp_path / "b.trk", lambda points: points)


def test_a_broken_trx_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.trx", "w") as made:
        made.writestr("header.json", json.dumps({"NB_VERTICES": 5, "NB_STREAMLINES": 1}))
        made.writestr("positions.3.float32", bytes(36))
    with pytest.raises(ValueError, match=r"a\.trx is cut short"):
        move_streamlines(tmp_path / "a.trx", tmp_path / "b.trx", lambda points: points)


def test_points_that_are_no_numbers_are_counted(tmp_path: Path) -> None:
    broken = lines()
    broken[0][3] = np.nan
    header = {"voxel_to_rasmm": np.eye(4), "dimensions": (50, 50, 50), "voxel_order": "RAS", "voxel_sizes": (1, 1, 1)}
    nib.streamlines.save(Tractogram(broken, affine_to_rasmm=np.eye(4)), str(tmp_path / "a.trk"), header=header)
    with pytest.raises(ValueError, match=r"a\.trk has 1 points of NaN"):
        move_streamlines(tmp_path / "a.trk", tmp_path / "b.trk", lambda points: points, GRID)
