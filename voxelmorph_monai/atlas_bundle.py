"""Turn labelled scans into a MONAI bundle that segments others: ``vxm make-atlas-bundle``.

The bundle is the whole of what it needs besides this package: network, atlases and what their labels are called.
``configs/inference.json`` alone says how to run it, as MONAI Label reads no other file.
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

from voxelmorph_monai.atlas import MAX_LABELS, AtlasSegmentation, aligned
from voxelmorph_monai.files import atomic_folder, read_table, require_new, write_json
from voxelmorph_monai.networks import load_weights
from voxelmorph_monai.preparation import Grid, check_brain, grid_affine, mni152, mni152_tissue, resample
from voxelmorph_monai.registration import shipped_weights
from voxelmorph_monai.spaces import Affine, read_image, read_labels, require_same_grid
from voxelmorph_monai.transforms import MergeLabelsd

__all__ = ["TISSUES", "make_atlas_bundle", "segmentation_network"]

TISSUES = {1: "cerebrospinal fluid", 2: "grey matter", 3: "white matter"}
"""Names of the labels of :func:`~voxelmorph_monai.preparation.mni152_tissue`."""

_VERSION = "0.2.0"
_NILEARN = "0.14.1"  # tested with, as are the packages that the other bundle lists
_CITATION = (
    "Wang, H., Suh, J. W., Das, S. R., Pluta, J. B., Craige, C., Yushkevich, P. A. Multi-Atlas Segmentation with Joint "
    "Label Fusion. IEEE TPAMI 35(3), 2013. doi:10.1109/TPAMI.2012.143",
    "Balakrishnan, G., Zhao, A., Sabuncu, M. R., Guttag, J., Dalca, A. V. VoxelMorph: A Learning Framework for "
    "Deformable Medical Image Registration. IEEE TMI 38(8), 2019. doi:10.1109/TMI.2019.2897538",
)
_NO_LICENCE = (
    "The terms of the scans and labels in models/model.pt were not given when this bundle was made. Ask whoever owns "
    "them before you pass it on.\n"
)


class _Atlas(NamedTuple):
    """A scan and its labels, numbered as the bundle numbers them, ``(array, affine)`` both."""

    image: tuple[NDArray[np.float32], Affine]
    labels: tuple[NDArray[Any], Affine]


def _like() -> Path:
    """The bundle whose weights the network has."""
    return shipped_weights().parents[1]


def _template(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def _read_names(path: Path) -> dict[int, str]:
    """Name by number of a table with the columns ``number`` and ``name``."""
    columns, rows = read_table(path, "a table of names")
    if not {"number", "name"} <= set(columns):
        raise ValueError(f"{path} must have the columns number and name, got {columns}.")
    names: dict[int, str] = {}
    for _, cells in rows:
        row = dict(zip(columns, cells, strict=False))
        text = row.get("number", "")
        if not text.isdecimal() or int(text) < 1 or int(text) in names:
            raise ValueError(f"{path} must number each label once, with whole numbers from 1, got '{text}'.")
        names[int(text)] = row.get("name", "")
    return names


def _structures(names: Mapping[int, str], used: Iterable[int], subject: str) -> dict[str, list[int]]:
    """Labels in use by the name that they share, in the order of the table; those without a name are left out."""
    used = sorted(set(used))
    missing = [label for label in used if label not in names]
    if missing:
        raise ValueError(
            f"{subject} must name every label of the atlases, or leave its name empty, but lack {missing}."
        )
    structures: dict[str, list[int]] = {}
    for number, name in names.items():
        if number in used and name:
            structures.setdefault(name, []).append(number)
    lower = [name.lower() for name in structures]
    clash = sorted({name for name in lower if lower.count(name) > 1 or name == "background"})
    if clash:  # MONAI Label knows labels by their names in lower case
        raise ValueError(f"{subject} must give names that differ in more than case, and no 'background', got {clash}.")
    if not 1 <= len(structures) <= MAX_LABELS:
        raise ValueError(f"{subject} must name 1 to {MAX_LABELS} structures of the atlases, got {len(structures)}.")
    return structures


def _read_atlas(image: Path, labels: Path) -> _Atlas:
    atlas = _Atlas(read_image(image), read_labels(labels))
    require_same_grid(atlas.image, atlas.labels, (str(image), str(labels)))
    check_brain(atlas.image, str(image))
    return atlas


def _renumber(atlas: _Atlas, structures: Mapping[str, Sequence[int]]) -> _Atlas:
    merge = MergeLabelsd("labels", structures)
    merged = merge({"labels": torch.from_numpy(atlas.labels[0].astype(np.int64))})["labels"]
    assert isinstance(merged, torch.Tensor)
    return atlas._replace(labels=(merged.numpy().astype(np.uint8), atlas.labels[1]))


def _align(atlas: _Atlas, grid: Grid) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Image in 0 to 255 and labels on the grid."""
    image, affine = aligned(atlas.image, grid)
    target = grid_affine(grid)
    labels = resample(atlas.labels, grid.size, target, affine @ np.linalg.inv(target), order=0)
    return np.rint(255 * image).astype(np.uint8), labels


def segmentation_network(
    pairs: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8]]], num_labels: int, weights: Path
) -> tuple[AtlasSegmentation, dict[str, Any]]:
    """The network with weights and atlases, and the arguments it is made with.

    Args:
        pairs: image in 0 to 255 and labels of each atlas, ``(X, Y, Z)`` on the grid, aligned to MNI152.
        num_labels: labels are 1 to this.
        weights: of the registration, preset ``wide``.
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


def _inference(options: Mapping[str, Any], grid: Grid) -> dict[str, Any]:
    """``configs/inference.json``."""
    return {
        "imports": [
            "$import torch",
            "$import voxelmorph_monai.engines as engines",
            "$import voxelmorph_monai.networks as networks",
        ],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/data'",
        "image": "$@dataset_dir + '/image.nii.gz'",
        "output_dir": "$@bundle_root + '/segmentation'",
        "overwrite": False,
        "weights": "$@bundle_root + '/models/model.pt'",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "displayable_configs": {"budget": 0},
        "budget": "@displayable_configs#budget",
        "network_def": {"_target_": "voxelmorph_monai.atlas.AtlasSegmentation", **options},
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {
                    "_target_": "voxelmorph_monai.atlas.LoadAlignedScand",
                    "keys": "image",
                    "size": list(grid.size),
                    "spacing": grid.spacing,
                }
            ],
        },
        "dataset": {"_target_": "Dataset", "data": [{"image": "@image"}], "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": {"_target_": "voxelmorph_monai.atlas.AtlasInferer", "budget": "@budget"},
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "voxelmorph_monai.atlas.RestoreLabelsd", "ref_image": "image"},
                {
                    "_target_": "voxelmorph_monai.atlas.SaveSegmentationd",
                    "output_dir": "@output_dir",
                    "overwrite": "@overwrite",
                },
            ],
        },
        "handlers": [],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
        },
        "run": [
            "$engines.check_config()",
            "$@postprocessing.transforms[-1].check()",
            "$networks.load_weights(@network_def, @weights)",
            "$@evaluator.run()",
        ],
    }


def _metadata(structures: Sequence[str], options: Mapping[str, Any], source: str) -> dict[str, Any]:
    """``configs/metadata.json``."""
    tested = json.loads((_like() / "configs" / "metadata.json").read_text(encoding="utf-8"))
    tensor = {"spatial_shape": options["size"], "dtype": "float32", "value_range": [0, 1], "is_patch_data": False}
    channels = ["background", *structures]
    return {
        "schema": "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
        "meta_schema_20240725.json",
        "version": _VERSION,
        "changelog": {_VERSION: "made by vxm make-atlas-bundle"},
        **{name: tested[name] for name in ("monai_version", "pytorch_version", "numpy_version")},
        "required_packages_version": {"nilearn": _NILEARN, **tested["required_packages_version"]},
        "supported_apps": {},
        "name": f"Brain T1 segmentation by {_atlases(options)} ({len(structures)} labels)",
        "task": "Segmentation of T1-weighted brain scans by atlases",
        "description": f"Registers {_atlases(options)} to a skull-stripped T1-weighted brain scan by VoxelMorph and "
        "carries the labels along.",
        "authors": "voxelmorph_monai developers",
        "copyright": "Copyright (c) voxelmorph_monai developers; of the scans and labels see docs/data_license.txt",
        "intended_use": "Research only. Not for clinical decisions.",
        "data_source": source,
        "data_type": "NIfTI",
        "image_classes": "T1-weighted brain scans, skull-stripped, aligned to MNI152, intensities in [0, 1]",
        "label_classes": f"0 background, 1 to {len(structures)} as in docs/labels.csv",
        "pred_classes": "probability of each label",
        "eval_metrics": {},
        "references": list(_CITATION),
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "magnitude",
                    "modality": "MR",
                    "num_channels": 1,
                    **tensor,
                    "channel_def": {"0": "image"},
                }
            },
            "outputs": {
                "pred": {
                    "type": "image",
                    "format": "segmentation",
                    "num_channels": len(channels),
                    **tensor,
                    "channel_def": {str(number): name for number, name in enumerate(channels)},
                }
            },
        },
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
    grid: Grid,
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
    grid: Grid = Grid(),  # noqa: B008, a constant
) -> Path:
    """Write a MONAI bundle that segments skull-stripped T1 scans by the given ones; whole or not at all.

    Args:
        atlases: scan and label map of each, on one grid, skull-stripped, wherever they lie; none: MNI152 and its
            tissues, as :func:`~voxelmorph_monai.preparation.mni152_tissue` gives them.
        output: folder to write, new; its name is the bundle's.
        names: CSV file with the columns ``number`` and ``name``, one row for each label of the atlases. Labels of one
            name become one label; those whose name is empty become background. The bundle numbers them 1, 2, ... in
            the order of the file.
        licence: text file with the terms of the scans and labels.
        grid: that scans are aligned on; the network knows the default.

    Returns:
        The folder.

    Raises:
        FileNotFoundError, FileExistsError: an input is not there, or ``output`` is.
        ValueError: an input cannot be used; the message says which and why.
    """
    output = Path(output).absolute()
    require_new(output)
    if not atlases and (names or licence):
        raise ValueError("names and a licence must come with atlases; those of MNI152 are known.")
    if atlases and names is None:
        raise ValueError("names must be given with atlases: a CSV file with the columns number and name.")
    table = _read_names(Path(names)) if names else TISSUES
    terms = (
        Path(licence).read_text(encoding="utf-8")
        if licence
        else _NO_LICENCE
        if atlases
        else _template("mni152_license.txt")
    )
    grid_affine(grid)  # raises on one that cannot be
    scans = [_read_atlas(Path(image), Path(labels)) for image, labels in atlases]
    scans = scans or [_Atlas(mni152(), mni152_tissue())]
    used = {int(label) for scan in scans for label in np.unique(scan.labels[0]) if label > 0}
    structures = _structures(table, used, str(names or "TISSUES"))
    pairs = [_align(_renumber(scan, structures), grid) for scan in scans]
    network, options = segmentation_network(pairs, len(structures), shipped_weights())
    source = f"{len(scans)} labelled scans" if atlases else "The mean brain MNI152 (ICBM 152 2009a) and its tissues"
    with atomic_folder(output) as folder:
        _write(folder, network, options, structures, grid, source, terms)
    return output
