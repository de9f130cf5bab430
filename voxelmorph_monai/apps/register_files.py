"""Register two files and write the results into a folder, as ``vxm register`` does."""

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from voxelmorph_monai import __version__
from voxelmorph_monai.apps.bids import bids_names
from voxelmorph_monai.apps.options import DEFAULTS, Options
from voxelmorph_monai.apps.outputs import check_output_folder
from voxelmorph_monai.apps.register import register_scans
from voxelmorph_monai.apps.result import FILES, write_result
from voxelmorph_monai.apps.shipped import choose_device, weights_file
from voxelmorph_monai.io.atomic import atomic_folder
from voxelmorph_monai.io.formats import scan_files
from voxelmorph_monai.space.scan import Scan
from voxelmorph_monai.threads import num_threads, run

__all__ = ["register_files"]


def _sha256(path: Path) -> str:
    """Hash of a file, or of all files of a scan in the order of their names."""
    digest = hashlib.sha256()
    for file in scan_files(path):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    others = {name: version(name) for name in ("itk", "monai", "nibabel", "numpy", "scipy", "torch")}
    return {"voxelmorph_monai": __version__, "python": platform.python_version(), **others}


def register_files(
    moving: str | Path,
    fixed: str | Path,
    output: str | Path,
    *,
    moving_labels: str | Path | None = None,
    fixed_labels: str | Path | None = None,
    moving_mask: str | Path | None = None,
    fixed_mask: str | Path | None = None,
    moving_series: int | None = None,
    fixed_series: int | None = None,
    options: Options = DEFAULTS,
    bids: bool = False,
    overwrite: bool = False,
    report: bool = True,
    show_face: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Register two files and write the results into the folder ``output``, completely or not at all.

    A scan is a volume, a slice or a 2-D image, in a NIfTI, MGZ, NRRD, MetaImage or DICOM file or a DICOM folder (see
    :func:`~voxelmorph_monai.io.images.open_volume`).

    The folder contains ``warped.nii.gz`` (with the header of the fixed scan), ``warped_labels.nii.gz`` if there are
    moving labels, ``forward.h5`` and ``inverse.h5`` (ITK transforms; ``forward.h5`` warps the moving image, and takes
    points of the fixed scan to the moving one), ``displacement.nii.gz`` (the forward transform as one field on the
    fixed grid), ``affine.txt`` (its linear part, in ITK's format), ``jacobian.nii.gz`` (change of volume, affine part
    included), ``report.png``, ``report.html`` and ``summary.json``. The summary gives correlation and Dice on the fixed
    grid: by the headers only (``before``), after the alignment (``affine``) and at the end (``after``). 2-D images get
    2-D transforms.

    Args:
        moving: scan to warp.
        fixed: scan to warp it to.
        output: folder to write; it must not exist, unless ``overwrite`` is true.
        moving_labels: label map on the grid of the moving scan.
        fixed_labels: label map on the grid of the fixed scan; with both, the summary includes Dice.
        moving_mask: mask on the grid of the moving scan, above 0 where it is to be registered.
        fixed_mask: the same for the fixed scan.
        moving_series: number of the DICOM series if ``moving`` is a folder of several
            (:func:`~voxelmorph_monai.io.dicom.list_series`).
        fixed_series: the same for the fixed scan.
        options: options of the registration.
        bids: name the files as BIDS derivatives of the moving scan.
        overwrite: replace an earlier registration in ``output``.
        report: write ``report.png`` and ``report.html`` for visual inspection.
        show_face: show the faces of whole heads in them; by default they are hidden.
        progress: show the current stage on standard error.

    Returns:
        The content of ``summary.json``.

    Raises:
        ValueError: an input or an option cannot be used; the message says which and why.
        FileNotFoundError: an input does not exist.
        FileExistsError: ``output`` exists.
    """
    given = {
        "moving": moving,
        "fixed": fixed,
        "moving_labels": moving_labels,
        "fixed_labels": fixed_labels,
        "moving_mask": moving_mask,
        "fixed_mask": fixed_mask,
        "weights": weights_file(options),
    }
    paths, output = {role: Path(path) for role, path in given.items() if path is not None}, Path(output).absolute()
    files = bids_names(Path(moving), Path(fixed)) if bids else FILES
    choose_device(options.device)  # an unusable device should fail before the scans are read
    check_output_folder(output, paths.values(), files.values(), overwrite)
    series = {"moving": moving_series, "fixed": fixed_series}
    scan, other = run(lambda role: Scan.read(paths[role], series[role]), ["moving", "fixed"], num_threads())
    labels = {role: Scan.read_labels(path) for role, path in paths.items() if role.endswith(("_labels", "_mask"))}
    result = register_scans(scan, other, options, progress=progress, **labels)
    summary = {
        **result.measures(),
        "versions": _versions(),
        "inputs": {
            role: {"path": str(path.absolute()), "sha256": _sha256(path)}
            | ({"series": series[role]} if series.get(role) is not None else {})
            for role, path in paths.items()
        },
        "options": dict(result.options),
    }
    with atomic_folder(output) as folder:
        write_result(folder, files, result, summary, report=report, show_face=show_face)
    return summary
