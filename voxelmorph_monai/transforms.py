"""MONAI dictionary transforms: load scans, merge labels, warp labels, save a registration."""

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from torch import Tensor

from voxelmorph_monai.affines import spacing
from voxelmorph_monai.blocks import as_signed, invert, warp, warp_labels
from voxelmorph_monai.engines import pair_paths
from voxelmorph_monai.evaluation import scan_names
from voxelmorph_monai.io.images import save_image
from voxelmorph_monai.maps.displacements import save_displacement
from voxelmorph_monai.metrics import inverse_consistency
from voxelmorph_monai.report import Images, correlation, overlap, regularity, save_results
from voxelmorph_monai.space.resampling import viewed
from voxelmorph_monai.space.scan import Scan

__all__ = ["LoadScand", "MergeLabelsd", "SaveRegistrationd", "WarpLabelsd"]

Data = dict[Hashable, object]


class LoadScand(MapTransform):
    """Load images and label maps on one grid, each as a MetaTensor ``(1, X, Y, Z)``.

    Unlike MONAI's ``LoadImaged``, it raises an error that names the file for data that cannot be trained on or
    registered: NaN, constant images, labels that are not whole numbers, singular affines, grids that differ.

    Args:
        keys: items that hold paths. Keys that end in ``label`` are label maps (int32); all others are images (float32,
            scaled to [0, 1]; the meta entries ``minimum`` and ``maximum`` keep the original range).
        allow_missing_keys: skip missing items.
    """

    def __call__(self, data: Mapping[Hashable, object]) -> Data:
        """Replace the paths in ``data`` by the loaded scans."""
        loaded = dict(data)
        first = None
        for key in self.key_iterator(loaded):
            path = str(loaded[key])
            is_label = str(key).endswith("label")
            scan = Scan.read_labels(path) if is_label else Scan.read(path)
            first = first or scan
            first.check_same_grid(scan)
            array = scan.array
            meta: dict[str, object] = {"filename_or_obj": path}
            if is_label:
                if array.max() > np.iinfo(np.int32).max:
                    raise ValueError(f"{path} holds the label {array.max()}; labels up to 2^31 - 1 are supported.")
                array = array.astype(np.int32)
            else:
                meta |= {"minimum": float(array.min()), "maximum": float(array.max())}
                array = (array - array.min()) / (array.max() - array.min())
            loaded[key] = MetaTensor(
                torch.from_numpy(np.ascontiguousarray(array))[None], affine=torch.as_tensor(scan.affine), meta=meta
            )
        return loaded


class MergeLabelsd(MapTransform):
    """Number the structures of a label map 1, 2, ... in the order of a table, and set everything else to 0.

    Args:
        keys: label maps, integers.
        structures: labels of each structure by name; None leaves the map unchanged.
        num_labels: largest label allowed in the result.
        kept: names of the structures to keep (labels, if there is no table), without renumbering; the others become
            0. None keeps all.
        allow_missing_keys: skip missing items.

    >>> merge = MergeLabelsd("label", {"left thalamus": [10], "cortex": [1000, 1001]})
    >>> merge({"label": torch.tensor([0, 10, 7, 1001])})["label"]
    tensor([0, 1, 0, 2], dtype=torch.int32)
    """

    def __init__(
        self,
        keys: KeysCollection,
        structures: Mapping[str, Sequence[int]] | None = None,
        num_labels: int | None = None,
        kept: Sequence[str | int] | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.table = None if structures is None else _merging_table(structures)
        self.num_labels = num_labels
        names = list(structures or range(1, (num_labels or 0) + 1))
        unknown = [name for name in kept or [] if name not in names]
        if unknown or kept == []:
            raise ValueError(f"kept is {kept}, but the structures are {names}. Name at least one of them.")
        self.kept = None if kept is None else torch.tensor([0, *(names.index(name) + 1 for name in kept)])

    def __call__(self, data: Mapping[Hashable, object]) -> Data:
        """Renumber the label maps of ``data``."""
        merged = dict(data)
        for key in self.key_iterator(merged):
            labels = merged[key]
            assert isinstance(labels, Tensor)
            merged[key] = labels = as_signed(labels)
            if self.table is not None:
                known = labels.long().clamp(0, len(self.table) - 1)  # the last entry of the table is 0
                merged[key] = self.table.to(labels.device)[known]
            elif self.num_labels is not None and int(labels.max()) > self.num_labels:
                name = labels.meta["filename_or_obj"] if isinstance(labels, MetaTensor) else key
                raise ValueError(
                    f"{name} holds the label {int(labels.max())}, but num_labels is {self.num_labels}. Raise it, or "
                    "name the labels to measure in a table of structures (name: [labels]), which may leave gaps."
                )
            if self.kept is not None:
                numbers = merged[key]
                assert isinstance(numbers, Tensor)
                merged[key] = torch.where(torch.isin(numbers, self.kept.to(numbers)), numbers, 0)
        return merged


def _merging_table(structures: Mapping[str, Sequence[int]]) -> Tensor:
    """Number of each label's structure (1, 2, ... in order; 0 for none): ``(largest label + 2,)``, int32."""
    table = torch.zeros(max((max(labels) for labels in structures.values()), default=0) + 2, dtype=torch.int32)
    for number, (name, labels) in enumerate(structures.items(), start=1):
        for label in labels:
            if label < 1 or table[label] != 0:
                reason = "labels start at 1" if label < 1 else "it is listed already"
                raise ValueError(f"structure '{name}' lists the label {label}, but {reason}. Remove it.")
            table[label] = number
    return table


def _warped_labels(labels: Tensor, ddf: Tensor, mode: str) -> Tensor:
    labels = labels.as_subclass(Tensor).to(ddf.device)[None]
    return warp(labels, ddf[None], mode="nearest")[0] if mode == "nearest" else warp_labels(labels, ddf[None])[0]


class WarpLabelsd(Transform):
    """Add ``warped_label``: the item ``moving_label`` ``(1, *spatial)`` warped along ``ddf`` ``(D, *spatial)``.

    Args:
        mode: ``"nearest"`` voxel, or ``"linear"``: the label with the largest linear interpolation weight.
    """

    def __init__(self, mode: str = "nearest") -> None:
        if mode not in ("nearest", "linear"):
            raise ValueError(f"mode is '{mode}'. Use 'nearest' or 'linear'.")
        self.mode = mode

    def __call__(self, data: Mapping[Hashable, Tensor]) -> Data:
        """Add the warped label map to ``data``."""
        return {**data, "warped_label": _warped_labels(data["moving_label"], data["ddf"], self.mode)}


_FILES = (
    "warped.nii.gz",
    "warped_labels.nii.gz",
    "displacement.nii.gz",
    "inverse_displacement.nii.gz",
    "jacobian.nii.gz",
    "report.png",
    "summary.json",  # last: if it exists, so do the others
)


def _pair_folders(output_dir: Path, pairs: Sequence[Mapping[str, object]]) -> dict[tuple[str, str], Path]:
    """Output folder of each pair of files."""
    files = [(str(pair["moving"]), str(pair["fixed"])) for pair in pairs]
    names = [name.replace("/", "_") for name in scan_names([path for pair in files for path in pair])]
    folders = [output_dir / f"{moving}_to_{fixed}" for moving, fixed in zip(names[::2], names[1::2], strict=True)]
    for (moving, fixed), folder in zip(files, folders, strict=True):
        if folders.count(folder) > 1:
            raise ValueError(
                f"two pairs would be written to {folder}: {moving} to {fixed} is listed twice, or another pair has the "
                "same names. List it once, or rename the files."
            )
    return dict(zip(files, folders, strict=True))


class SaveRegistrationd(Transform):
    """Write the result of a registration to a folder.

    The files are ``warped.nii.gz`` (original intensities of the moving image, on the fixed grid),
    ``displacement.nii.gz`` and ``inverse_displacement.nii.gz`` (for ITK, ANTs and 3D Slicer: vectors in LPS mm),
    ``jacobian.nii.gz``, ``report.png``, ``summary.json`` and, if there are labels, ``warped_labels.nii.gz``.

    It needs the items ``moving`` and ``fixed`` from :class:`LoadScand`, and ``ddf`` and ``warped`` from the network. It
    uses ``inverse_ddf`` if there is one and inverts ``ddf`` otherwise. With ``moving_label`` and ``fixed_label`` the
    summary includes the Dice of each label. Its ``correlation_after`` is over the voxels that are displaced to a point
    within the moving image.

    Args:
        output_dir: folder, created if necessary.
        overwrite: replace the files of an earlier registration; without it they are an error.
        pairs: all pairs of the run, dicts with the paths ``moving`` and ``fixed``. If there are several, each gets a
            folder ``MOVING_to_FIXED`` in ``output_dir``.

    Raises:
        FileExistsError, NotADirectoryError: a folder cannot be used; checked when the transform is created.
        ValueError: a pair is listed twice, or two pairs would share a folder.
    """

    def __init__(
        self, output_dir: str, overwrite: bool = False, pairs: Sequence[Mapping[str, object]] | None = None
    ) -> None:
        self.output_dir = Path(output_dir)
        self.overwrite = overwrite
        self.folders = _pair_folders(self.output_dir, pairs) if pairs and len(pairs) > 1 else {}
        self.written: dict[Path, tuple[str, str]] = {}
        for folder in self.folders.values() or [self.output_dir]:
            self._check(folder)

    def _check(self, folder: Path) -> None:
        existing = [name for name in _FILES if (folder / name).exists()]
        if existing and not self.overwrite:
            raise FileExistsError(
                f"{folder} already holds {existing}. Choose another output_dir, or set overwrite to replace them."
            )
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"output_dir {folder} is a file. Name a folder.")

    def _folder(self, pair: tuple[str, str]) -> Path:
        """Folder of a pair of files; an error if another pair of this run was written there."""
        if self.folders and pair not in self.folders:
            raise ValueError(f"{pair[0]} to {pair[1]} is missing from 'pairs', so it has no folder. Add it.")
        folder = self.folders.get(pair, self.output_dir)
        previous = self.written.setdefault(folder, pair)
        if previous != pair:
            raise FileExistsError(
                f"{folder} holds the registration of {previous[0]} to {previous[1]}. List all pairs of the run in "
                f"'pairs', so that {pair[0]} to {pair[1]} gets its own folder."
            )
        self._check(folder)
        return folder

    def __call__(self, data: Mapping[Hashable, Tensor]) -> Data:
        """Write all files or none, and add the content of ``summary.json`` to ``data`` as ``summary``."""
        ((moving, fixed),) = pair_paths([data])  # type: ignore[list-item] # both are MetaTensors
        folder = self._folder((moving, fixed))
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".") as temporary:
            summary = self._write(Path(temporary), data)
            for name in _FILES:  # a leftover would pass for a part of this registration
                (folder / name).unlink(missing_ok=True)
            for name in _FILES:
                if (Path(temporary) / name).exists():
                    (Path(temporary) / name).replace(folder / name)
        return {**data, "summary": summary}

    def _write(self, folder: Path, data: Mapping[Hashable, Tensor]) -> dict[str, object]:
        moving, fixed = data["moving"], data["fixed"]
        assert isinstance(moving, MetaTensor)
        assert isinstance(fixed, MetaTensor)
        ddf, warped = data["ddf"].cpu(), data["warped"][0].cpu().numpy()
        affine = fixed.affine.numpy()
        inverse = data["inverse_ddf"].cpu() if "inverse_ddf" in data else invert(ddf[None])[0][0]
        summary = self._summary(data, inverse, affine)
        low, high = moving.meta["minimum"], moving.meta["maximum"]
        intensities = warped * (high - low) + low
        save_image(folder / "warped.nii.gz", intensities.astype(np.float32), affine)
        save_displacement(folder / "inverse_displacement.nii.gz", inverse.numpy(), affine)
        if "moving_label" in data:
            labels = _warped_labels(data["moving_label"], ddf, "nearest")
            save_image(folder / "warped_labels.nii.gz", labels[0].numpy(), affine)
        images = Images(np.asarray(moving[0]), np.asarray(fixed[0]), warped)
        save_results(folder, images, ddf.numpy(), affine, summary)
        return summary

    def _summary(self, data: Mapping[Hashable, Tensor], inverse: Tensor, affine: np.ndarray) -> dict[str, object]:
        ddf, moving, fixed = data["ddf"].cpu(), data["moving"].as_subclass(Tensor), data["fixed"].as_subclass(Tensor)
        consistency = inverse_consistency(
            ddf[None], inverse[None], spacing=spacing(affine).tolist(), mask=fixed[None] > 0
        )
        scan = Scan(moving[0].numpy(), np.eye(4))
        known = viewed(scan, scan.grid, np.eye(4), ddf.numpy())  # beyond, the warp repeats the outermost voxels
        summary: dict[str, object] = {
            "dice": None,
            "correlation_before": correlation(moving.numpy(), fixed.numpy()),
            "correlation_after": correlation(data["warped"][0].cpu().numpy(), fixed[0].numpy(), known),
            **regularity(ddf.numpy()),
            "inverse_consistency_mm": float(consistency),
            "seconds": float(data["seconds"]) if "seconds" in data else None,
        }
        if "moving_label" in data and "fixed_label" in data:
            labels = data["moving_label"].as_subclass(Tensor)
            stages = {"before": labels[0].numpy(), "after": _warped_labels(labels, ddf, "nearest")[0].numpy()}
            summary["dice"] = overlap(stages, data["fixed_label"].as_subclass(Tensor)[0].numpy())
        return summary
