"""Turn labelled scans into a MONAI bundle that segments other scans: ``vxm make-atlas-bundle``.

The bundle contains everything except this package: network, atlases and names of labels. It is described completely by
``configs/inference.json``, because MONAI Label reads no other file.
"""

import csv
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from voxelmorph_monai.apps.shipped import shipped_weights
from voxelmorph_monai.atlas import MAX_LABELS, AtlasSegmentation
from voxelmorph_monai.atlas_transforms import aligned
from voxelmorph_monai.io.atomic import atomic_folder, require_new, write_json
from voxelmorph_monai.io.tables import read_table
from voxelmorph_monai.networks import load_weights
from voxelmorph_monai.space.resampling import resample
from voxelmorph_monai.space.scan import Scan
from voxelmorph_monai.space.template import STANDARD_GRID, TISSUES, WorkingGrid, check_brain, mni152, mni152_tissue
from voxelmorph_monai.transforms import MergeLabelsd

__all__ = ["make_atlas_bundle", "segmentation_network"]

_NILEARN = "0.14.1"  # the tested version; versions of other packages come from the registration bundle
_CITATION = (
    "Wang, H., Suh, J. W., Das, S. R., Pluta, J. B., Craige, C., Yushkevich, P. A. Multi-Atlas Segmentation with Joint "
    "Label Fusion. IEEE TPAMI 35(3), 2013. doi:10.1109/TPAMI.2012.143",
    "Balakrishnan, G., Zhao, A., Sabuncu, M. R., Guttag, J., Dalca, A. V. VoxelMorph: A Learning Framework for "
    "Deformable Medical Image Registration. IEEE TMI 38(8), 2019. doi:10.1109/TMI.2019.2897538",
)
_NO_LICENCE = (
    "No terms of use were given for the scans and labels in models/model.pt when this bundle was made. Ask their owner "
    "before you pass it on.\n"
)


class _Atlas(NamedTuple):
    """A scan and its label map."""

    image: Scan
    labels: Scan


def _like() -> Path:
    """Folder of the registration bundle, whose weights and versions are used."""
    return shipped_weights().parents[1]


def _template(name: str) -> str:
    return (Path(__file__).parents[1] / "templates" / name).read_text(encoding="utf-8")


def _read_names(path: Path) -> dict[int, str]:
    """Read a table with the columns ``number`` and ``name``; returns names by number."""
    columns, rows = read_table(path, "a table of names")
    if not {"number", "name"} <= set(columns):
        raise ValueError(f"{path} has the columns {columns}. It needs number and name, separated by commas.")
    names: dict[int, str] = {}
    for _, _, cells in rows:
        text = cells.get("number", "")
        if not text.isdecimal() or int(text) < 1 or int(text) in names:
            raise ValueError(
                f"{path} lists the number '{text}', which is repeated or not a whole number above 0. List each label "
                "once."
            )
        names[int(text)] = cells.get("name", "")
    return names


def _structures(names: Mapping[int, str], used: Iterable[int], subject: str) -> dict[str, list[int]]:
    """Find the labels of each structure in use, by name, in the order of the table, without nameless labels."""
    used = sorted(set(used))
    missing = [label for label in used if label not in names]
    if missing:
        raise ValueError(
            f"{subject} does not list the labels {missing} of the atlases. Add them, with an empty name for those that "
            "should become background."
        )
    structures: dict[str, list[int]] = {}
    for number, name in names.items():
        if number in used and name:
            structures.setdefault(name, []).append(number)
    lower = [name.lower() for name in structures]
    clash = sorted({name for name in lower if lower.count(name) > 1 or name == "background"})
    if clash:  # MONAI Label identifies labels by their names in lower case
        raise ValueError(
            f"{subject} uses the names {clash}, which differ only in case or mean the background. Choose others."
        )
    if not 1 <= len(structures) <= MAX_LABELS:
        raise ValueError(
            f"{subject} names {len(structures)} structures of the atlases. A bundle can have 1 to {MAX_LABELS}."
        )
    return structures


def _read_atlas(image: Path, labels: Path) -> _Atlas:
    atlas = _Atlas(Scan.read(image), Scan.read_labels(labels))
    atlas.image.check_same_grid(atlas.labels)
    check_brain(atlas.image)
    return atlas


def _renumber(atlas: _Atlas, structures: Mapping[str, Sequence[int]]) -> _Atlas:
    merge = MergeLabelsd("labels", structures)
    merged = merge({"labels": torch.from_numpy(atlas.labels.array.astype(np.int64))})["labels"]
    assert isinstance(merged, torch.Tensor)
    return atlas._replace(labels=atlas.labels.like(merged.numpy().astype(np.uint8)))


def _align(atlas: _Atlas, grid: WorkingGrid) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Align an atlas to MNI152; returns its image (0 to 255) and its labels on the grid, ``(X, Y, Z)``."""
    (image, affine), target = aligned(atlas.image, grid), grid.around()
    labels = resample(atlas.labels, target, affine @ np.linalg.inv(target.affine), order=0)
    return np.rint(255 * image).astype(np.uint8), labels.array


def segmentation_network(
    pairs: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8]]], num_labels: int, weights: Path
) -> tuple[AtlasSegmentation, dict[str, Any]]:
    """Create the network and load its weights and atlases; returns it and the arguments of its constructor.

    Args:
        pairs: image (0 to 255) and labels of each atlas, ``(X, Y, Z)`` on the grid, aligned to MNI152.
        num_labels: number of labels, which are 1 to ``num_labels``.
        weights: weights of the registration network, preset ``wide``.
    """
    images, labels = (torch.from_numpy(np.stack(arrays))[:, None] for arrays in zip(*pairs, strict=True))
    shown = ((images > 0) | (labels > 0)).any(0)[0].nonzero()
    start, stop = shown.amin(0).tolist(), (shown.amax(0) + 1).tolist()
    box = [last - first for first, last in zip(start, stop, strict=True)]
    options: dict[str, Any] = {
        "num_labels": num_labels,
        "num_atlases": len(pairs),
        "size": list(images.shape[2:]),
        "start": start,
        "box": box,
    }
    network = AtlasSegmentation(**options)
    load_weights(network.network, str(weights))
    x, y, z = (slice(first, last) for first, last in zip(start, stop, strict=True))
    network.images.copy_(images[:, :, x, y, z])
    network.labels.copy_(labels[:, :, x, y, z])
    return network, options


def _inference(options: Mapping[str, Any], grid: WorkingGrid) -> dict[str, Any]:
    """Content of ``configs/inference.json``."""
    config: dict[str, Any] = json.loads(_template("atlas_inference.json"))
    config["network_def"].update(options)
    config["preprocessing"]["transforms"][0].update(size=list(grid.size), spacing=grid.spacing)
    return config


def _metadata(structures: Sequence[str], options: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Content of ``configs/metadata.json``."""
    metadata: dict[str, Any] = json.loads(_template("atlas_metadata.json"))
    tested = json.loads((_like() / "configs" / "metadata.json").read_text(encoding="utf-8"))
    channels = ["background", *structures]
    layout = metadata["network_data_format"]
    layout["inputs"]["image"]["spatial_shape"] = layout["outputs"]["pred"]["spatial_shape"] = options["size"]
    layout["outputs"]["pred"]["num_channels"] = len(channels)
    layout["outputs"]["pred"]["channel_def"] = {str(number): name for number, name in enumerate(channels)}
    return {
        **metadata,
        **{name: tested[name] for name in ("monai_version", "pytorch_version", "numpy_version")},
        "required_packages_version": {"nilearn": _NILEARN, **tested["required_packages_version"]},
        "name": f"Brain T1 segmentation by {_atlases(options)} ({len(structures)} labels)",
        "description": f"Registers {_atlases(options)} to a skull-stripped T1-weighted brain scan with VoxelMorph and "
        "transfers the labels.",
        "data_source": source,
        "label_classes": f"0 background, 1 to {len(structures)} as in docs/labels.csv",
        "references": list(_CITATION),
    }


def _atlases(options: Mapping[str, Any]) -> str:
    return "1 atlas" if options["num_atlases"] == 1 else f"{options['num_atlases']} atlases"


def _readme(metadata: Mapping[str, Any], structures: Sequence[str], options: Mapping[str, Any]) -> str:
    size = options["size"]
    return _template("atlas_readme.md").format(
        name=metadata["name"],
        atlases=_atlases(options),
        labels=len(structures),
        channels=len(structures) + 1,
        size=", ".join(map(str, size)),
        table="\n".join(f"| {number} | {name} |" for number, name in enumerate(structures, start=1)),
        source=metadata["data_source"],
        gigabytes=4e-9 * np.prod(size) * (len(structures) + 1),
        references="\n\n".join(f"[{number}] {text}" for number, text in enumerate(_CITATION, start=1)),
    )


def _write_labels(path: Path, structures: Mapping[str, Sequence[int]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["label", "name", "number"])
        for label, (name, numbers) in enumerate(structures.items(), start=1):
            rows.writerows([label, name, number] for number in numbers)


def _write(
    folder: Path,
    network: AtlasSegmentation,
    options: Mapping[str, Any],
    structures: Mapping[str, Sequence[int]],
    grid: WorkingGrid,
    source: str,
    licence: str,
) -> None:
    for part in ("configs", "docs", "models"):
        (folder / part).mkdir()
    metadata = _metadata(list(structures), options, source)
    write_json(folder / "configs" / "metadata.json", metadata)
    write_json(folder / "configs" / "inference.json", _inference(options, grid))
    for name in ("configs/logging.conf", "LICENSE"):
        shutil.copyfile(_like() / name, folder / name)
    (folder / "docs" / "README.md").write_text(_readme(metadata, list(structures), options), encoding="utf-8")
    (folder / "docs" / "data_license.txt").write_text(licence, encoding="utf-8")
    _write_labels(folder / "docs" / "labels.csv", structures)
    torch.save(network.state_dict(), folder / "models" / "model.pt")


def make_atlas_bundle(
    atlases: Sequence[tuple[str | Path, str | Path]],
    output: str | Path,
    *,
    names: str | Path | None = None,
    licence: str | Path | None = None,
    grid: WorkingGrid = STANDARD_GRID,
) -> Path:
    """Write a MONAI bundle that segments skull-stripped T1 scans with the given atlases, completely or not at all.

    Args:
        atlases: scan and label map of each atlas, skull-stripped, both on one grid, in any position. Without atlases:
            MNI152 and its tissues (:func:`~voxelmorph_monai.space.template.mni152_tissue`).
        output: new folder to write; its name is the name of the bundle.
        names: CSV file with the columns ``number`` and ``name``, one row for each label of the atlases. Labels with
            the same name are merged; labels with an empty name become background. The bundle numbers them 1, 2, ... in
            the order of the file.
        licence: text file with the terms of use of the scans and labels.
        grid: grid on which scans are aligned; the network was trained on the default.

    Returns:
        The folder.

    Raises:
        FileNotFoundError, FileExistsError: an input does not exist, or ``output`` does.
        ValueError: an input cannot be used.
    """
    output = Path(output).absolute()
    require_new(output)
    if not atlases and (names or licence):
        raise ValueError(
            f"{names or licence} describes atlases, but none are given. Give atlases, or neither names nor licence: "
            "those of MNI152 are included."
        )
    if atlases and names is None:
        raise ValueError(
            f"the labels of {atlases[0][1]} have no names. Give a CSV file with the columns number and name."
        )
    table = _read_names(Path(names)) if names else TISSUES
    terms = (
        Path(licence).read_text(encoding="utf-8")
        if licence
        else _NO_LICENCE
        if atlases
        else _template("mni152_license.txt")
    )
    grid.around()  # raises an error if the grid does not fit the template
    scans = [_read_atlas(Path(image), Path(labels)) for image, labels in atlases]
    scans = scans or [_Atlas(mni152(), mni152_tissue())]
    used = {int(label) for scan in scans for label in np.unique(scan.labels.array) if label > 0}
    structures = _structures(table, used, str(names or "TISSUES"))
    pairs = [_align(_renumber(scan, structures), grid) for scan in scans]
    network, options = segmentation_network(pairs, len(structures), shipped_weights())
    source = f"{len(scans)} labelled scans" if atlases else "The mean brain MNI152 (ICBM 152 2009a) and its tissues"
    with atomic_folder(output) as folder:
        _write(folder, network, options, structures, grid, source, terms)
    return output
