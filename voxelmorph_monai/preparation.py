"""From scans as they come to scans that a network can learn from: one space, one grid, one range of intensities.

Each scan is aligned to the mean adult brain MNI152 by an affine transform and sampled once, on a grid whose axes run
left, inferior, anterior (LIA, as FreeSurfer has it) around the middle of the template's brain: with 160 x 192 x 224
voxels of 1 mm the grid of the literature.
"""

import json
import random
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from nilearn import datasets
from numpy.typing import NDArray
from scipy import ndimage

from voxelmorph_monai.affine import register_affine
from voxelmorph_monai.files import atomic, stamp, sweep, write_json
from voxelmorph_monai.processes import Processes, default_jobs, failures
from voxelmorph_monai.spaces import (
    Affine,
    Plane,
    background,
    read_image,
    read_labels,
    require_right_angles,
    require_same_grid,
    save_image,
    save_transform,
    spacing,
    transform_affine,
)
from voxelmorph_monai.synthesis import paint

__all__ = [
    "Grid",
    "check_brain",
    "grid_affine",
    "mni152",
    "mni152_tissue",
    "prepare",
    "resample",
    "resample_intensities",
    "rescale",
    "sample_scan",
]

_ORANGE = [1.0, 0.35, 0.0]
_MEMORY = 3 * 2**30  # bytes a process may need: 1.7 GiB were seen for a brain of 1 mm
_LIA = np.array([[-1, 0, 0], [0, 0, 1], [0, -1, 0]])  # column: the direction (RAS) of an array axis


class Grid(NamedTuple):
    """Where prepared scans live.

    Attributes:
        size: voxels along left, inferior, anterior; two along the axes of a plane.
        spacing: side of a voxel, in mm.
    """

    size: tuple[int, ...] = (160, 192, 224)
    spacing: float = 1.0


LITERATURE = Grid()
_MARGIN = 8  # voxels around an image that a grid is made for


class _Scan(NamedTuple):
    """One scan to prepare; its picture is painted if the image is the label map itself."""

    name: str
    image: Path
    label: Path | None

    def outputs(self) -> dict[str, str]:
        """What becomes of it, relative to the folder of the datalist."""
        kinds = ["image", "label"] if self.label else ["image"]
        return {kind: f"{kind}s/{self.name}.nii.gz" for kind in kinds}

    def inputs(self) -> list[list[Any]]:
        """What tells whether the files are still the same."""
        return [stamp(path) for path in (self.image, self.label) if path]


class Prepared(NamedTuple):
    """What :func:`prepare` did.

    Attributes:
        datalist: path of the datalist.
        errors: reason by name, for the scans that failed.
    """

    datalist: Path
    errors: dict[str, str]


@cache
def mni152() -> tuple[NDArray[np.float32], Affine]:
    """Mean adult brain MNI152 without skull, 1 mm: intensities in [0, 1], 0 outside the brain, and the affine.

    Both are read once and shared: they cannot be written to.
    """
    image = datasets.load_mni152_template(resolution=1)
    mask = datasets.load_mni152_brain_mask(resolution=1)
    brain = (image.get_fdata() * mask.get_fdata()).astype(np.float32), image.affine
    for array in brain:
        array.flags.writeable = False
    return brain


def mni152_tissue() -> tuple[NDArray[np.uint8], Affine]:
    """Most probable tissue in each voxel of MNI152: 0 outside the brain, 1 CSF, 2 grey, 3 white, and the affine.

    What the probabilities of grey and white matter leave to 1 within the brain counts as CSF.
    """
    grey = datasets.load_mni152_gm_template(resolution=1).get_fdata()
    white = datasets.load_mni152_wm_template(resolution=1).get_fdata()
    mask = datasets.load_mni152_brain_mask(resolution=1)
    tissue = np.argmax([1 - grey - white, grey, white], axis=0) + 1
    return np.where(mask.get_fdata() > 0, tissue, 0).astype(np.uint8), mask.affine


def sample_scan(name: str) -> Path:
    """Path of a scan that comes with the package: ``"colin27"``, or ``"colin27_tissue"``, coded as MNI152's tissue."""
    folder = Path(__file__).parent / "sample"
    names = sorted(path.name.removesuffix(".nii.gz") for path in folder.glob("*.nii.gz"))
    if name not in names:
        raise ValueError(f"sample must be one of {names}, got '{name}'.")
    return folder / f"{name}.nii.gz"


def _box(image: tuple[NDArray[Any], Affine]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Lower and upper corner (RAS, mm) of the box that holds all that ``image`` shows, whatever its axes."""
    array, affine = image
    found = ndimage.find_objects((array > background(array)).astype(np.uint8))[0]
    corners = np.stack(np.meshgrid(*[(edge.start, edge.stop - 1) for edge in found], [1], indexing="ij"))
    ends = (affine @ corners.reshape(len(affine), -1))[:-1]
    return ends.min(axis=1), ends.max(axis=1)


@cache
def _template_box() -> tuple[NDArray[Any], NDArray[Any]]:
    return _box(mni152())


def _extent(image: tuple[NDArray[Any], Affine] | None) -> tuple[Plane | None, NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Plane of a slice, or None; the axes of a grid, in columns; and the box (mm) that it has to hold."""
    plane = Plane.of(image) if image is not None and 1 in image[0].shape else None
    axes = _LIA if plane is None else np.eye(2)
    if image is None:
        return plane, axes, *_template_box()
    return plane, axes, *_box(image if plane is None else plane.flatten(image))


def fitting_grid(image: tuple[NDArray[Any], Affine]) -> Grid:
    """Grid around what ``image`` ``(array, affine)`` shows above its background, and a margin.

    It is as fine as the finest axis of the image, unless that makes more voxels than the literature's grid has.
    """
    plane, axes, low, high = _extent(image)
    sides = spacing(image[1])
    side = float(sides.min() if plane is None else sides[np.array(image[0].shape) > 1].min())
    while True:
        size = np.ceil(np.abs(axes.T @ (high - low)) / side - 1e-3).astype(int) + 1 + 2 * _MARGIN
        if size.prod() <= np.prod(LITERATURE.size):
            return Grid(tuple(size.tolist()), side)
        side *= 1.02


def grid_affine(grid: Grid, image: tuple[NDArray[Any], Affine] | None = None) -> Affine:
    """Affine (RAS, mm) of ``grid`` around what ``image`` ``(array, affine)`` shows (default: MNI152's brain).

    Around a slice it lies in its plane, ``(X, Y, 1)``.

    Raises:
        ValueError: the grid is none, or too small to hold it.
    """
    plane, axes, low, high = _extent(image)
    if len(grid.size) != len(axes) or min(grid.size) < 1 or not 0 < grid.spacing < np.inf:
        raise ValueError(
            f"a grid must have {len(axes)} sizes > 0 and a spacing > 0 (--size, --spacing), got {grid.size} and "
            f"{grid.spacing}."
        )
    extent, needed = np.multiply(grid.size, grid.spacing), np.abs(axes.T @ (high - low))
    if (extent < needed).any():
        what = "the template's brain" if image is None else "the fixed image"
        raise ValueError(
            f"a grid must hold {what}, {needed.round(1).tolist()} mm, but has {extent.round(1).tolist()} mm "
            "(--size, --spacing)."
        )
    affine = np.eye(len(axes) + 1)
    affine[:-1, :-1] = grid.spacing * axes
    affine[:-1, -1] = (low + high) / 2 - affine[:-1, :-1] @ ((np.array(grid.size) - 1) / 2)
    return affine if plane is None else plane.place(affine)


def resample(
    image: tuple[NDArray[Any], Affine],
    size: Sequence[int],
    affine: Affine,
    mapping: NDArray[np.floating[Any]],
    order: int = 1,
    outside: float = 0.0,
) -> NDArray[Any]:
    """Sample ``image`` ``(array, affine)`` on another grid.

    Args:
        image: what to sample.
        size: of the other grid.
        affine: of the other grid (RAS, mm).
        mapping: 4 x 4, from points of the other grid to points of the image (RAS, mm).
        order: 1 linear; 0 nearest, which invents no label.
        outside: what it is beyond its outermost voxels.
    """
    to_voxels = np.linalg.inv(image[1]) @ mapping @ affine
    to_voxels[:3][np.array(image[0].shape) == 1] = 0  # across a slice there is no outside
    return ndimage.affine_transform(image[0], to_voxels, output_shape=tuple(size), order=order, cval=outside)


def resample_intensities(
    image: tuple[NDArray[np.float32], Affine], size: Sequence[int], affine: Affine, mapping: Affine
) -> NDArray[np.float32]:
    """Sample a scan as :func:`resample` does, smoothed along each axis that the other grid samples more coarsely.

    A voxel of that grid then stands for all that lies within it.
    """
    sides = spacing(image[1])
    width = np.sqrt(np.maximum(spacing(affine).max() ** 2 - sides**2, 0)) / sides  # at half height, in voxels
    return resample((ndimage.gaussian_filter(image[0], width / 2.355), image[1]), size, affine, mapping)


@cache
def _template(grid: Grid) -> NDArray[np.float32]:
    return resample(mni152(), grid.size, grid_affine(grid), np.eye(4))


def rescale(array: NDArray[np.float32]) -> NDArray[np.float32]:
    """Intensities above the background, divided by their 99.5th percentile and clipped: [0, 1]."""
    shown = array - background(array)
    return np.clip(shown / np.percentile(shown[shown > 0], 99.5), 0, 1)


def _some(names: Sequence[Any]) -> str:
    """At most five of the names, and how many more there are."""
    listed = ", ".join(str(name) for name in names[:5])
    return listed if len(names) <= 5 else f"{listed} and {len(names) - 5} more"


def _match(entries: Sequence[Path], pattern: str) -> dict[tuple[Path, str], Path]:
    """Files by the folder that ``pattern`` starts from and the part of their path that each ``*`` in it stands for."""
    if "*" not in pattern or "**" in pattern or Path(pattern).is_absolute():
        raise ValueError(f"a pattern must be relative, with '*' for the name of a scan, got '{pattern}'.")
    first, *others = (re.escape(part) for part in pattern.split("*"))
    matcher = re.compile(first + "([^/.][^/]*)" + r"\1".join(others))
    depth = len(Path(pattern).parts)
    found = {}
    for entry in entries:
        for path in sorted(entry.glob(pattern)) if entry.is_dir() else [entry]:
            match = matcher.fullmatch("/".join(path.parts[-depth:]))
            if match:
                found[path.parents[depth - 1], match[1]] = path
            elif path is entry:
                raise ValueError(f"{path} must match '{pattern}'.")
    return found


def _find_scans(inputs: Sequence[str | Path], images: str, labels: str | None) -> list[_Scan]:
    entries = [Path(entry).absolute() for entry in inputs]
    missing = [entry for entry in entries if not entry.exists()]
    if missing:
        raise FileNotFoundError(f"inputs must be folders or scans, but these do not exist: {_some(missing)}.")
    found = _match(entries, images)
    if not found:
        raise ValueError(f"there must be scans that match '{images}', got none in {_some(entries) or 'no input'}.")
    scans = []
    for (folder, name), path in found.items():
        scans.append(_Scan(name, path, folder / labels.replace("*", name) if labels else None))
    names = [scan.name for scan in scans]
    twice = [scan.image for scan in scans if names.count(scan.name) > 1]
    if twice:
        raise ValueError(f"each scan must have a name of its own, got one name for {_some(twice)}.")
    if labels:
        bare = [scan.label for scan in scans if scan.label and not scan.label.exists()]
        if bare:
            raise FileNotFoundError(f"each scan must have labels, but these do not exist: {_some(bare)}.")
        ours = {scan.label for scan in scans}
        alone = [path for path in _match([e for e in entries if e.is_dir()], labels).values() if path not in ours]
        if alone:
            raise ValueError(
                f"all labels must belong to a scan that matches '{images}', but not these: {_some(alone)}."
            )
    return sorted(scans)


def check_brain(image: tuple[NDArray[Any], Affine], subject: str) -> None:
    """Raise ValueError unless ``image`` ``(array, affine)`` can be a skull-stripped head, its axes at right angles."""
    if background(image[0]) < 0:
        raise ValueError(f"{subject} must have a background of 0 and nothing far below it, got {image[0].min():.3g}.")
    sides = spacing(image[1])
    litres = np.count_nonzero(image[0] > 0) * np.prod(sides) * 1e-6
    # Interpolation leaves up to two voxels of little above 0 around 0.1 square metres of brain.
    most = 2.5 + 0.2 * sides.mean()
    if not 0.3 < litres < most:
        raise ValueError(
            f"{subject} must be a skull-stripped head, 0 around a brain of 0.3 to {most:.2g} litres at this spacing, "
            f"got {litres:.2g} litres above 0."
        )
    require_right_angles(image[1], subject)


def _read(scan: _Scan) -> tuple[NDArray[np.float32], NDArray[Any] | None, Affine]:
    """Intensities in [0, 1], labels if there are any, and the affine of both."""
    if scan.label == scan.image:
        labels, affine = read_labels(scan.image)
        image = paint(torch.from_numpy(labels.astype(np.int64))).numpy()
        check_brain((image, affine), f"the brain in {scan.image}")
        return image, labels, affine
    image, affine = read_image(scan.image)
    check_brain((image, affine), str(scan.image))
    if scan.label is None:
        return rescale(image), None, affine
    labels, label_affine = read_labels(scan.label)
    require_same_grid((image, affine), (labels, label_affine), (str(scan.image), str(scan.label)))
    return rescale(image), labels, affine


def _check(scan: _Scan) -> None:
    _read(scan)


def _record(output: Path, name: str) -> Path:
    return output / "transforms" / f"{name}.json"


def _prepare_scan(scan: _Scan, grid: Grid, output: Path) -> None:
    """Prepare one scan. Its record is written last: a scan without one counts as not done."""
    inputs = scan.inputs()
    image, labels, affine = _read(scan)
    transform = register_affine((image, affine), mni152())
    mapping, target = transform_affine(transform), grid_affine(grid)
    prepared = resample_intensities((image, affine), grid.size, target, mapping)
    save_image(output / scan.outputs()["image"], prepared, target)
    if labels is not None:
        warped = resample((labels, affine), grid.size, target, mapping, order=0)
        save_image(output / scan.outputs()["label"], warped, target)
    save_transform(output / "transforms" / f"{scan.name}.txt", transform)
    template = _template(grid)
    ncc = np.corrcoef(prepared[template > 0], template[template > 0])[0, 1]
    write_json(_record(output, scan.name), {"inputs": inputs, "ncc": round(float(ncc), 4)})


def _is_done(scan: _Scan, output: Path) -> bool:
    record = _record(output, scan.name)
    written = record.exists() and all((output / path).exists() for path in scan.outputs().values())
    if not written:
        return False
    try:
        return bool(json.loads(record.read_text(encoding="utf-8"))["inputs"] == scan.inputs())
    except (ValueError, KeyError, TypeError):  # what cannot be read records nothing
        return False


def _grid_json(grid: Grid) -> dict[str, Any]:
    return {"size": list(grid.size), "spacing": grid.spacing, "orientation": "LIA"}


def _require_ours(output: Path, grid: Grid) -> None:
    """Raise ValueError unless ``output`` is a folder that is new, empty or of an earlier call with the same grid."""
    mark = output / "grid.json"
    if mark.exists():
        found, asked = json.loads(mark.read_text(encoding="utf-8")), _grid_json(grid)
        if found != asked:
            raise ValueError(f"{output} must be asked for its own grid, {found}, or be another folder, got {asked}.")
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} must be new, empty or made by 'vxm prepare', but something else is there.")


def _claim(output: Path, grid: Grid) -> None:
    """Make ``output`` a folder of ours."""
    for folder in (output, *(output / part for part in ("images", "labels", "transforms"))):
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
    write_json(output / "grid.json", _grid_json(grid))


def _given_sections(split: Path, names: Sequence[str]) -> dict[str, list[str]]:
    try:
        sections = json.loads(split.read_text(encoding="utf-8"))
        if not all(isinstance(section, list) for section in sections.values()):
            raise TypeError("a section is not a list")
        listed = [str(name) for section in sections.values() for name in section]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{split} must be a JSON object of lists of names of scans: {error}.") from error
    if "grid" in sections:
        raise ValueError(f"{split} must not name a section 'grid', which is what the datalist calls the grid.")
    if sorted(listed) != sorted(names):
        extra, missing = sorted(set(listed) - set(names)), sorted(set(names) - set(listed))
        twice = sorted({name for name in listed if listed.count(name) > 1})
        raise ValueError(
            f"{split} must name each scan once, but it misses [{_some(missing)}], repeats [{_some(twice)}] and names "
            f"[{_some(extra)}], which are no scans."
        )
    return {"training": [], "validation": [], "test": [], **sections}


def _random_sections(names: Sequence[str], validation: float, test: float, seed: int) -> dict[str, list[str]]:
    if not (validation >= 0 and test >= 0 and validation + test <= 1):
        raise ValueError(f"validation and test must be shares >= 0 of at most 1 in all, got {validation} and {test}.")
    shuffled = random.Random(seed).sample(names, len(names))
    # Two scans make a pair: a share that is asked for has at least two, if as many remain for training.
    least = 2 if len(names) >= 6 else 0
    first, second = (max(least, round(share * len(names))) if share > 0 else 0 for share in (validation, test))
    return {
        "training": sorted(shuffled[first + second :]),
        "validation": sorted(shuffled[:first]),
        "test": sorted(shuffled[first : first + second]),
    }


def _write_datalist(scans: Sequence[_Scan], sections: Mapping[str, Sequence[str]], grid: Grid, output: Path) -> Path:
    entries = {scan.name: scan.outputs() for scan in scans}
    content: dict[str, Any] = {
        section: [entries[name] for name in names if name in entries] for section, names in sections.items()
    }
    content["grid"] = _grid_json(grid)
    path = output / "datalist.json"
    with atomic(path) as temporary:
        write_json(temporary, content)
        if path.exists() and path.read_bytes() != temporary.read_bytes():
            path.replace(output / "datalist.previous.json")  # it may have been edited
    return path


def _slices(array: NDArray[Any]) -> NDArray[Any]:
    """Middle slices of an LIA volume side by side ``(H, W)``: sagittal, coronal, axial; seen from the feet."""
    middle = [n // 2 for n in array.shape]
    views = [array[middle[0]], array[:, :, middle[2]].T, array[:, middle[1], ::-1].T]
    height = max(len(view) for view in views)
    return np.concatenate([np.pad(view, [(0, height - len(view)), (0, 0)]) for view in views], axis=1)


def _draw_contact_sheet(names: Sequence[str], grid: Grid, output: Path) -> None:
    """Middle slices of every scan with the template's outline and the correlation with it, the lowest first."""
    ncc = {name: json.loads(_record(output, name).read_text(encoding="utf-8"))["ncc"] for name in names}
    order = sorted(names, key=ncc.__getitem__)
    step = max(1, round(max(grid.size) / 112))  # pictures of about 112 pixels
    brain = _slices(_template(grid) > 0)[::step, ::step]
    outline = (brain & ~ndimage.binary_erosion(brain))[..., None]
    head, columns = 16, 3
    tiles = []
    for name in order:
        grey = _slices(read_image(output / "images" / f"{name}.nii.gz")[0])[::step, ::step, None]
        tiles.append(np.pad(np.where(outline, _ORANGE, grey), [(head, 2), (0, 6), (0, 0)]))
    height, width = tiles[0].shape[:2]
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    sheet = np.concatenate([np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)])
    figure = Figure(figsize=(sheet.shape[1] / 100, sheet.shape[0] / 100), dpi=100)
    figure.figimage(sheet)
    for i, name in enumerate(order):
        left, top = i % columns * width, sheet.shape[0] - i // columns * height
        place = (left + 3) / sheet.shape[1], (top - head + 4) / sheet.shape[0]
        figure.text(*place, f"{name}   NCC {ncc[name]:.2f}", color="w", fontsize=8)
    with atomic(output / "qc.png") as temporary:
        figure.savefig(temporary)


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    images: str = "*.nii.gz",
    labels: str | None = None,
    maps: bool = False,
    grid: Grid = LITERATURE,
    split: str | Path | None = None,
    validation: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    jobs: int | None = None,
) -> Prepared:
    """Align skull-stripped T1 scans to MNI152 and write them, with their labels, on one grid.

    ``output`` gets ``images/NAME.nii.gz`` (float32 in [0, 1]), ``labels/NAME.nii.gz`` (nearest neighbour, in their own
    type), ``transforms/NAME.txt`` (ITK: from points of MNI152 to points of the scan), ``datalist.json`` with the
    sections ``training``, ``validation`` and ``test``, and ``qc.png`` to see at a glance which scans went wrong.

    All inputs are checked before the work starts. Called again it does only what is missing or whose input changed;
    another grid needs another folder. The processes start afresh, so that a script must call this under
    ``if __name__ == "__main__":``.

    Args:
        inputs: folders, or scans, NIfTI or MGZ.
        output: a folder that is new, empty or of an earlier call.
        images: what to look for in the folders; ``*`` stands for the name of a scan.
        labels: the same for its labels, if it has any.
        maps: what is found are label maps with FreeSurfer's numbers, from which images are painted
            (:func:`~voxelmorph_monai.synthesis.paint`).
        grid: size and spacing (mm).
        split: JSON file that lists the names of the scans by section; by default they are drawn.
        validation: share of the scans that is drawn for validation.
        test: share of the scans that is drawn for the test.
        seed: of the drawing.
        jobs: number of processes (default: of processors, or fewer if they found less than 3 GiB of memory each).

    Raises:
        ValueError: an input or an option cannot be used; the message says which and why.
        FileNotFoundError: an input does not exist.
    """
    output = Path(output).absolute()
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}.")
    if seed < 0:  # Python's generator drops the sign
        raise ValueError(f"seed must be at least 0, got {seed}.")
    grid_affine(grid)  # raises on one that cannot be
    if maps and labels:
        raise ValueError(f"labels must not be given with maps, which are labels themselves, got '{labels}'.")
    scans = _find_scans(inputs, images, images if maps else labels)
    names = [scan.name for scan in scans]
    sections = _given_sections(Path(split), names) if split else _random_sections(names, validation, test, seed)
    _require_ours(output, grid)
    todo = [scan for scan in scans if not _is_done(scan, output)]
    with Processes(jobs or default_jobs(_MEMORY), threads=1) as pool:
        faults = dict(failures(pool, "check", "scan", _check, {scan.name: [scan] for scan in todo}))
        if faults:
            first = min(faults)
            bad = f"{len(faults)} of {len(todo)} scans ({_some(sorted(faults))})"
            raise ValueError(f"all scans must be fit for use, but {bad} are not; {first}: {faults[first]}")
        _claim(output, grid)
        calls = {scan.name: [scan, grid, output] for scan in todo}
        errors = dict(failures(pool, "prepare", "scan", _prepare_scan, calls))
    good = [scan for scan in scans if scan.name not in errors]
    if good:
        _draw_contact_sheet([scan.name for scan in good], grid, output)
    return Prepared(_write_datalist(good, sections, grid, output), errors)
