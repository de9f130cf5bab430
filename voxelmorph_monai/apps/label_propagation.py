"""Label a scan by registering the most similar labelled scans to it and letting their labels vote.

This is multi-atlas segmentation (Heckemann et al., NeuroImage 2006) with atlases chosen for each scan. Structures are
matched by name, not by value: separately drawn label maps rarely use the same numbers.
"""

import shutil
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from voxelmorph_monai.apps.options import DEFAULTS, Options
from voxelmorph_monai.apps.register import register_scans
from voxelmorph_monai.atlas import joint_weights
from voxelmorph_monai.blocks import weighted_vote
from voxelmorph_monai.io.atomic import atomic_folder, require_new
from voxelmorph_monai.io.formats import stamp
from voxelmorph_monai.report import correlation
from voxelmorph_monai.space.resampling import rescale, viewed
from voxelmorph_monai.space.scan import Scan
from voxelmorph_monai.space.template import mni152

__all__ = ["Study", "copy_label_app", "number_structures", "propagate", "rank", "renumbered", "structures"]

_WINDOW = 5  # voxels a side, the same as in an atlas bundle
_STEP = 4  # subsamples MNI152 to 4 mm, which is enough to compare aligned brains


class Study(NamedTuple):
    """A labelled scan.

    Attributes:
        name: name of the scan in error messages.
        image: file of the image.
        label: file of the label map, on the same grid.
        names: names of structures by their value in the label map. A value without a name is called "label 7".
    """

    name: str
    image: Path
    label: Path
    names: Mapping[int, str] = {}


@cache
def _values(path: str, size: int, time_of_change: int) -> tuple[int, ...]:
    return tuple(np.unique(Scan.read_labels(path).array).tolist())


def structures(study: Study) -> dict[int, str]:
    """Names of the structures in the label map of a study, by value; without 0 and anything named background.

    Raises:
        FileNotFoundError: the label map does not exist.
        ValueError: the file is not a label map.
    """
    if not study.label.is_file():
        raise FileNotFoundError(f"the labels of {study.name} do not exist: {study.label}.")
    named = {value: study.names.get(value, f"label {value}") for value in _values(*stamp(study.label)) if value > 0}
    return {value: name for value, name in named.items() if name.lower() != "background"}


def number_structures(studies: Sequence[Study]) -> dict[str, int]:
    """Number the structures of all studies 1, 2, ..., in the order of the studies.

    >>> number_structures([])
    {}
    """
    names = dict.fromkeys(name for study in studies for name in structures(study).values())
    return {name: number for number, name in enumerate(names, 1)}


def renumbered(study: Study, numbers: Mapping[str, int]) -> Scan:
    """Label map of a study with structures numbered as in ``numbers``, and 0 elsewhere.

    Its type is the smallest unsigned one that holds all numbers: uint8 up to 255 structures.
    """
    labels, named = Scan.read_labels(study.label), structures(study)
    values = np.unique(labels.array)
    new = [numbers.get(named.get(value, ""), 0) for value in values.tolist()]
    kind = np.min_scalar_type(max(numbers.values(), default=1))
    return labels.like(np.array(new, dtype=kind)[np.searchsorted(values, labels.array)])


@lru_cache(maxsize=1024)  # a scan is aligned once, however often it is compared
def _in_mni152(path: str, size: int, time_of_change: int, alignment: str) -> tuple[Scan, NDArray[np.bool_]]:
    template = mni152()
    thinned = np.ascontiguousarray(template.array[::_STEP, ::_STEP, ::_STEP])
    reference = Scan(thinned, template.affine @ np.diag([_STEP, _STEP, _STEP, 1.0]), template.name)
    warped, known = _aligned(Scan.read(path), reference, alignment)
    return rescale(warped), known


def _aligned(moving: Scan, fixed: Scan, alignment: str) -> tuple[Scan, NDArray[np.bool_]]:
    """A scan on the grid of another one, and which voxels of that lie in its field of view."""
    options = Options(weights="none", refine=False, space="fixed", alignment=alignment)
    result = register_scans(moving, fixed, options)
    return result.warped, viewed(moving, fixed.grid, result.forward.linear)


def _similarity(study: Study, fixed: Path, space: str, alignment: str) -> float:
    if space == "mni152":
        (first, known), (second, known_too) = (_in_mni152(*stamp(path), alignment) for path in (study.image, fixed))
        return correlation(first.array, second.array, known & known_too)
    image = Scan.read(fixed)
    warped, known = _aligned(_image(study), image, alignment)
    return correlation(warped.array, image.array, known)


def _image(study: Study) -> Scan:
    """Scan of a study, with the study's name."""
    scan = Scan.read(study.image)
    return scan.like(scan.array, study.name)


def rank(
    studies: Sequence[Study], fixed: str | Path, *, space: str = DEFAULTS.space, alignment: str = DEFAULTS.alignment
) -> tuple[list[tuple[float, Study]], dict[str, str]]:
    """Order studies by their similarity to a scan after affine alignment.

    Args:
        studies: labelled scans to order.
        fixed: scan to compare them with.
        space: ``"mni152"`` compares brains in MNI152 at 4 mm; each is aligned once, which takes a few seconds, and the
            result is kept until the process ends. ``"fixed"`` aligns each study to the scan, every time.
        alignment: alignment, as in :func:`~voxelmorph_monai.apps.register.register`.

    Returns:
        Correlation, over what both scans show, and study, the most similar first; and the reasons why other studies
        cannot be compared, by name.
    """
    ranked, reasons = [], {}
    for study in studies:
        try:
            ranked.append((_similarity(study, Path(fixed), space, alignment), study))
        except (ValueError, OSError) as error:
            reasons[study.name] = str(error)
    return sorted(ranked, key=lambda item: (-item[0], item[1].name)), reasons


def _weights(warped: Sequence[Scan], fixed: Scan) -> NDArray[np.float32]:
    """Weights of joint label fusion ``(A, X, Y, Z)``, from local differences of the warped images to the fixed one."""
    scaled = rescale(fixed).array
    differences = np.stack([np.abs(rescale(image).array - scaled) for image in warped])
    along = tuple(axis for axis in range(1, 4) if fixed.shape[axis - 1] == 1)  # slices are compared in 2-D
    weights = joint_weights(torch.from_numpy(differences.squeeze(along))[None], _WINDOW)
    return weights[0].numpy().reshape(differences.shape)


def propagate(studies: Sequence[Study], fixed: str | Path, numbers: Mapping[str, int], options: Options) -> Scan:
    """Register studies to a scan, warp their labels, and let them vote: a label map on the grid of the scan.

    Args:
        studies: at least one; several are weighted by :func:`~voxelmorph_monai.atlas.joint_weights`.
        fixed: scan to label.
        numbers: number of each structure, by name (:func:`number_structures`).
        options: options of the registrations.

    Raises:
        ValueError: a scan or an option cannot be used.
        FileNotFoundError: a file does not exist.
    """
    if not studies:
        raise ValueError(f"there is no study to label {fixed} with. Give at least one.")
    image = Scan.read(fixed)
    maps, warped = [], []
    for study in studies:
        result = register_scans(_image(study), image, options, moving_labels=renumbered(study, numbers))
        assert result.warped_labels is not None
        maps.append(result.warped_labels)
        warped.append(result.warped)
    if len(maps) == 1:
        return maps[0]
    candidates = torch.from_numpy(np.stack([labels.array for labels in maps]).astype(np.int32))
    weights = torch.from_numpy(_weights(warped, image))
    return image.like(weighted_vote(candidates[None], weights[None])[0, 0].numpy().astype(maps[0].array.dtype))


def copy_label_app(output: str | Path) -> None:
    """Copy the MONAI Label app into the new folder ``output``.

    Raises:
        FileExistsError: ``output`` exists.
    """
    output = Path(output)
    require_new(output)
    with atomic_folder(output) as folder:
        for name in ("main.py", "requirements.txt"):
            shutil.copy(Path(__file__).parents[1] / "label_app" / name, folder / name)
