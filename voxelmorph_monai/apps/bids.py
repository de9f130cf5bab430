"""Name the files of a registration as BIDS derivatives."""

import re
from pathlib import Path

from voxelmorph_monai.io.formats import scan_name

__all__ = ["bids_names"]

_BIDS = re.compile(r"(sub-[0-9A-Za-z]+(?:_[0-9A-Za-z]+-[0-9A-Za-z]+)*)_([0-9A-Za-z]+)")  # entities and suffix


def bids_names(moving: Path, fixed: Path) -> dict[str, str]:
    """File names for derivatives of the moving scan (BIDS 1.10, and its proposal 14 for transforms).

    >>> names = bids_names(Path("sub-01_ses-2_T1w.nii.gz"), Path("tpl-MNI152_T1w.nii.gz"))
    >>> names["warped"], names["forward"]
    ('sub-01_ses-2_space-tplMNI152T1w_T1w.nii.gz', 'sub-01_ses-2_from-sub01ses2T1w_to-tplMNI152T1w_mode-image_xfm.h5')
    """
    spaces = [re.sub("[^0-9A-Za-z]", "", scan_name(path)) for path in (moving, fixed)]
    for path, space in zip((moving, fixed), spaces, strict=True):
        if not space:
            raise ValueError(
                f"{path} has no letters or digits (A-Z, a-z, 0-9) for a BIDS name. Rename it, or do not use BIDS names."
            )
    if spaces[0] == spaces[1]:  # otherwise both directions would have one name
        raise ValueError(
            f"moving {moving} and fixed {fixed} have the same name in BIDS, so their transforms would, too. Rename one."
        )
    match = _BIDS.fullmatch(scan_name(moving))
    entities, suffix = match.groups() if match else (f"sub-{spaces[0]}", "T1w")
    there, back = (f"{entities}_from-{a}_to-{b}_mode-image" for a, b in (spaces, spaces[::-1]))
    here = f"{entities}_space-{spaces[1]}"
    names = {
        "warped": f"{here}_{suffix}.nii.gz",
        "warped_labels": f"{here}_dseg.nii.gz",
        "jacobian": f"{here}_desc-jacobian_{suffix}.nii.gz",
        "forward": f"{there}_xfm.h5",
        "inverse": f"{back}_xfm.h5",
        "displacement": f"{there}_desc-displacement_xfm.nii.gz",
        "affine": f"{there}_desc-affine_xfm.txt",
        "report": f"{there}_desc-registration_report.png",
        "page": f"{there}_desc-registration_report.html",
        "summary": f"{there}_desc-registration_summary.json",
    }
    if len(set(names.values())) < len(names):
        raise ValueError(
            f"{moving} is named as a {suffix}, so all files named after it would get the same name. Rename it like "
            "sub-01_T1w."
        )
    return names
