"""Find out what the vectors in a NIfTI field mean, from the marks that programs leave in its header.

Many programs write fields of the same shape ``(X, Y, Z, 1, 3)`` with different meanings: displacements, positions in
the moving image, velocities, control points. ``intent_name``, ``intent_p1`` and ``descrip`` distinguish them (see the
table in docs/transforms.md). An unknown mark is an error, because a wrong guess would move every point.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from voxelmorph_monai.affines import points_to_lps

__all__ = ["Meaning", "check_displacements", "meaning_of"]


class Meaning(NamedTuple):
    """Meaning of the vectors of a field.

    Attributes:
        positions: True if the vectors are points of the moving image, False if they are displacements.
        system: coordinate system of the vectors (mm): ``"RAS"`` or ``"LPS"``.
    """

    positions: bool
    system: str


_POSITIONS, _ALONG_RAS, _ALONG_LPS = Meaning(True, "RAS"), Meaning(False, "RAS"), Meaning(False, "LPS")
_NIFTYREG = {0.0: _POSITIONS, 1.0: _ALONG_RAS}  # by intent_p1
_NIFTYREG_OTHERS = {
    2.0: "control points of a cubic spline",
    3.0: "velocities",
    4.0: "velocities",
    5.0: "control points of a velocity",
    6.0: "control points of a linear spline",
}
_SPM_DEFORMATION = r"Deformation( field)?( \(templ\. to\. ind\.\))?"  # Segment and CAT12, Deformations, Shoot
_SPM_VELOCITY = r"Flow Field|Velocity( \(.*)?"  # DARTEL, Shoot
_FSL = range(2006, 2019)  # intents of FNIRT and TOPUP
_LOOKS_ALIKE = 0.4  # fraction of the grid's extent; positions turned by 20 degrees differ by 0.35, displacements by 1


def _refuse_niftyreg(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path} holds {what} of NiftyReg, not positions or displacements. Let NiftyReg write the positions first: "
        f"reg_transform -ref FIXED -def {path.name} OUTPUT.nii.gz."
    )


def meaning_of(header: Any, path: Path) -> Meaning | None:
    """Meaning of the vectors of a field, from its NIfTI header; None if the header does not say.

    Raises:
        ValueError: the vectors are not a map of points, or their meaning is unknown.
    """
    texts = (header[key].item().split(b"\0")[0] for key in ("intent_name", "descrip"))
    name, note = (text.decode("latin-1").strip() for text in texts)
    code, kind = int(header["intent_code"]), float(header["intent_p1"])
    if name == "NREG_TRANS":
        if kind not in _NIFTYREG:
            raise _refuse_niftyreg(path, _NIFTYREG_OTHERS.get(kind, f"a transform of unknown type {kind:g}"))
        return _NIFTYREG[kind]
    if name.startswith("NREG_"):  # of versions before 1.5
        raise _refuse_niftyreg(path, "control points")
    if not name and re.fullmatch(_SPM_VELOCITY, note):
        raise ValueError(
            f"{path} holds SPM velocities (DARTEL's flow field or Shoot's), not positions. Let SPM integrate them "
            "first: Deformations, Dartel flow or Shooting, Save Deformation, which writes y_*.nii."
        )
    if name == "Mapping" or (not name and re.fullmatch(_SPM_DEFORMATION, note)):
        return _POSITIONS
    if name and not (code == 1006 and "disp" in name.lower()):  # this name only repeats the code
        raise ValueError(
            f"{path} is marked '{name}' (intent_name), a kind of field that is not supported. Use the program that "
            "wrote it to export displacements for ITK."
        )
    if code in _FSL:
        raise ValueError(
            f"{path} is an FSL warp (intent {code}), which depends on the voxels of two images. Give both: vxm convert "
            f"{path.name} OUTPUT.nii.gz --from fsl --reference FIXED --moving MOVING."
        )
    return {1006: _ALONG_RAS, 1007: _ALONG_LPS}.get(code)


def check_displacements(vectors: NDArray[np.float64], points: NDArray[np.float64], path: Path) -> None:
    """Raise ValueError if a field without a mark seems to hold positions, along RAS or LPS.

    Args:
        vectors: vectors as stored in the file, ``(..., 2 or 3)`` in mm.
        points: positions of the voxels, of the same shape (RAS, mm).
        path: path of the file, for the error message.
    """
    axes = tuple(range(points.ndim - 1))
    extent = np.linalg.norm(points - points.mean(axes))
    for positions in (vectors, points_to_lps(vectors)):
        off = positions - points
        if np.linalg.norm(off - off.mean(axes)) < _LOOKS_ALIKE * extent:
            raise ValueError(
                f"{path} seems to hold positions, not displacements: its vectors grow with the position of the "
                "voxel. Subtract the positions of the voxels from them."
            )
