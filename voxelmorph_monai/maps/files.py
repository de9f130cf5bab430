"""Read, chain and write transform files of this package and of other programs.

=============================  ===========================================================================
ITK, ANTs, 3D Slicer, elastix  ``.h5``, ``.tfm``, ``.txt``, ``.mat`` of ITK's transforms and composites
displacement                   ``.nii``, ``.nii.gz`` of shape ``(X, Y, Z, 1, 3)``: intent 1006 RAS, 1007 LPS
SPM, NiftyReg                  the same, also positions (:mod:`~voxelmorph_monai.maps.field_headers`)
FreeSurfer                     ``.lta``; warps that are displacements of intent 1006
FSL                            ``.mat``, ``.nii.gz`` of FLIRT and FNIRT, together with both images
=============================  ===========================================================================

All transforms in memory take points of the fixed image to points of the moving one, whatever the file format.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from voxelmorph_monai.affines import Affine, ImageGrid
from voxelmorph_monai.io.formats import silent_stderr
from voxelmorph_monai.lazy import lazy
from voxelmorph_monai.maps.chains import (
    chain,
    field_of,
    field_transform,
    flatten,
    invert_transform,
    is_field,
    lift,
    lower,
    matrix_of,
    on_grid,
)
from voxelmorph_monai.maps.displacements import read_displacement, save_displacement
from voxelmorph_monai.maps.fsl_freesurfer import read_flirt, read_fnirt, read_lta, save_flirt, save_fnirt, save_lta
from voxelmorph_monai.maps.grids import write_ends
from voxelmorph_monai.maps.itk_files import check_chain_file
from voxelmorph_monai.maps.names import check_output, parse_name
from voxelmorph_monai.space.itk_bridge import Transform, linear_transform, save_transform
from voxelmorph_monai.space.scan import Frame, Scan

__all__ = [
    "FORMATS",
    "Chain",
    "check_target",
    "open_chain",
    "read_chain",
    "read_fsl_transform",
    "read_transform",
    "save_chain",
]

itk = lazy("itk")

FORMATS = ("itk", "1007", "1006", "ants", "lta", "fsl")
"""Formats that :func:`save_chain` writes; see the table in docs/transforms.md."""
_ITK = (".h5", ".hdf5", ".tfm", ".txt", ".mat")
_NIFTI = (".nii", ".nii.gz")
_ENDINGS = {"itk": _ITK, "1007": _NIFTI, "1006": _NIFTI, "lta": (".lta",), "fsl": (".mat", *_NIFTI)}
_READ = (*_ITK, ".lta", *_NIFTI)
_OTHERS = (".m3z", ".mgz", ".mgh")
_TEXTS = (".txt", ".tfm")
_HDF5 = (".h5", ".hdf5")
_UNKNOWN_TO_PYTHON = re.compile(rb"MatrixOffsetTransformBase(_(?:double|float)_[23]_[23])")
# Number of parameters of transforms in text files, in 2-D and 3-D. If some are missing, ITK reads beyond its memory.
_NUM_PARAMETERS = {
    "AffineTransform": (6, 12),
    "CenteredAffineTransform": (8, 15),
    "CenteredEuler3DTransform": (0, 9),
    "CenteredRigid2DTransform": (5, 0),
    "CenteredSimilarity2DTransform": (6, 0),
    "ComposeScaleSkewVersor3DTransform": (0, 12),
    "Euler2DTransform": (3, 0),
    "Euler3DTransform": (0, 6),
    "IdentityTransform": (0, 0),
    "MatrixOffsetTransformBase": (6, 12),
    "QuaternionRigidTransform": (0, 7),
    "Rigid2DTransform": (3, 0),
    "ScaleSkewVersor3DTransform": (0, 15),
    "ScaleTransform": (2, 3),
    "ScaleVersor3DTransform": (0, 9),
    "Similarity2DTransform": (4, 0),
    "Similarity3DTransform": (0, 7),
    "TranslationTransform": (2, 3),
    "VersorRigid3DTransform": (0, 6),
    "VersorTransform": (0, 3),
}


class Chain(NamedTuple):
    """Result of :func:`read_chain`.

    Attributes:
        transform: 3-D transform from points of the fixed image to points of the moving one.
        residual: largest error of its numerical inverses in mm, see
            :func:`~voxelmorph_monai.maps.chains.invert_transform`.
        spatial_dims: number of dimensions of the files, 3 or 2; 2-D transforms are converted to 3-D by
            :func:`~voxelmorph_monai.maps.chains.lift`.
    """

    transform: Transform
    residual: float
    spatial_dims: int

    def inverse(self) -> "Chain":
        """Invert the transform with :func:`~voxelmorph_monai.maps.chains.invert_transform`."""
        transform, missed = invert_transform(self.transform)
        return self._replace(transform=transform, residual=max(self.residual, missed))


def _is_finite(number: str) -> bool:
    try:
        return math.isfinite(float(number))
    except ValueError:
        return False


def _check_text(path: Path) -> None:
    """Raise ValueError for a text file that is cut off, or whose parameters are not finite or of the wrong number.

    ITK does not detect these errors. It reads a transform without fixed parameters as the identity. It stops reading a
    line at something that is not a number, and then takes the missing parameters from beyond its memory.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    if re.search(r"^\(Transform(Parameters)? ", text, re.MULTILINE):
        raise ValueError(
            f"{path} is a parameter file of elastix, which cannot be read. Let transformix write its displacement: "
            f'set (ResultImageFormat "nii.gz") in it and run transformix -def all -tp {path.name} -out FOLDER.'
        )
    transforms = re.findall("^Transform: (?!Composite)", text, re.MULTILINE)
    ends = re.findall("^FixedParameters:.*\n", text, re.MULTILINE)
    if len(ends) < len(transforms):
        raise ValueError(f"{path} is cut off: a transform in it has no line FixedParameters.")
    for line in re.findall("^(?:Fixed)?Parameters:(.*)", text, re.MULTILINE):
        if not all(map(_is_finite, line.split())):
            raise ValueError(f"{path} has parameters that are not finite numbers: {line.strip()[:80]}.")
    for name, dims, line in re.findall(r"^Transform: (\w+?)_\w+_([23])_[23]\s+Parameters:(.*)", text, re.MULTILINE):
        number, found = _NUM_PARAMETERS.get(name, (None, None))[int(dims) - 2], len(line.split())
        if number is not None and found != number:
            raise ValueError(f"{path} has {found} parameters of a {name}, which takes {number}.")


def _parse_itk(path: Path) -> list[Transform]:
    """Read all transforms in an ITK file.

    c3d and ANTs write affine maps as ``MatrixOffsetTransformBase``. ITK's Python package cannot create this class, but
    its parameters are those of an ``AffineTransform``, so a copy of the file with this name (padded to the same length)
    is read instead.
    """
    try:
        return itk.transformread(str(path))
    except RuntimeError:
        filler = b" " if path.suffix in _TEXTS else b"\0"
        content = path.read_bytes()
        renamed = _UNKNOWN_TO_PYTHON.sub(
            lambda found: (b"AffineTransform" + found[1]).ljust(len(found[0]), filler), content
        )
        if renamed == content:
            raise
        with TemporaryDirectory() as folder:
            copy = Path(folder, f"copy{path.suffix}")
            copy.write_bytes(renamed)
            return itk.transformread(str(copy))


def _read_itk(path: Path) -> Transform:
    if path.suffix in _TEXTS:
        _check_text(path)
    if path.suffix in _HDF5:
        check_chain_file(path)
    try:
        with silent_stderr():
            found = _parse_itk(path)
    except (RuntimeError, IndexError) as error:
        hint = " If FSL wrote it: vxm convert --from fsl." if path.suffix == ".mat" else ""
        raise ValueError(
            f"ITK cannot read {path} as a transform: it is damaged, or not in ITK's format.{hint}"
        ) from error
    if len(found) != 1:
        raise ValueError(f"{path} holds {len(found)} transforms; only one, or one composite, can be read.")
    if (found[0].GetInputSpaceDimension(), found[0].GetOutputSpaceDimension()) not in ((2, 2), (3, 3)):
        raise ValueError(f"{path} holds a {found[0].GetTransformTypeAsString()}, which is neither in 2-D nor in 3-D.")
    parts = flatten(found[0])
    if not parts:
        raise ValueError(f"{path} holds an empty composite.")
    for part in parts:
        if not _finite(part):
            raise ValueError(f"{path} holds NaN or Inf in its {part.GetNameOfClass()}.")
        if part.IsLinear() and not _invertible(matrix_of(part)):
            raise ValueError(f"{path} holds a linear transform without an inverse: {matrix_of(part).tolist()}.")
        if part.GetInputSpaceDimension() == 2 and not part.IsLinear() and not is_field(part):
            raise ValueError(
                f"{path} holds a {part.GetNameOfClass()} in 2-D, where only linear transforms and displacements can be "
                "read."
            )
    return found[0]


def _finite(part: Transform) -> bool:
    numbers = part.GetFixedParameters(), part.GetDisplacementField() if is_field(part) else part.GetParameters()
    return all(bool(np.isfinite(np.asarray(each)).all()) for each in numbers)


def _invertible(matrix: Affine) -> bool:
    return float(np.linalg.cond(matrix[:-1, :-1])) < 1e6


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")


def read_transform(path: str | Path) -> Transform:
    """Read one file: an ITK transform or composite (2-D or 3-D), a displacement, or a linear FreeSurfer transform.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not one complete transform.
    """
    path = Path(path)
    _require_file(path)
    if path.name.endswith(_NIFTI):
        return field_transform(*read_displacement(path))
    if path.suffix == ".lta":
        return linear_transform(read_lta(path))
    if path.suffix in _ITK:
        return _read_itk(path)
    if path.suffix in _OTHERS:
        raise ValueError(
            f"{path} is a FreeSurfer warp, which only FreeSurfer can convert: mri_warp_convert --inm3z (or "
            "--inmgzwarp) FILE --outitk FILE.nii.gz."
        )
    raise ValueError(f"{path} is not a transform file: its name does not end in {', '.join(_READ)}.")


def read_chain(names: Sequence[str]) -> Chain:
    """Read transforms in ANTs' order: a point of the fixed image passes through the first one first.

    Args:
        names: paths; ``[PATH,1]`` stands for the inverse of the transform in the file, as on ANTs' command lines. A
            displacement is inverted numerically.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a file is not a complete transform, or some are in 2-D and some in 3-D.
    """
    parts, residual, dims = [], 0.0, {}
    for name in names:
        path, inverted = parse_name(name)
        transform = read_transform(path)
        dims[name] = int(transform.GetInputSpaceDimension())
        transform = lift(transform)
        if inverted:
            transform, missed = invert_transform(transform)
            residual = max(residual, missed)
        parts.append(transform)
    if len(set(dims.values())) > 1:
        listed = ", ".join(f"{name} in {spatial_dims}-D" for name, spatial_dims in dims.items())
        raise ValueError(f"transforms in 2-D and in 3-D cannot be chained: {listed}.")
    return Chain(chain(parts), residual, dims[names[0]])


def open_chain(transforms: Sequence[str], *images: Scan | Frame | None) -> Chain:
    """Read transforms with :func:`read_chain`, and check that they have the number of dimensions of the images.

    Raises:
        ValueError: an image that is not None has another number of dimensions.
    """
    found = read_chain(transforms)
    for image in images:
        if image is not None and image.spatial_dims != found.spatial_dims:
            raise ValueError(f"{image.name} does not fit the transforms, which are in {found.spatial_dims}-D.")
    return found


def read_fsl_transform(path: str | Path, fixed: ImageGrid, moving: ImageGrid) -> Transform:
    """Read a FLIRT matrix, or a FNIRT warp or file of coefficients (``.nii``, ``.nii.gz``).

    Args:
        path: file to read.
        fixed: grid of the image that FSL calls the reference.
        moving: grid of the image that FSL calls the input.
    """
    path = Path(path)
    _require_file(path)
    if path.name.endswith((".nii", ".nii.gz")):
        return field_transform(*read_fnirt(path, fixed, moving))
    return linear_transform(read_flirt(path, fixed, moving))


def _form_of(path: Path, form: str | None) -> str:
    """Return the format to write; if ``form`` is None, by the extension of ``path``."""
    possible = [known for known, endings in _ENDINGS.items() if path.name.endswith(endings)]
    if form is None and not possible:
        raise ValueError(
            f"the format of {path} is unknown. Use the extension {', '.join(_READ)}, or give the format (--to)."
        )
    if form is None:
        return possible[0]
    if form not in FORMATS:
        raise ValueError(f"'{form}' is not a transform format. Choose one of {', '.join(FORMATS)}.")
    if form not in ("ants", *possible):
        raise ValueError(f"{path} does not fit format {form}, whose files end in {', '.join(_ENDINGS[form])}.")
    return form


def _pair(prefix: Path) -> tuple[Path, Path]:
    return prefix.with_name(f"{prefix.name}1Warp.nii.gz"), prefix.with_name(f"{prefix.name}0GenericAffine.mat")


def _sample(transform: Transform, grid: ImageGrid | None) -> tuple[NDArray[np.floating], Affine]:
    """Sample a transform as one displacement, on the given grid or on the grid of its first displacement."""
    parts = flatten(transform)
    if grid is None and is_field(parts[0]):
        ddf, affine = field_of(parts[0])
        if len(parts) == 1:
            return ddf, affine
        grid = ImageGrid(ddf.shape[1:], affine)
    if grid is None:
        raise ValueError(
            "the grid for the displacement is unknown, because the transform does not begin with a displacement. Give "
            "the fixed image (--reference)."
        )
    return on_grid(transform, grid), grid.affine


def _save_itk(path: Path, transform: Transform, spatial_dims: int = 3) -> None:
    parts = flatten(transform if spatial_dims == 3 else lower(transform))
    if len(parts) == 1 and parts[0].IsLinear():
        written = linear_transform(matrix_of(parts[0]))
    elif path.suffix not in _HDF5:
        raise ValueError(
            f"{path} cannot hold the transform, which is not linear. Write .h5, or .nii.gz for a displacement."
        )
    else:
        written = chain(parts)
    save_transform(path, written)


def _save_pair(prefix: Path, transform: Transform, grid: ImageGrid | None, spatial_dims: int) -> None:
    """Write a transform as an ANTs pair: a displacement, and the linear transform that follows it."""
    matrix = np.eye(4)
    for part in flatten(transform):
        matrix = matrix_of(part) @ matrix if part.IsLinear() else matrix
    warp, affine = _pair(prefix)
    rest = flatten(chain([transform, linear_transform(np.linalg.inv(matrix))]))
    if all(part.IsLinear() for part in rest):
        warp.unlink(missing_ok=True)  # an old file would be mistaken for part of this pair
    else:
        if rest[-1].IsLinear() and np.allclose(matrix_of(rest[-1]), np.eye(4), atol=1e-9):
            rest.pop()  # so that a displacement that was read is written without resampling
        save_displacement(warp, *_sample(chain(rest), grid), spatial_dims=spatial_dims)
    _save_itk(affine, linear_transform(matrix), spatial_dims)


def _save_foreign(
    path: Path, transform: Transform, form: str, fixed: ImageGrid | None, moving: ImageGrid | None
) -> None:
    if fixed is None or moving is None:
        raise ValueError(f"format {form} needs both images (--reference and --moving).")
    parts = flatten(transform)
    linear = len(parts) == 1 and parts[0].IsLinear()
    if not linear and not path.name.endswith(_NIFTI):
        raise ValueError(
            f"{path} cannot hold the transform, which is not linear: {path.suffix} files of {form} are matrices."
        )
    if form == "lta":
        save_lta(path, matrix_of(parts[0]), fixed, moving)
    elif path.name.endswith(_NIFTI):
        save_fnirt(path, on_grid(transform, fixed), fixed, moving)
    else:
        save_flirt(path, matrix_of(parts[0]), fixed, moving)


def check_target(path: Path, form: str | None, overwrite: bool, inputs: Sequence[str | Path] = ()) -> str:
    """Return the format that :func:`save_chain` would write to ``path``; raises an error if it could not."""
    form = _form_of(path, form)
    for each in _pair(path) if form == "ants" else [path]:
        check_output(each, overwrite, inputs)
    return form


def save_chain(
    path: str | Path,
    transform: Transform,
    *,
    form: str | None = None,
    grid: ImageGrid | None = None,
    moving_grid: ImageGrid | None = None,
    spatial_dims: int = 3,
    overwrite: bool = False,
    inputs: Sequence[str | Path] = (),
) -> None:
    """Write a transform; each file is written completely or not at all.

    Args:
        path: file, or prefix of an ANTs pair.
        transform: 3-D transform from points of the fixed image to points of the moving one.
        form: one of ``FORMATS`` (default: by the extension, 1007 for NIfTI).
        grid: size and affine (RAS, mm) of the fixed image, for a displacement (default: the grid of the displacement
            with which the transform begins).
        moving_grid: size and affine of the moving image; FSL and FreeSurfer files need both grids.
        spatial_dims: 2 to write a transform of 2-D images, see :class:`Chain`.
        overwrite: replace an existing file.
        inputs: input files, which are never replaced.
    """
    path = Path(path)
    form = check_target(path, form, overwrite, inputs)
    if form in ("lta", "fsl"):
        if spatial_dims == 2:
            raise ValueError(f"{path} cannot be written: format {form} holds only 3-D transforms, but this one is 2-D.")
        _save_foreign(path, transform, form, grid, moving_grid)
    elif form == "ants":
        _save_pair(path, transform, grid, spatial_dims)
    elif form == "itk":
        _save_itk(path, transform, spatial_dims)
        if path.suffix in (".h5", ".hdf5") and grid is not None and moving_grid is not None:
            write_ends(path, grid, moving_grid)
    else:
        save_displacement(path, *_sample(transform, grid), spatial_dims=spatial_dims, intent=int(form))
