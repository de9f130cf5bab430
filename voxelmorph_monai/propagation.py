"""Labels for a scan from labelled ones: the most similar are registered to it, and their labels vote.

This is segmentation by several atlases (Heckemann et al., NeuroImage 2006), which are chosen anew for each scan. What
a structure is called counts, not its value: label maps that were drawn apart rarely number the same structures alike.
"""

import shutil
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from voxelmorph_monai.atlas import joint_weights
from voxelmorph_monai.blocks import majority
from voxelmorph_monai.files import atomic_folder, require_new, stamp
from voxelmorph_monai.preparation import mni152, rescale
from voxelmorph_monai.registration import register
from voxelmorph_monai.results import correlation
from voxelmorph_monai.spaces import read_image, read_labels, require_same_grid, warp_scan

__all__ = ["Study", "copy_label_app", "number_structures", "propagate", "rank", "renumbered", "structures"]

_WINDOW = 5  # voxels a side, by which an atlas bundle compares, too
_STEP = 4  # voxels of MNI152 are thinned by it, to 4 mm: enough to see how similar two aligned brains are


class Study(NamedTuple):
    """A labelled scan.

    Attributes:
        name: what to call it in an error.
        image: its file.
        label: its label map, on the same grid.
        names: of structures, by their value in the label map. A value without a name is called by itself, "label 7".
    """

    name: str
    image: Path
    label: Path
    names: Mapping[int, str] = {}


@cache
def _values(path: str, size: int, time_of_change: int) -> tuple[int, ...]:
    return tuple(np.unique(read_labels(path, planar=True)[0]).tolist())


def structures(study: Study) -> dict[int, str]:
    """Names of the structures that the label map of a study holds, by value; 0 and what is called background are none.

    Raises:
        FileNotFoundError: there is no label map.
        ValueError: it is none.
    """
    if not study.label.is_file():
        raise FileNotFoundError(f"labels of {study.name} must be a label map, but there is no such file.")
    named = {value: study.names.get(value, f"label {value}") for value in _values(*stamp(study.label)) if value > 0}
    return {value: name for value, name in named.items() if name.lower() != "background"}


def number_structures(studies: Sequence[Study]) -> dict[str, int]:
    """Number the structures of all studies 1, 2, ..., in the order in which the studies bring them.

    >>> number_structures([])
    {}
    """
    names = dict.fromkeys(name for study in studies for name in structures(study).values())
    return {name: number for number, name in enumerate(names, 1)}


def renumbered(study: Study, numbers: Mapping[str, int]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Label map of a study and its affine, structures numbered as in ``numbers`` and all else 0.

    It is of the smallest unsigned type that holds all the numbers: uint8 up to 255 structures.
    """
    labels, affine = read_labels(study.label, planar=True)
    named = structures(study)
    values = np.unique(labels)
    new = [numbers.get(named.get(value, ""), 0) for value in values.tolist()]
    kind = np.min_scalar_type(max(numbers.values(), default=1))
    return np.array(new, dtype=kind)[np.searchsorted(values, labels)], affine


@lru_cache(maxsize=1024)  # a scan is aligned once, however often it is compared
def _in_mni152(path: str, size: int, time_of_change: int, transform: str) -> NDArray[np.float32]:
    array, affine = mni152()
    thinned = affine @ np.diag([_STEP, _STEP, _STEP, 1.0])
    reference = np.ascontiguousarray(array[::_STEP, ::_STEP, ::_STEP]), thinned
    return rescale(register(read_image(path), reference, space="fixed", transform=transform).warped)


def _similarity(study: Study, fixed: Path, space: str, transform: str) -> float:
    if space == "mni152":
        first, second = (_in_mni152(*stamp(path), transform) for path in (study.image, fixed))
        return correlation(first, second)
    image = read_image(fixed, planar=True)
    found = register(
        read_image(study.image, planar=True), image, space=space, transform=transform, names=(study.name, "the scan")
    )
    return correlation(found.warped, image[0])


def rank(
    studies: Sequence[Study], fixed: str | Path, *, space: str = "mni152", transform: str = "affine"
) -> tuple[list[tuple[float, Study]], dict[str, str]]:
    """Order studies by how similar they are to a scan once an affine transform has aligned them.

    Args:
        studies: any number.
        fixed: scan that is to get labels.
        space: ``"mni152"``: all are brains, and compared in MNI152, at 4 mm; each is aligned once, which takes some
            seconds, and remembered as long as the process lives. ``"fixed"``: each is aligned to the scan, every time.
        transform: as in :func:`~voxelmorph_monai.registration.register`.

    Returns:
        Correlation and study, the most similar first; and why other studies could not be compared, by name.
    """
    found, reasons = [], {}
    for study in studies:
        try:
            found.append((_similarity(study, Path(fixed), space, transform), study))
        except (ValueError, OSError) as error:
            reasons[study.name] = str(error)
    return sorted(found, key=lambda item: (-item[0], item[1].name)), reasons


def _weights(warped: Sequence[NDArray[np.float32]], fixed: NDArray[np.float32]) -> NDArray[np.float32]:
    """Weights of joint label fusion ``(A, X, Y, Z)``: of warped images that look like the fixed one around a voxel."""
    scaled = rescale(fixed)
    differences = np.stack([np.abs(rescale(image) - scaled) for image in warped])
    along = tuple(axis for axis in range(1, 4) if fixed.shape[axis - 1] == 1)  # of a slice, in 2-D
    found = joint_weights(torch.from_numpy(differences.squeeze(along))[None], _WINDOW)
    return found[0].numpy().reshape(differences.shape)


def propagate(studies: Sequence[Study], fixed: str | Path, numbers: Mapping[str, int], **options: Any) -> NDArray[Any]:
    """Register studies to a scan, carry their labels along and let them vote: labels ``(X, Y, Z)`` on its grid.

    Args:
        studies: at least one; several have the weights of :func:`~voxelmorph_monai.atlas.joint_weights`.
        fixed: scan that is to get labels.
        numbers: of the structures, by name (:func:`number_structures`).
        **options: of :func:`~voxelmorph_monai.registration.register`.

    Raises:
        ValueError: a scan or an option cannot be used; the message says which and why.
        FileNotFoundError: a file does not exist.
    """
    if not studies:
        raise ValueError("labels must come from at least one study, got none.")
    image = read_image(fixed, planar=True)
    maps, warped = [], []
    for study in studies:
        moving, labels = read_image(study.image, planar=True), renumbered(study, numbers)
        require_same_grid(moving, labels, (study.name, f"labels of {study.name}"))
        found = register(moving, image, names=(study.name, "the scan"), **options)
        maps.append(warp_scan(labels, found.ddf, image[1], order=0))
        warped.append(found.warped)
    if len(maps) == 1:
        return maps[0]
    candidates = torch.from_numpy(np.stack(maps).astype(np.int32))
    weights = torch.from_numpy(_weights(warped, image[0]))
    return majority(candidates[None], weights[None])[0, 0].numpy().astype(maps[0].dtype)


def copy_label_app(output: str | Path) -> None:
    """Write the app that lets MONAI Label do this for its clients into the folder ``output``.

    Raises:
        FileExistsError: ``output`` exists.
    """
    output = Path(output)
    require_new(output)
    with atomic_folder(output) as folder:
        for name in ("main.py", "requirements.txt"):
            shutil.copy(Path(__file__).with_name("label_app") / name, folder / name)
