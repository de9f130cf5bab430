"""Random files within their standards are read as SimpleITK and nibabel read them; damaged ones end in a sentence.

``VXM_CAMPAIGN=2000 pytest tests/test_campaign.py`` looks longer than CI does, from another start each time.
"""

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from tests.campaign import Outcome, damaged
from tests.dicoms import classic, enhanced, slices
from voxelmorph_monai.affines import Affine, ImageGrid
from voxelmorph_monai.io.images import read_image
from voxelmorph_monai.maps.chains import map_points
from voxelmorph_monai.maps.files import read_transform
from voxelmorph_monai.maps.fsl_freesurfer import save_lta

LONG = int(os.environ.get("VXM_CAMPAIGN", 0))
campaign = settings(
    max_examples=LONG or 40,
    deadline=None,  # of a busy machine
    derandomize=not LONG,  # the same files in each run of CI
    database=None,
    suppress_health_check=list(HealthCheck),
)
NUM_DAMAGED = LONG or 40  # of each kind
SECONDS = 300  # for a process that reads damaged files on a busy machine: each takes milliseconds, ITK's import more
MEMORY = 200e6  # bytes beyond ten times the file's content

axes = st.permutations(range(3))
signs = st.tuples(*[st.sampled_from([-1, 1])] * 3)
angles = st.tuples(*[st.floats(-180, 180)] * 3)
origins = st.tuples(*[st.floats(-300, 300)] * 3)
sides = st.tuples(*[st.floats(0.2, 8)] * 3)
shapes = st.tuples(*[st.integers(2, 7)] * 3)


@st.composite
def affines(draw: Callable[..., Any], oblique: bool = True) -> Affine:
    """Voxels to mm with right angles: any orientation, either handedness."""
    matrix = np.eye(4)
    turn = Rotation.from_euler("xyz", draw(angles), degrees=True).as_matrix() if oblique and draw(st.booleans()) else 1
    matrix[:3, :3] = turn * np.eye(3) if np.isscalar(turn) else turn
    matrix[:3, :3] = matrix[:3, :3][:, draw(axes)] * draw(signs) * draw(sides)
    matrix[:3, 3] = draw(origins)
    return np.round(matrix, 12)  # no -1e-300, which takes more characters than DICOM has


def voxels(shape: tuple[int, ...], dtype: Any = np.int16) -> NDArray[Any]:
    return np.random.default_rng(0).integers(1, 100, shape).astype(dtype)


def corners(shape: tuple[int, ...]) -> NDArray[np.float64]:
    index = np.indices((2, 2, 2)).reshape(3, -1).T
    return index * (np.array(shape) - 1.0)


def attempt(path: Path) -> tuple[tuple[NDArray[Any], Affine] | None, str]:
    """Voxels and affine, or else why not."""
    try:
        return read_image(path), ""
    except ValueError as error:
        return None, str(error)


def set_pixdim(path: Path, kind: Any, index: int, factor: float) -> None:
    """Scale one of ``pixdim`` in a file; nibabel would correct the rest of the header, too."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as file:
        content = file.read()
    header = kind.header_class.from_fileobj(BytesIO(content), check=False)
    header["pixdim"][index] *= factor
    with opened(path, "wb") as file:
        file.write(header.binaryblock + content[len(header.binaryblock) :])


def assert_itk_agrees(path: Path, array: NDArray[Any], affine: Affine) -> None:
    """SimpleITK has the same number at the same point."""
    theirs = sitk.ReadImage(str(path), sitk.sitkFloat64)
    for index in corners(array.shape):
        point = (affine @ [*index, 1])[:3] * [-1, -1, 1]
        place = theirs.TransformPhysicalPointToContinuousIndex(point.tolist())
        np.testing.assert_allclose(place, np.rint(place), atol=0.1)  # voxel: what a header may contradict itself by
        value = theirs.GetPixel(np.rint(place).astype(int).tolist())
        np.testing.assert_allclose(array[tuple(index.astype(int))], value, rtol=1e-6)  # float32


@campaign
@given(
    affine=affines(),
    shape=shapes,
    codes=st.tuples(st.sampled_from([0, 1, 2, 4]), st.sampled_from([0, 1, 3])),
    ending=st.sampled_from([".nii", ".nii.gz"]),
    kind=st.sampled_from([nib.Nifti1Image, nib.Nifti2Image]),
    dtype=st.sampled_from([np.uint8, np.int16, np.int32, np.float32, np.float64]),
    slope=st.sampled_from([(np.nan, np.nan), (1, 0), (0.5, -3), (-2, 100)]),
    trailing=st.integers(0, 2),
    fault=st.sampled_from(["none", "none", "scaled pixdim", "turned qform", "moved qform", "units", "negative pixdim"]),
    size=st.floats(1e-7, 2),
)
def test_nifti_is_read_as_by_nibabel_and_itk_or_refused(
    affine: Affine, shape: tuple[int, ...], codes: tuple[int, int], ending: str, kind: Any, dtype: Any,
    slope: tuple[float, float], trailing: int, fault: str, size: float,
) -> None:  # fmt: skip
    with TemporaryDirectory() as folder:
        path = Path(folder, f"scan{ending}")
        image = kind(voxels(shape, dtype).reshape(shape + (1,) * trailing), affine)
        image.set_sform(affine, codes[0])
        turned = affine.copy()
        if fault == "turned qform":
            turned[:3, :3] = Rotation.from_euler("z", size).as_matrix() @ turned[:3, :3]
        if fault == "moved qform":
            turned[:3, 3] += size
        image.set_qform(turned, codes[1])
        header = image.header
        header.set_slope_inter(*slope)
        header["xyzt_units"] = 3 if fault == "units" else 2
        nib.save(image, path)
        if fault == "scaled pixdim":
            set_pixdim(path, kind, 2, 1 + size)
        if fault == "negative pixdim":
            set_pixdim(path, kind, 3, -1)
        read, error = attempt(path)
        if read is None:
            assert path.name in error
            assert fault != "none" or codes == (0, 0)
            return
        array, place = read
        assert max(codes) > 0
        assert fault not in ("units", "negative pixdim")
        np.testing.assert_allclose(corners(shape) @ (place - nib.load(path).affine)[:3, :3].T, 0, atol=1e-3)  # mm
        np.testing.assert_allclose(array, nib.load(path).get_fdata().reshape(shape), rtol=1e-6)  # float32
        if kind is nib.Nifti1Image:  # ITK does not read the other
            assert_itk_agrees(path, array, place)


@campaign
@given(affine=affines(), shape=shapes, ending=st.sampled_from([".nrrd", ".mha", ".mhd", ".nhdr"]), packed=st.booleans())
def test_itk_files_are_read_as_by_itk(affine: Affine, shape: tuple[int, ...], ending: str, packed: bool) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, f"scan{ending}")
        image = sitk.GetImageFromArray(voxels(shape).T)
        lps, length = np.diag([-1.0, -1, 1, 1]) @ affine, np.linalg.norm(affine[:3, :3], axis=0)
        image.SetSpacing(length.tolist())
        image.SetOrigin(lps[:3, 3].tolist())
        image.SetDirection((lps[:3, :3] / length).ravel().tolist())
        sitk.WriteImage(image, str(path), packed)
        array, place = read_image(path)
        np.testing.assert_allclose(place, affine, atol=1e-3)  # mm; the file has six digits
        np.testing.assert_array_equal(array, voxels(shape))
        assert_itk_agrees(path, array, place)


def linear(draw: Callable[..., Any], dims: int) -> sitk.Transform:
    """One of ITK's linear transforms, with an inverse."""
    small = st.floats(-0.4, 0.4)
    centre = [draw(st.floats(-100, 100)) for _ in range(dims)]
    shift = [draw(st.floats(-50, 50)) for _ in range(dims)]
    names = {
        2: ["Translation", "Affine", "Euler2D", "Similarity2D", "Scale"],
        3: ["Translation", "Affine", "Euler3D", "VersorRigid3D", "Similarity3D", "ScaleVersor3D", "Scale"],
    }
    name = draw(st.sampled_from(names[dims]))
    generic = name in ("Translation", "Affine", "Scale")
    transform = getattr(sitk, f"{name}Transform")(dims) if generic else getattr(sitk, f"{name}Transform")()
    if name != "Translation":
        transform.SetCenter(centre)
    if name == "Translation":
        transform.SetOffset(shift)
    elif name == "Affine":
        transform.SetMatrix((np.eye(dims) + [[draw(small) / dims for _ in range(dims)] for _ in range(dims)]).ravel())
        transform.SetTranslation(shift)
    elif name == "Scale":
        transform.SetScale([draw(st.floats(0.5, 2)) for _ in range(dims)])
    elif name == "Euler2D":
        transform.SetAngle(draw(small))
        transform.SetTranslation(shift)
    elif name == "Similarity2D":
        transform.SetAngle(draw(small))
        transform.SetScale(draw(st.floats(0.5, 2)))
        transform.SetTranslation(shift)
    elif name == "Euler3D":
        transform.SetRotation(draw(small), draw(small), draw(small))
        transform.SetTranslation(shift)
    else:
        transform.SetRotation([draw(small) + 0.5, draw(small), 1.0], draw(small))
        transform.SetTranslation(shift)
        if name == "Similarity3D":
            transform.SetScale(draw(st.floats(0.5, 2)))
        if name == "ScaleVersor3D":
            transform.SetScale([draw(st.floats(0.5, 2)) for _ in range(3)])
    return transform


def displacement(draw: Callable[..., Any], dims: int) -> sitk.Transform:
    size = draw(st.tuples(*[st.integers(3, 6)] * dims))
    field = np.random.default_rng(draw(st.integers(0, 99))).normal(size=(*size[::-1], dims))
    image = sitk.GetImageFromArray(field, isVector=True)
    image.SetSpacing([draw(st.floats(5, 40)) for _ in range(dims)])
    image.SetOrigin([draw(st.floats(-80, 0)) for _ in range(dims)])
    return sitk.DisplacementFieldTransform(sitk.Cast(image, sitk.sitkVectorFloat64))


@st.composite
def transforms(draw: Callable[..., Any]) -> tuple[sitk.Transform, str]:
    """A transform and the ending of a file that can hold it."""
    dims = draw(st.sampled_from([2, 3, 3]))
    if draw(st.booleans()):
        return linear(draw, dims), draw(st.sampled_from([".tfm", ".txt", ".mat", ".h5"]))
    parts = [linear(draw, dims) for _ in range(draw(st.integers(1, 3)))]
    if draw(st.booleans()):
        parts.insert(draw(st.integers(0, len(parts))), displacement(draw, dims))
    return sitk.CompositeTransform(parts), ".h5"


@campaign
@given(transforms(), st.integers(0, 99))
def test_transforms_do_what_simpleitk_does(drawn: tuple[sitk.Transform, str], seed: int) -> None:
    transform, ending = drawn
    with TemporaryDirectory() as folder:
        path = Path(folder, f"transform{ending}")
        sitk.WriteTransform(transform, str(path))
        points = np.random.default_rng(seed).uniform(-70, 70, (20, transform.GetDimension()))
        lps = np.array([-1, -1, 1])[: transform.GetDimension()]
        ours = map_points(read_transform(path), points * lps) * lps
        # As it reads the file: in memory, SetScale leaves the offset of a ScaleVersor3DTransform as it was.
        theirs = [sitk.ReadTransform(str(path)).TransformPoint(point.tolist()) for point in points]
        np.testing.assert_allclose(ours, theirs, atol=1e-4)  # mm


@campaign
@given(
    affine=affines(),
    order=st.permutations(range(6)),
    by=st.sampled_from(["frames", "files"]),
    scaling=st.sampled_from([None, (0.5, -3.0)]),
)
def test_slices_of_dicom_lie_where_they_say(
    affine: Affine, order: list[int], by: str, scaling: tuple[float, float] | None
) -> None:
    assume(scaling is None or by == "frames")
    array = voxels((5, 4, 6))
    with TemporaryDirectory() as folder:
        path = Path(folder, "scan")
        if by == "frames":
            enhanced(path / "IM1", array[..., order], slices(affine, order), scaling=[scaling] * 6 if scaling else None)
        else:
            classic(path, array[..., order], slices(affine, order))
        found, place = read_image(path)
    slope, intercept = scaling or (1, 0)
    index = np.indices(array.shape).reshape(3, -1)
    there = np.linalg.inv(place) @ affine @ np.vstack([index, np.ones(index.shape[1])])
    np.testing.assert_allclose(there, np.rint(there), atol=1e-3)  # voxels: text of 10 digits
    there = np.rint(there[:3]).astype(int)
    np.testing.assert_allclose(found[tuple(there)], slope * array[tuple(index)] + intercept, rtol=1e-6)  # float32


def save_examples(folder: Path) -> dict[str, list[Path]]:
    """Whole files of each kind, by the parser that reads them."""
    affine = np.diag([1.5, 1, 2, 1])
    for name in ("a.nii", "a.nii.gz", "b.nii"):
        nib.save(nib.Nifti1Image(voxels((6, 5, 4)), affine), folder / name)
    nib.save(nib.Nifti2Image(voxels((6, 5, 4)), affine), folder / "two.nii")
    nib.save(nib.MGHImage(voxels((6, 5, 4), np.int32), affine), folder / "a.mgz")
    image = sitk.GetImageFromArray(voxels((4, 5, 6)))
    for name in ("a.nrrd", "a.mha"):
        sitk.WriteImage(image, str(folder / name))
    field = nib.Nifti1Image(np.zeros((5, 4, 3, 1, 3), np.float32), affine)
    field.header.set_intent(1007)
    nib.save(field, folder / "field.nii")
    euler = sitk.Euler3DTransform([1.0, 2, 3], 0.1, 0.2, 0.3, [4.0, 5, 6])
    for name in ("t.txt", "t.tfm", "t.mat", "t.h5"):
        sitk.WriteTransform(euler, str(folder / name))
    shift = sitk.TranslationTransform(3, [1.0, 2, 3])
    sitk.WriteTransform(sitk.CompositeTransform([euler, shift]), str(folder / "c.h5"))
    grid = ImageGrid((6, 5, 4), affine)
    save_lta(folder / "t.lta", np.eye(4) + np.eye(4, k=3), grid, grid)
    (folder / "p.csv").write_text("x,y,z,name\n1,2,3,a\n4,5,6.5,b\n")
    (folder / "p.fcsv").write_text(
        "# Markups fiducial file version = 4.11\n# CoordinateSystem = LPS\n"
        "# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID\n1,1,2,3,0,0,0,1,1,1,0,F-1,,\n"
    )
    points = [{"id": "1", "label": "F-1", "position": [1.0, 2.0, 3.0]}]
    markups = [{"type": "Fiducial", "coordinateSystem": "LPS", "controlPoints": points}]
    (folder / "p.mrk.json").write_text(json.dumps({"markups": markups}, indent=1))
    (folder / "pairs.csv").write_text(f"moving,fixed\n{folder}/a.nii,{folder}/b.nii\n{folder}/b.nii,{folder}/a.nii\n")
    images = [{"image": f"{folder}/{name}", "label": f"{folder}/{name}"} for name in ("a.nii", "b.nii")]
    (folder / "datalist.json").write_text(json.dumps({"training": images}, indent=1))
    (folder / "m.json").write_text(json.dumps({"preset": "vm1", "changes": {}, "spatial_dims": 2, "size": [4, 4]}))
    kinds = {
        "scan": ["a.nii", "a.nii.gz", "two.nii", "a.mgz", "a.nrrd", "a.mha"],
        "labels": ["a.nii"],
        "transform": ["field.nii", "t.txt", "t.tfm", "t.mat", "t.h5", "c.h5", "t.lta"],
        "points": ["p.csv", "p.fcsv", "p.mrk.json"],
        "table": ["pairs.csv"],
        "pairs": ["pairs.csv"],
        "datalist": ["datalist.json"],
        "card": ["m.json"],
    }
    return {kind: [folder / name for name in names] for kind, names in kinds.items()}


def run(files: list[str], whole: list[str]) -> Iterator[Outcome]:
    """Outcomes of files, read after whole ones, for which libraries are imported.

    One that ends the process, or hangs, is followed by those after it in another process.
    """
    while files:
        command = [sys.executable, "-m", "tests.campaign", *whole, *files]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS + len(files), check=False)
            text, ending = done.stdout, f"the process ended with {done.returncode}: {done.stderr[-500:]}"
        except subprocess.TimeoutExpired as error:
            text, ending = (error.stdout or b"").decode(), "it hangs"
        lines = [Outcome(**json.loads(line)) for line in text.splitlines() if line.startswith("{")][len(whole) :]
        yield from lines
        files = files[len(lines) :]
        if files:
            yield Outcome(files[0], ending, "", 0)
            files = files[1:]


def size_of(path: Path) -> int:
    """Bytes of a file, unpacked as far as that goes."""
    held = path.stat().st_size
    return held * (1000 if path.name.endswith((".gz", ".mgz")) else 1)


def names(outcome: Outcome) -> bool:
    """Whether a message names the file, or of a list that is still one the scan that it lists."""
    folder = Path(outcome.file).parent.name
    listed = outcome.error == "FileNotFoundError" or ".nii" in outcome.message
    return folder in outcome.message or (folder.startswith("datalist-") and listed)


def test_damaged_files_end_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    examples = save_examples(tmp_path / "whole")
    random = np.random.default_rng(None if LONG else 0)
    whole, broken = [], []
    for kind, paths in examples.items():
        for path in paths:
            for number in range(1 + NUM_DAMAGED // len(paths)):
                folder = tmp_path / f"{kind}-{path.name}-{number}"
                folder.mkdir()
                content = path.read_bytes()
                copy = folder / path.name
                copy.write_bytes(damaged(content, random) if number else content)
                (broken if number else whole).append(str(copy))
    assert not [outcome for outcome in run(whole, []) if outcome.error]
    found = list(run(broken, whole))
    assert [outcome.file for outcome in found] == broken
    wrong = [
        outcome
        for outcome in found
        if (outcome.error or "ValueError") not in ("ValueError", "TypeError", "FileNotFoundError", "FileExistsError")
        or (outcome.error and not names(outcome))
        or len(outcome.message) > 2000
        or outcome.memory > MEMORY + 10 * size_of(Path(outcome.file))
    ]
    if LONG:
        print(Counter((Path(outcome.file).parent.name.split("-")[0], outcome.error) for outcome in found))
    assert not wrong, "\n".join(map(str, wrong))
    assert any(outcome.error for outcome in found)
