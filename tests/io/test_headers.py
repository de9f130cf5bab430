"""Headers that contradict themselves, or leave the position or the unit open, against nibabel and SimpleITK."""

import gzip
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy.io import netcdf_file
from scipy.spatial.transform import Rotation

from voxelmorph_monai.affines import Affine
from voxelmorph_monai.io.images import open_volume, read_image
from voxelmorph_monai.space.scan import Frame

SIZE = (9, 12, 7)
SIDES = np.array([0.9, 1.1, 3.0])


def noise() -> NDArray[np.int16]:
    return np.random.default_rng(0).integers(0, 200, SIZE).astype(np.int16)


def grid(angles: Any = (20, -35, 50), mirrored: bool = False) -> Affine:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * SIDES
    affine[:3, 3] = [-31.0, 17.5, 44.25]
    return affine @ np.diag([1, 1, -1, 1]) if mirrored else affine


def write(path: Path, affine: Affine, codes: tuple[int, int] = (1, 1), **fields: Any) -> Path:
    """A NIfTI file with both forms and pixdim from one affine, and then some fields changed to anything."""
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape(SIZE)
    header.set_qform(affine, 1)
    header.set_sform(affine, 1)
    header["sform_code"], header["qform_code"] = codes
    header["vox_offset"], header["magic"], header["xyzt_units"] = 352, b"n+1", 2
    for name, value in fields.items():
        header[name] = value
    content = header.binaryblock + bytes(4) + noise().tobytes(order="F")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


CORNERS = [(x, y, z) for x in (0, SIZE[0] - 1) for y in (0, SIZE[1] - 1) for z in (0, SIZE[2] - 1)]


def apart(path: Path, affine: Affine) -> float:
    """Largest distance, in mm, of a corner from where SimpleITK puts it."""
    theirs = sitk.ReadImage(str(path))
    ours = [(affine @ [*index, 1])[:3] * [-1, -1, 1] for index in CORNERS]
    return float(
        max(np.linalg.norm(theirs.TransformIndexToPhysicalPoint(i) - p) for i, p in zip(CORNERS, ours, strict=True))
    )


def pixdim(*sides: float, qfac: float = 1) -> NDArray[np.float32]:
    return np.array([qfac, *sides, 0, 0, 0, 0], np.float32)


# Fields that disagree, by the codes of sform and qform that make them count, and a word of the message.
WRONG: dict[str, tuple[tuple[int, int], dict[str, Any], str]] = {
    "pixdim of 1 mm": ((1, 0), {"pixdim": pixdim(1, 1, 1)}, "in pixdim .* in its sform"),
    "pixdim of 1 mm, two forms": ((1, 1), {"pixdim": pixdim(1, 1, 1)}, "sform and a qform"),
    "pixdim in another order": ((2, 0), {"pixdim": pixdim(3, 1.1, 0.9)}, "in pixdim"),
    "pixdim of slices with their gap": ((1, 0), {"pixdim": pixdim(0.9, 1.1, 3.3)}, "in pixdim"),
    "pixdim of 0": ((1, 0), {"pixdim": pixdim(0, 0, 0)}, "1 x 1 x 1 mm in pixdim"),
    "pixdim of NaN": ((1, 0), {"pixdim": pixdim(np.nan, 1.1, 3)}, "in pixdim"),
    "negative pixdim": ((1, 0), {"pixdim": pixdim(-0.9, 1.1, 3)}, r"negative size in pixdim \(-0\.9 x"),
    "negative pixdim of a qform": ((0, 1), {"pixdim": pixdim(0.9, -1.1, 3)}, "negative size in pixdim"),
    "qfac of -2": ((0, 1), {"pixdim": pixdim(0.9, 1.1, 3, qfac=-2)}, r"pixdim\[0\] -2"),
    "qfac of another handedness": ((1, 1), {"pixdim": pixdim(0.9, 1.1, 3, qfac=-1)}, "sform and a qform"),
    "a moved qform": ((1, 1), {"qoffset_x": -30.8}, "differ by up to 0.2 mm"),
    "a qform of NaN": ((1, 1), {"qoffset_x": np.nan}, "sform and a qform that differ by up to nan mm"),
    "a turned qform": ((1, 2), {"quatern_b": 0.3}, "sform and a qform"),
    "a code that does not exist": ((0, 9), {}, "qform_code 9"),
    "no code": ((0, 0), {}, "sform_code and qform_code are both 0"),
    "micrometres": ((1, 1), {"xyzt_units": 3}, "micrometres"),
    "metres and seconds": ((1, 1), {"xyzt_units": 1 + 8}, "metres"),
    "a quaternion that is no rotation": ((0, 1), {"quatern_b": 1.2}, "quatern_b, quatern_c and quatern_d"),
    "a quaternion that is none beside an sform": ((1, 1), {"quatern_b": 1.2}, "quatern_b, quatern_c and quatern_d"),
}


@pytest.mark.parametrize(("codes", "fields", "message"), WRONG.values(), ids=WRONG.keys())
def test_headers_that_contradict_themselves_are_refused(
    tmp_path: Path, codes: tuple[int, int], fields: dict[str, Any], message: str
) -> None:
    read_image(write(tmp_path / "good.nii", grid(), codes if max(codes) in range(1, 6) else (1, 1)))
    with pytest.raises(ValueError, match=r"bad\.nii .*" + message):
        read_image(write(tmp_path / "bad.nii", grid(), codes, **fields))


RIGHT: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "both forms": ((1, 1), {}),
    "sform": ((4, 0), {}),
    "qform": ((0, 1), {}),
    "a code below 0": ((-1, 1), {}),
    "a qform that does not count": ((2, 0), {"quatern_b": 1.2, "qoffset_x": 99}),
    "an sform that does not count": ((0, 2), {"srow_x": [9, 9, 9, 9]}),
    "pixdim rounded to two digits": ((1, 1), {"pixdim": pixdim(0.9, 1.1, 3.004)}),
    "forms that differ by less than a tenth of a voxel": ((1, 1), {"qoffset_x": -30.92}),
    "qfac of 0": ((1, 1), {"pixdim": pixdim(0.9, 1.1, 3, qfac=0)}),
    "no unit": ((1, 1), {"xyzt_units": 0}),
    "mm and seconds": ((1, 1), {"xyzt_units": 10}),
}


@pytest.mark.parametrize(("codes", "fields"), RIGHT.values(), ids=RIGHT.keys())
def test_headers_that_simpleitk_reads_as_nibabel_does_are_read(
    tmp_path: Path, codes: tuple[int, int], fields: dict[str, Any]
) -> None:
    path = write(tmp_path / "scan.nii.gz", grid(), codes, **fields)
    array, affine = read_image(path)
    np.testing.assert_array_equal(array, noise())
    np.testing.assert_allclose(affine, nib.load(path).affine, atol=1e-6)  # float32 in the header
    assert apart(path, affine) < 0.1


def half_turns() -> Iterator[tuple[str, Affine]]:
    """Turns of 180 degrees: their quaternion has no real part, so that rounding may make it longer than 1."""
    for number, axis in enumerate(np.random.default_rng(4).normal(size=(3, 3))):
        affine = np.eye(4)
        turn = Rotation.from_rotvec(np.pi * axis / np.linalg.norm(axis)).as_matrix()
        affine[:3, :3], affine[:3, 3] = turn * SIDES, [5, 6, 7]
        yield str(number), affine


@pytest.mark.parametrize("affine", [affine for _, affine in half_turns()], ids=[name for name, _ in half_turns()])
@pytest.mark.parametrize("codes", [(1, 1), (0, 1)])
@pytest.mark.parametrize("excess", [0, 3e-7, 4e-7, 5e-6])
def test_a_quaternion_may_be_rounded(tmp_path: Path, codes: tuple[int, int], affine: Affine, excess: float) -> None:
    """Nibabel refuses a square of 1 + 3.6e-7; ITK, FSL and others shorten it."""
    write(tmp_path / "exact.nii", affine)
    header = nib.load(tmp_path / "exact.nii").header
    quaternion = np.array([header[f"quatern_{axis}"] for axis in "bcd"], np.float64)
    quaternion *= np.sqrt((1 + excess) / (quaternion @ quaternion))
    fields = dict(zip(("quatern_b", "quatern_c", "quatern_d"), quaternion, strict=True))
    path = write(tmp_path / "scan.nii", affine, codes, **fields)
    _, found = read_image(path)
    # The real part of a quaternion of this square is only known to 6e-4, twice of which is an angle: 0.03 mm in 22 mm.
    assert apart(path, found) < 0.03
    np.testing.assert_allclose(found, affine, atol=0.01)
    Frame.read(path).save(tmp_path / "like.nii", noise())
    assert apart(tmp_path / "like.nii", nib.load(tmp_path / "like.nii").affine) < 1e-4  # and nibabel reads it


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("codes", [(1, 1), (2, 4), (1, 0), (0, 1)])
def test_what_is_written_like_a_file_has_one_position(tmp_path: Path, codes: tuple[int, int], mirrored: bool) -> None:
    affine = grid(mirrored=mirrored)
    near = {"qoffset_y": 17.45} if min(codes) else {}
    sides = pixdim(0.9, 1.1, 3.005, qfac=-1 if mirrored else 1)
    path = write(tmp_path / "scan.nii", affine, codes, **near, **({"pixdim": sides} if codes[0] else {}))
    Frame.read(path).save(tmp_path / "like.nii", noise().astype(np.float32))
    image = nib.load(tmp_path / "like.nii")
    header = image.header
    assert (header["sform_code"], header["qform_code"]) == codes
    np.testing.assert_allclose(image.affine, affine, atol=1e-5)  # float32 in the header
    np.testing.assert_allclose(header["pixdim"][1:4], SIDES, rtol=1e-6)
    if codes[1]:
        np.testing.assert_allclose(header.get_qform(), affine, atol=1e-5)
    assert apart(tmp_path / "like.nii", image.affine) < 1e-4


def test_a_random_header_is_read_only_if_it_says_one_thing(tmp_path: Path) -> None:
    """What is read lies where SimpleITK and nibabel put it; what agrees with itself is read."""
    rng = np.random.default_rng(5)
    counts = {True: 0, False: 0}
    for trial in range(150):
        mirrored, codes = bool(rng.integers(2)), [(1, 0), (0, 1), (1, 1), (2, 4)][rng.integers(4)]
        affine = grid(rng.uniform(-180, 180, 3), mirrored)
        qfac, factors = -1 if mirrored else 1, np.ones(3)
        fields: dict[str, Any] = {}
        wrong = rng.random(3) < 0.2
        if wrong[0]:
            factors[rng.integers(3)] = rng.choice([-1, 1.2, 0.5, 10])
        if wrong[1]:
            fields["qoffset_z"] = affine[2, 3] + rng.choice([-5, 0.3, 40])
        if wrong[2]:
            qfac = -qfac
        fields["pixdim"] = pixdim(*SIDES * factors * rng.uniform(1 - 1e-4, 1 + 1e-4, 3), qfac=qfac)
        path = write(tmp_path / f"{trial}.nii", affine, codes, **fields)
        # With a qform only, that is what the file says, unless a size is negative.
        contradicts = (wrong.any() if min(codes) else wrong[0]) if codes[0] else bool((factors < 0).any())
        with pytest.raises(ValueError, match=path.name) if contradicts else nullcontext():
            _, found = read_image(path)
        if not contradicts:
            assert apart(path, found) < 0.1
            np.testing.assert_allclose(found, nib.load(path).affine, atol=1e-5)
        counts[contradicts] += 1
    assert min(counts.values()) > 30


# Text headers -----------------------------------------------------------------------------------------------------

PLACED = "space directions: (2,0,0) (0,3,0) (0,0,4)\nspace origin: (10,20,30)\n"


def nrrd(path: Path, header: str, sizes: str = "9 12 7") -> Path:
    head = f"NRRD0005\ntype: short\nencoding: raw\nendian: little\ndimension: {len(sizes.split())}\nsizes: {sizes}\n"
    path.write_bytes((head + header + "\n").encode() + noise().astype("<i2").tobytes(order="F"))
    return path


def mha(path: Path, header: str, sizes: str = "9 12 7") -> Path:
    head = f"ObjectType = Image\nNDims = {len(sizes.split())}\nDimSize = {sizes}\nBinaryData = True\n{header}"
    voxels = noise().astype("<i2").tobytes(order="F")
    path.write_bytes((head + "ElementType = MET_SHORT\nElementDataFile = LOCAL\n").encode() + voxels)
    return path


TEXT: dict[str, tuple[str, str, str]] = {
    "no space": (
        "a.nrrd",
        PLACED.replace("space directions", "space dimension: 3\nspace directions"),
        "no position.*space",
    ),
    "spacings only": ("a.nrrd", "spacings: 2 3 4\n", "no position.*space"),
    "a scanner's space": ("a.nrrd", "space: scanner-xyz\n" + PLACED, "no position.*scanner-xyz"),
    "a mathematician's space": ("a.nrrd", "space: 3D-left-handed\n" + PLACED, "no position.*3D-left-handed"),
    "micrometres": ("a.nrrd", 'space: LPS\nspace units: "um" "um" "um"\n' + PLACED, "not in mm.* um"),
    "micrometres with their sign": ("a.nrrd", 'space: LPS\nspace units: "µm" "µm" "µm"\n' + PLACED, "not in mm.* µm"),
    "one unit is another": ("a.nrrd", 'space: RAS\nspace units: "mm" "mm" "cm"\n' + PLACED, "not in mm.* cm"),
    "centimetres": ("a.mha", "ElementSpacing = 2 3 4\nDistanceUnits = cm\n", "not in mm.* cm"),
    "micrometres of MetaImage": ("a.mha", "ElementSpacing = 2 3 4\nDistanceUnits = um\n", "not in mm.* um"),
}


@pytest.mark.parametrize(("name", "header", "message"), TEXT.values(), ids=TEXT.keys())
def test_text_headers_without_a_position_in_mm_are_refused(
    tmp_path: Path, name: str, header: str, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"{name} .*{message}"):
        open_volume((nrrd if name.endswith("nrrd") else mha)(tmp_path / name, header))


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("a.nrrd", "space: left-posterior-superior\n" + PLACED),
        ("a.nrrd", "space: right-anterior-superior\n" + PLACED),
        ("a.nrrd", "space: LAS\n" + PLACED),
        ("a.nrrd", 'space: LPS\nspace units: "mm" "mm" "mm"\n' + PLACED),
        ("a.nrrd", "# space: scanner-xyz\nspace: RAS\nkinds: domain domain domain\n" + PLACED),
        ("a.mha", "ElementSpacing = 2 3 4\nOffset = 1 2 3\nDistanceUnits = mm\n"),
        ("a.mha", "ElementSpacing = 2 3 4\nTransformMatrix = 0 1 0 1 0 0 0 0 1\n"),
        ("a.mha", "ElementSize = 2 3 4\n"),
    ],
)
def test_text_headers_in_mm_are_read_as_simpleitk_does(tmp_path: Path, name: str, header: str) -> None:
    path = (nrrd if name.endswith("nrrd") else mha)(tmp_path / name, header)
    array, affine = read_image(path)
    np.testing.assert_array_equal(array, noise())
    assert apart(path, affine) < 1e-6  # double throughout


# A fourth axis of 1 -----------------------------------------------------------------------------------------------


def afni(path: Path, volumes: int = 1) -> Path:
    """A data set of AFNI: ``.HEAD`` beside ``.BRIK``."""

    def attribute(kind: str, name: str, values: str | list[float]) -> str:
        text = f"'{values}~" if isinstance(values, str) else " ".join(map(str, values))
        return f"\ntype = {kind}-attribute\nname = {name}\ncount = {len(values) + isinstance(values, str)}\n{text}\n"

    head = [
        attribute("string", "BYTEORDER_STRING", "LSB_FIRST"),
        attribute("string", "TEMPLATE_SPACE", "ORIG"),
        attribute("integer", "DATASET_DIMENSIONS", [*SIZE, 0, 0]),
        attribute("integer", "DATASET_RANK", [3, volumes, 0, 0, 0, 0, 0, 0]),
        attribute("integer", "BRICK_TYPES", [1] * volumes),
        attribute("float", "BRICK_FLOAT_FACS", [0] * volumes),
        attribute("float", "DELTA", [2, 3, 4]),
        attribute("float", "ORIGIN", [10, 20, 30]),
        attribute("integer", "ORIENT_SPECIFIC", [0, 3, 4]),
        attribute("float", "IJK_TO_DICOM_REAL", [2, 0, 0, 10, 0, 3, 0, 20, 0, 0, 4, 30]),
    ]
    path.write_text("".join(head))
    path.with_suffix(".BRIK").write_bytes(noise().astype("<i2").tobytes(order="F") * volumes)
    return path


def minc(path: Path, names: tuple[str, ...] = ("time", "zspace", "yspace", "xspace")) -> Path:
    """A file of MINC 1, which is netCDF."""
    sizes = {"time": 1, "zspace": SIZE[2], "yspace": SIZE[1], "xspace": SIZE[0]}
    with netcdf_file(path, "w") as file:
        for name, step, start in (("time", 1, 0), ("zspace", 4, 30), ("yspace", 3, 20), ("xspace", 2, 10)):
            if name in names:
                file.createDimension(name, sizes[name])
                axis = file.createVariable(name, "i", ())
                axis.step, axis.start, axis.spacing, axis.units = float(step), float(start), "regular__", "mm"
        image = file.createVariable("image", "h", names)
        image[:] = noise().T.reshape([sizes[name] for name in names])
        image.signtype, image.valid_range, image.complete = "signed__", np.array([0.0, 199.0]), "true_"
        for name, value in (("image-max", 199.0), ("image-min", 0.0)):
            file.createVariable(name, "d", ()).data[...] = value
    return path


LISTED = "space: LPS\nspace directions: {}\nspace origin: (10,20,30)\nkinds: {}\n"
FIRST = LISTED.format("none (2,0,0) (0,3,0) (0,0,4)", "list domain domain domain")
LAST = LISTED.format("(2,0,0) (0,3,0) (0,0,4) none", "domain domain domain list")
TIME = "space: LPST\nspace directions: (2,0,0,0) (0,3,0,0) (0,0,4,0) (0,0,0,1)\nspace origin: (10,20,30,0)\n"
LPS = np.array([[-2.0, 0, 0, -10], [0, -3, 0, -20], [0, 0, 4, 30], [0, 0, 0, 1]])
FOUR: dict[str, tuple[Any, Affine]] = {
    "AFNI": (lambda path: afni(path / "a+orig.HEAD"), LPS),
    "MetaImage": (
        lambda path: mha(
            path / "a.mha",
            "ElementSpacing = 2 3 4 1\nOffset = 10 20 30 5\n",
            "9 12 7 1",
        ),
        LPS,
    ),
    "NRRD, list first": (lambda path: nrrd(path / "a.nrrd", FIRST, "1 9 12 7"), LPS),
    "NRRD, list last": (lambda path: nrrd(path / "a.nrrd", LAST, "9 12 7 1"), LPS),
    "NRRD, time": (lambda path: nrrd(path / "a.nrrd", TIME, "9 12 7 1"), LPS),
    "MINC": (lambda path: minc(path / "a.mnc"), np.abs(LPS)),
}


@pytest.mark.parametrize(("make", "expected"), FOUR.values(), ids=FOUR.keys())
def test_one_volume_with_a_fourth_axis_is_read(tmp_path: Path, make: Any, expected: Affine) -> None:
    array, affine = read_image(make(tmp_path))
    if affine[0, 0] == 0:  # MINC counts z first
        array, affine = array.T, affine[:, [2, 1, 0, 3]]
    np.testing.assert_allclose(array, noise(), atol=1e-4)  # MINC scales
    np.testing.assert_allclose(affine, expected)


def test_several_volumes_are_refused(tmp_path: Path) -> None:
    for path in (
        afni(tmp_path / "a+orig.HEAD", volumes=2),
        nrrd(
            tmp_path / "a.nrrd", LISTED.format("(2,0,0) (0,3,0) (0,0,4) none", "domain domain domain list"), "9 12 1 7"
        ),
    ):
        with pytest.raises(ValueError, match=r"(3-D volume|scalar image)"):
            open_volume(path)
