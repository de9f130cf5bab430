"""Transforms of MONAI dictionaries: load scans, merge labels, warp labels, save a registration."""

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from torch import Tensor

from voxelmorph_monai.blocks import invert, signed, warp, warp_labels
from voxelmorph_monai.metrics import inverse_consistency
from voxelmorph_monai.results import Images, correlation, overlap, regularity, save_results
from voxelmorph_monai.spaces import (
    read_image,
    read_labels,
    require_same_grid,
    save_displacement,
    save_image,
    spacing,
)

__all__ = ["LoadScand", "MergeLabelsd", "SaveRegistrationd", "WarpLabelsd"]

Data = dict[Hashable, object]


class LoadScand(MapTransform):
    """Load images and label maps that lie on one grid, each as a MetaTensor ``(1, X, Y, Z)``.

    In place of MONAI's ``LoadImaged`` because it refuses, naming the file, what would train or register nonsense: NaN,
    an image that shows nothing, labels that are no whole numbers, an affine without inverse, grids that differ.

    Args:
        keys: items that hold paths; those whose key ends in ``label`` are label maps (int32), the others images
            (float32, scaled to [0, 1]; their own range is kept in the meta entries ``minimum`` and ``maximum``).
        allow_missing_keys: load what is there.
    """

    def __call__(self, data: Mapping[Hashable, object]) -> Data:
        """Replace the paths in ``data`` by what they hold."""
        loaded = dict(data)
        first = None
        for key in self.key_iterator(loaded):
            path = str(loaded[key])
            is_label = str(key).endswith("label")
            array, affine = read_labels(path) if is_label else read_image(path)
            if first is None:
                first = ((array, affine), path)
            require_same_grid(first[0], (array, affine), (first[1], path))
            meta: dict[str, object] = {"filename_or_obj": path}
            if is_label:
                if array.max() > np.iinfo(np.int32).max:
                    raise ValueError(f"{path} must hold labels of at most 2^31 - 1, got {array.max()}.")
                array = array.astype(np.int32)
            else:
                meta |= {"minimum": float(array.min()), "maximum": float(array.max())}
                array = (array - array.min()) / (array.max() - array.min())
            loaded[key] = MetaTensor(
                torch.from_numpy(np.ascontiguousarray(array))[None], affine=torch.as_tensor(affine), meta=meta
            )
        return loaded


class MergeLabelsd(MapTransform):
    """Number the structures of a label map 1, 2, ... in the order of a table, and set everything else to 0.

    Args:
        keys: label maps, integers.
        structures: name to the labels that make up the structure; None leaves the map as it is.
        num_labels: largest label allowed in the result; what is measured later counts to it.
        kept: names of the structures (labels, where there is no table) that stay, with the numbers they have; the
            others become 0. None keeps all.
        allow_missing_keys: merge what is there.

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
            raise ValueError(f"kept must name one or more of the structures {names}, got {kept}.")
        self.kept = None if kept is None else torch.tensor([0, *(names.index(name) + 1 for name in kept)])

    def __call__(self, data: Mapping[Hashable, object]) -> Data:
        """Renumber the label maps of ``data``."""
        merged = dict(data)
        for key in self.key_iterator(merged):
            labels = merged[key]
            assert isinstance(labels, Tensor)
            merged[key] = labels = signed(labels)
            if self.table is not None:
                known = labels.long().clamp(0, len(self.table) - 1)  # the last entry of the table is 0
                merged[key] = self.table.to(labels.device)[known]
            elif self.num_labels is not None and int(labels.max()) > self.num_labels:
                name = labels.meta["filename_or_obj"] if isinstance(labels, MetaTensor) else key
                raise ValueError(f"{name} must hold labels up to num_labels = {self.num_labels}, got {labels.max()}.")
            if self.kept is not None:
                found = merged[key]
                assert isinstance(found, Tensor)
                merged[key] = torch.where(torch.isin(found, self.kept.to(found)), found, 0)
        return merged


def _merging_table(structures: Mapping[str, Sequence[int]]) -> Tensor:
    """Give the number (1, 2, ... in order; 0 for none) of each label's structure: ``(largest label + 2,)`` int32."""
    table = torch.zeros(max((max(labels) for labels in structures.values()), default=0) + 2, dtype=torch.int32)
    for number, (name, labels) in enumerate(structures.items(), start=1):
        for label in labels:
            if label < 1 or table[label] != 0:
                raise ValueError(f"labels of structure '{name}' must be > 0 and in no other, got {label}.")
            table[label] = number
    return table


def _warped_labels(labels: Tensor, ddf: Tensor, mode: str) -> Tensor:
    labels = labels.as_subclass(Tensor).to(ddf.device)[None]
    return warp(labels, ddf[None], mode="nearest")[0] if mode == "nearest" else warp_labels(labels, ddf[None])[0]


class WarpLabelsd(Transform):
    """Add ``warped_label``: the item ``moving_label`` ``(1, *spatial)`` warped along ``ddf`` ``(D, *spatial)``.

    Args:
        mode: ``"nearest"``, or ``"linear"``: the label with the largest linearly interpolated share.
    """

    def __init__(self, mode: str = "nearest") -> None:
        if mode not in ("nearest", "linear"):
            raise ValueError(f"mode must be 'nearest' or 'linear', got '{mode}'.")
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
    "summary.json",  # last: where it is, the others are
)


class SaveRegistrationd(Transform):
    """Write what a registration found, into one folder.

    ``warped.nii.gz`` (the moving image's own intensities, on the fixed image's grid), ``displacement.nii.gz`` and
    ``inverse_displacement.nii.gz`` (for ITK, ANTs and 3D Slicer: vectors in LPS mm), ``jacobian.nii.gz``,
    ``report.png``, ``summary.json`` and, given labels, ``warped_labels.nii.gz``. Needs the items ``moving``, ``fixed``
    (from :class:`LoadScand`) and ``ddf``, ``warped`` (the network's); takes ``inverse_ddf``, else inverts ``ddf``;
    takes ``moving_label`` and ``fixed_label`` for the Dice of each label.

    Args:
        output_dir: the folder, made if need be.
        overwrite: replace the files of an earlier registration; else they are an error.
    """

    def __init__(self, output_dir: str, overwrite: bool = False) -> None:
        self.output_dir = Path(output_dir)
        there = [name for name in _FILES if (self.output_dir / name).exists()]
        if there and not overwrite:
            raise FileExistsError(f"output_dir must be new, or overwrite be true, but {output_dir} holds {there}.")
        if self.output_dir.exists() and not self.output_dir.is_dir():
            raise NotADirectoryError(f"output_dir must be a folder, got the file {output_dir}.")

    def __call__(self, data: Mapping[Hashable, Tensor]) -> Data:
        """Write the files, all or none of them, and add the content of ``summary.json`` to ``data`` as ``summary``."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self.output_dir, prefix=".") as temporary:
            summary = self._write(Path(temporary), data)
            for name in _FILES:  # what is not written anew would pass for a part of this registration
                (self.output_dir / name).unlink(missing_ok=True)
            for name in _FILES:
                if (Path(temporary) / name).exists():
                    (Path(temporary) / name).replace(self.output_dir / name)
        return {**data, "summary": summary}

    def _write(self, folder: Path, data: Mapping[Hashable, Tensor]) -> dict[str, object]:
        fixed, ddf, warped = data["fixed"], data["ddf"].cpu(), data["warped"][0].cpu().numpy()
        assert isinstance(fixed, MetaTensor)
        affine = fixed.affine.numpy()
        inverse = data["inverse_ddf"].cpu() if "inverse_ddf" in data else invert(ddf[None])[0][0]
        summary = self._summary(data, inverse, affine)
        meta = data["moving"].meta  # type: ignore[attr-defined]
        intensities = warped * (meta["maximum"] - meta["minimum"]) + meta["minimum"]
        save_image(folder / "warped.nii.gz", intensities.astype(np.float32), affine)
        save_displacement(folder / "inverse_displacement.nii.gz", inverse.numpy(), affine)
        if "moving_label" in data:
            labels = _warped_labels(data["moving_label"], ddf, "nearest")
            save_image(folder / "warped_labels.nii.gz", labels[0].numpy(), affine)
        images = Images(np.asarray(data["moving"][0]), np.asarray(fixed[0]), warped)
        save_results(folder, images, ddf.numpy(), affine, summary)
        return summary

    def _summary(self, data: Mapping[Hashable, Tensor], inverse: Tensor, affine: np.ndarray) -> dict[str, object]:
        ddf, moving, fixed = data["ddf"].cpu(), data["moving"].as_subclass(Tensor), data["fixed"].as_subclass(Tensor)
        consistency = inverse_consistency(
            ddf[None], inverse[None], spacing=spacing(affine).tolist(), mask=fixed[None] > 0
        )
        summary: dict[str, object] = {
            "dice": None,
            "similarity_before": correlation(moving.numpy(), fixed.numpy()),
            "similarity_after": correlation(data["warped"].cpu().numpy(), fixed.numpy()),
            **regularity(ddf.numpy()),
            "inverse_consistency_mm": float(consistency),
            "seconds": float(data["seconds"]) if "seconds" in data else None,
        }
        if "moving_label" in data and "fixed_label" in data:
            labels = data["moving_label"].as_subclass(Tensor)
            stages = {"before": labels[0].numpy(), "after": _warped_labels(labels, ddf, "nearest")[0].numpy()}
            summary["dice"] = overlap(stages, data["fixed_label"].as_subclass(Tensor)[0].numpy())
        return summary
