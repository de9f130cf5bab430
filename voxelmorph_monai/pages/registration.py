"""Write the report page of a registration: a single file without names, identifiers or paths of the scans."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from voxelmorph_monai.anatomy import STRUCTURES
from voxelmorph_monai.io.atomic import atomic
from voxelmorph_monai.pages.render import data_uri, encode, render
from voxelmorph_monai.pages.views import OCTAVES, Plane, Views, is_ct
from voxelmorph_monai.space.scan import Scan

__all__ = ["save_page"]

_SHOWN = (0.25, 0.5, 1.0, 2.0)  # choices for the ends of the scale of volume change, in octaves
_MILLIMETRES = (
    0.1,
    0.2,
    0.5,
    1.0,
    2.0,
    5.0,
    10.0,
    20.0,
    50.0,
    100.0,
    200.0,
)  # at the end of the scale of displacements
_MOST_LABELS = 255
_LESS = 60  # JPEG quality for the other windows of a CT, whose page would be three times as large otherwise
_LUNG = -920.0  # Hounsfield units, between air and lungs
_ICON = 140  # pixels

_REFERENCES = {
    "voxelmorph": "Balakrishnan G, Zhao A, Sabuncu MR, Guttag J, Dalca AV. VoxelMorph: a learning framework for "
    "deformable medical image registration. IEEE Trans Med Imaging 38(8), 2019. doi:10.1109/TMI.2019.2897538",
    "monai": "Cardoso MJ, Li W, Brown R, et al. MONAI: an open-source framework for deep learning in healthcare. "
    "arXiv:2211.02701, 2022",
    "mni152": "Fonov V, Evans AC, Botteron K, et al. Unbiased average age-appropriate atlases for pediatric studies. "
    "NeuroImage 54(1), 2011. doi:10.1016/j.neuroimage.2010.07.033",
    "lncc": "Avants BB, Epstein CL, Grossman M, Gee JC. Symmetric diffeomorphic image registration with "
    "cross-correlation. Med Image Anal 12(1), 2008. doi:10.1016/j.media.2007.06.004",
    "mi": "Viola P, Wells WM. Alignment by maximization of mutual information. Int J Comput Vis 24(2), 1997. "
    "doi:10.1023/A:1007958904918",
    "mind": "Heinrich MP, Jenkinson M, Bhushan M, et al. MIND: modality independent neighbourhood descriptor for "
    "multi-modal deformable registration. Med Image Anal 16(7), 2012. doi:10.1016/j.media.2012.05.008",
    "dice": "Dice LR. Measures of the amount of ecologic association between species. Ecology 26(3), 1945. "
    "doi:10.2307/1932409",
}
_SIMILARITIES = {
    "lncc": "local normalised cross-correlation",
    "mi": "mutual information",
    "mind": "the modality independent neighbourhood descriptor",
}


class _Row(NamedTuple):
    """A measure: its name, its values by stage, and its meaning."""

    name: str
    stages: dict[str, str]
    meaning: str


def _number(value: float | None, digits: int = 3, unit: str = "") -> str:
    return "n/a" if value is None or not np.isfinite(value) else f"{value:.{digits}f}{unit}"


def _measures(summary: Mapping[str, Any], linear: float, size: str) -> list[_Row]:
    """Rows of the table of measures; ``linear`` is the determinant of the linear part, ``size`` "Volume" or "Area"."""

    def row(name: str, meaning: str, after: str, before: str = "", aligned: str = "") -> _Row:
        return _Row(name, {"before": before, "aligned": aligned, "after": after}, meaning)

    stages = [_number(summary[f"correlation_{stage}"]) for stage in ("before", "affine", "after")]
    rows = [
        row(
            "Correlation of the images",
            "1 means alike, 0 unrelated. For scans of different contrasts, a low or negative value can be correct.",
            stages[2],
            *stages[:2],
        )
    ]
    if summary.get("dice"):
        dice = [_number(summary["dice"][stage]["mean"]) for stage in ("before", "affine", "after")]
        rows.append(row("Dice, mean", "Overlap of the labels of both scans; 1 means complete.", dice[2], *dice[:2]))
    rows += [
        row(
            "Folded voxels",
            "Voxels where the map takes several points to the same point. Should be 0.",
            _number(summary["folding_percent"], 4, " %"),
        ),
        row(
            "Smoothness (SDlogJ)",
            f"How much the change of {size.lower()} varies from place to place; 0 means not at all. If two maps have "
            "the same overlap, the one with the lower value is better.",
            _number(summary["sdlogj"]),
        ),
        row(
            "Inverse consistency",
            "Mean distance between points and the same points mapped there and back. Less than a voxel is good.",
            _number(summary["inverse_consistency_mm"], 2, " mm"),
        ),
        row(
            f"{size}, linear part",
            f"Change of every {size.lower()} of the moving scan by the alignment, before the deformation.",
            f"{100 * (1 / linear - 1):+.1f} %" if linear > 0 else "n/a",
        ),
    ]
    seconds = summary["seconds"]
    stages = [f"{name} {_number(each, 1, ' s')}" for name, each in seconds.items() if each >= 0.05]
    rows.append(row("Time", ", ".join(stages), _number(sum(seconds.values()), 1, " s")))
    return rows


def _label_names(numbers: Sequence[int]) -> list[str]:
    """Names of labels: those of FreeSurfer if most numbers are FreeSurfer's, otherwise ``label N``."""
    known = {structure.number: structure.name.replace("-", " ") for structure in STRUCTURES}
    freesurfer = len(numbers) > 3 and sum(number in known for number in numbers) > 0.6 * len(numbers)
    return [f"{known[n]} ({n})" if freesurfer and n in known else f"label {n}" for n in numbers]


def _dice(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the Dice table: structures with the overlap before and after, the best first."""
    table = summary.get("dice")
    if not table:
        return []
    labels = [int(label) for label in table["after"] if label != "mean"]
    names = dict(zip(labels, _label_names(labels), strict=True))
    rows = [
        {"name": names[n], "before": table["before"].get(str(n), 0.0), "after": table["after"][str(n)]} for n in labels
    ]
    return sorted(rows, key=lambda row: -row["after"])


def _grid(scan: Scan) -> str:
    size, sides = (" x ".join(f"{n:.4g}" for n in values) for values in (scan.shape, scan.spacing))
    return f"{size} voxels of {sides} mm, axes {scan.orientation}, {scan.array.dtype.name}"


def _command(options: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
    """Command that gives this result, with roles such as MOVING in place of paths."""
    words = [options.get("command", "vxm register MOVING FIXED --output DIR")]
    for role in ("moving_labels", "fixed_labels", "moving_mask", "fixed_mask"):
        if role in inputs:
            words.append(f"--{role.replace('_', '-')} {role.upper()}")
    return " ".join(words)


def _provenance(views: Views, summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    result, options, inputs = views.result, summary["options"], summary.get("inputs", {})
    rows = [
        ("command", _command(options, inputs)),
        ("fixed grid", _grid(result.fixed)),
        ("moving grid", _grid(result.moving)),
    ]
    if options.get("grid"):
        grid = options["grid"]
        size = " x ".join(map(str, grid["size"]))
        rows.append(("working grid", f"{size} voxels of {grid['spacing']:g} mm"))
    rows.append(("network", options.get("preset") or "none"))
    if summary.get("versions"):
        rows.append(("versions", ", ".join(f"{name} {number}" for name, number in summary["versions"].items())))
    rows += [(f"SHA-256, {role.replace('_', ' ')}", each["sha256"]) for role, each in inputs.items()]
    return rows


def _methods(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Methods paragraph for a paper, and the references that it cites by number."""
    options, used = summary["options"], []

    def cite(name: str) -> str:
        if name not in used:
            used.append(name)
        return f"[{used.index(name) + 1}]"

    version = summary.get("versions", {}).get("voxelmorph_monai", "")
    parts = [
        f"Scans were registered with voxelmorph_monai{' ' + version if version else ''}, an implementation of "
        f"VoxelMorph {cite('voxelmorph')} on MONAI {cite('monai')}."
    ]
    alignment = {"affine": "an affine", "rigid": "a rigid"}.get(options["alignment"])
    if options["space"] == "mni152" and alignment:
        parts.append(f"Both scans were aligned to the MNI152 template {cite('mni152')} by {alignment} transform.")
    elif alignment:
        parts.append(f"The moving scan was aligned to the fixed scan by {alignment} transform.")
    else:
        parts.append("The scans were already aligned by their headers.")
    refines = options.get("steps") is not None or options.get("budget") not in (0, 0.0)
    if options.get("preset"):
        parts.append(f"A convolutional network (preset “{options['preset']}”) predicted the deformation.")
    if refines:
        how = (
            f"{options['steps']} steps at each resolution"
            if options.get("steps") is not None
            else ("until convergence" if options["budget"] == "inf" else f"at most {options['budget']:g} s")
        )
        name = options["similarity"]
        verb = "It was then refined" if options.get("preset") else "The deformation was found"
        parts.append(
            f"{verb} on the two scans by optimising {_SIMILARITIES[name]} {cite(name)} and the smoothness of the "
            f"displacement ({how})."
        )
    elif not options.get("preset"):
        parts.append("No deformation was computed.")
    parts.append(
        f"The map folds in {summary['folding_percent']:.2g} % of the voxels, and the mean inverse consistency error is "
        f"{summary['inverse_consistency_mm']:.2f} mm."
    )
    if summary.get("dice"):
        before, after = (summary["dice"][stage]["mean"] for stage in ("before", "after"))
        parts.append(
            f"The mean Dice coefficient {cite('dice')} of the labels changed from {before:.3f} to {after:.3f}."
        )
    return {"text": " ".join(parts), "references": [_REFERENCES[name] for name in used]}


def _numbers(*scans: Scan) -> NDArray[Any]:
    """Numbers of the labels to draw: all of them, or the 255 most frequent."""
    counts: dict[int, int] = {}
    for scan in scans:
        for number, count in zip(*np.unique(scan.array, return_counts=True), strict=True):
            counts[int(number)] = counts.get(int(number), 0) + int(count)
    counts.pop(0, None)
    return np.array(sorted(sorted(counts, key=lambda n: -counts[n])[:_MOST_LABELS]), dtype=np.int64)


def _images(views: Views, plane: Plane) -> dict[str, list[str]]:
    """Data URIs of the slices of each scan, one for each of its windows."""
    found: dict[str, list[str]] = {}
    for number, name in enumerate(views.choices):
        for image, slices in views.images(plane, name).items():
            window = [each[image != "fixed"] for each in views.choices.values()]
            if number == 0 or window[number] != window[0]:
                found.setdefault(image, []).append(data_uri(slices, quality=80 if number == 0 else _LESS))
    return found


def _shown(views: Views) -> tuple[int, int]:
    """Number of a window, and the grey level in it above which a voxel shows something."""
    if "lung" not in views.choices:
        return 0, 12
    number = list(views.choices).index("lung")
    window = views.choices["lung"][0]
    return number, int(255 * (_LUNG - window.low) / (window.high - window.low))


def _plane(views: Views, plane: Plane, determinant: NDArray[Any], labels: Mapping[str, Scan], numbers: Any) -> Any:
    """Description and pictures of a plane, for the script of the page."""
    gaps = np.diff(plane.positions) if len(plane.positions) > 1 else np.ones(1)
    return {
        "axis": plane.axis,
        "across": plane.across,
        "up": plane.up,
        "positions": plane.positions,
        "gap": float(gaps.max() * views.frame.spacing[plane.axis] / 2),
        "start": plane.start,
        "rows": len(plane.rows),
        "columns": len(plane.columns),
        "images": _images(views, plane),
        "volume": data_uri(views.volume_change(plane, determinant), exact=True),
        "labels": {name: data_uri(views.labels(plane, scan, numbers), exact=True) for name, scan in labels.items()},
    }


def _icon(views: Views) -> NDArray[np.uint8]:
    """Picture ``(1, R, C)`` of the fixed and the warped scan side by side: icon of the page, thumbnail in an index."""
    plane = views.planes[0]
    shown = views.images(plane._replace(positions=[plane.positions[plane.start]]))
    picture = Image.fromarray(np.concatenate([shown["fixed"][0], shown["warped"][0]], axis=1))
    high, wide = (n * s for n, s in zip(picture.size[::-1], views.frame.spacing[[plane.up, plane.across]], strict=True))
    rows = min(_ICON, round(_ICON * 2 * high / wide))
    return np.asarray(picture.resize((max(1, round(rows * wide / high)), max(rows, 1))))[None]


def _grey(views: Views) -> str:
    """Sentence that explains the grey levels."""
    if all(is_ct(scan) for scan in (views.result.fixed, views.result.moving)):
        return "Grey levels: CT windows in Hounsfield units, the same for both scans."
    what = "the brain" if all(face is not None for face in views.faces) else "all voxels above the background"
    return f"Grey levels: from percentiles of {what}, the same for the moving scan before and after."


def _window_names(views: Views) -> list[str]:
    """Names of the CT windows, with their limits in Hounsfield units."""
    ends = [(name, pair[0 if is_ct(views.result.fixed) else 1]) for name, pair in views.choices.items()]
    return [f"{name}, {low:.0f} to {high:.0f} HU".replace("-", "\N{MINUS SIGN}") for name, (low, high) in ends]


def _at_least(choices: Sequence[float], value: float) -> float:
    return next((choice for choice in choices if choice >= value), choices[-1])


def _data(views: Views, determinant: NDArray[Any]) -> dict[str, Any]:
    """Data for the script of the page: grids, map and pictures."""
    result = views.result
    numbers = _numbers(*result.outlines.values())
    labels = result.outlines if len(numbers) else {}
    size, vectors, unit = views.vectors()
    lengths = np.linalg.norm(np.tensordot(views.frame.affine[:3, :3], vectors * unit, 1), axis=0)
    positive = determinant[determinant > 0][::17]
    linear = abs(np.linalg.det(result.forward.linear[:3, :3]))
    octaves = float(np.percentile(np.abs(np.log2(positive / linear)), 99)) if positive.size else OCTAVES
    return {
        "affine": views.frame.affine.tolist(),
        "linear": result.forward.linear.tolist(),
        "spacing": views.frame.spacing.tolist(),
        "box": views.box.tolist(),
        "octaves": OCTAVES,
        "shownOctaves": _at_least(_SHOWN, octaves),
        "shownMm": _at_least(_MILLIMETRES, float(np.percentile(lengths, 99.5))),
        "field": {"size": size, "unit": unit, "vectors": encode(vectors)},
        "labels": _label_names(numbers.tolist()),
        "shown": _shown(views),
        "planes": [_plane(views, plane, determinant, labels, numbers) for plane in views.planes],
    }


def save_page(path: str | Path, views: Views, determinant: NDArray[Any], summary: Mapping[str, Any]) -> None:
    """Write the report page of a registration, completely or not at all.

    Args:
        path: file to write, ``.html``.
        views: the images to show.
        determinant: Jacobian determinant of the whole map, on the fixed grid.
        summary: measures, ``warnings`` and ``options`` of the registration, and optionally ``versions`` and ``inputs``
            (the page shows hashes of the inputs, not their paths).
    """
    data = _data(views, determinant)
    linear = float(np.linalg.det(views.result.forward.linear[:3, :3]))
    given = views.result.fixed_labels is not None or views.result.warped_labels is not None
    labels = "labels" if given else "segmented structures"
    face = "No part of the scans is hidden."
    if views.hides:
        face = "Faces are hidden: everything in front of and below a plane along the brain is black."
    page = render(
        "report",
        concerns=[{"check": each["check"], "text": each["text"]} for each in summary["warnings"]],
        planes=[plane.name for plane in views.planes],
        icon=data_uri(_icon(views)),
        labels=labels,
        has_fixed_labels="fixed" in data["planes"][0]["labels"],
        has_warped_labels="warped" in data["planes"][0]["labels"],
        face=face,
        grey=_grey(views),
        windows=_window_names(views),
        area=views.result.fixed.is_slice,
        dice=_dice(summary),
        measures=_measures(summary, linear, "Area" if views.result.fixed.is_slice else "Volume"),
        provenance=_provenance(views, summary),
        methods=_methods(summary),
        data=data,
    )
    with atomic(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
