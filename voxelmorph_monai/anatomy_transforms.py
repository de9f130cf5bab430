"""MONAI transforms for the anatomy network: find the head in a scan, restore its labels, save them."""

import csv
from collections.abc import Hashable, Mapping
from pathlib import Path

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Transform
from torch import Tensor

from voxelmorph_monai.affines import Affine
from voxelmorph_monai.anatomy import clean, colour_table, find_head, load_anatomy, restore, see, to_freesurfer
from voxelmorph_monai.io.atomic import atomic_folder
from voxelmorph_monai.segmentation_transforms import Data, LoadScand, SaveFolderd, prediction_of
from voxelmorph_monai.space.scan import Scan

__all__ = ["SEGMENTATION_FILES", "LoadHeadd", "RestoreAnatomyd", "SaveAnatomyd", "save_anatomy"]

SEGMENTATION_FILES = ("labels.nii.gz", "brain_mask.nii.gz", "volumes.csv", "colours.txt")
"""Files that :func:`save_anatomy` writes."""


class LoadHeadd(LoadScand):
    """Load a scan, and resample it around the brain, upright, with voxels of 2 mm.

    Args:
        keys: items that hold paths.
        weights: weights of the anatomy network, which finds the brain at low resolution.
    """

    def __init__(self, keys: KeysCollection, weights: str) -> None:
        super().__init__(keys)
        self.weights = weights

    def resampled(self, scan: Scan) -> tuple[Tensor, Affine]:
        """What the anatomy network sees of a scan in its fine look, ``(1, X, Y, Z)``, and its affine (RAS, mm)."""
        view = find_head(scan, load_anatomy(self.weights))
        return see(scan, view)[0].clamp_(max=1), view.affine


class RestoreAnatomyd(Transform):
    """Convert the logits ``pred`` to classes on the grid of the scan, ``(1, X, Y, Z)``, uint8; add ``volumes``.

    ``volumes`` is a dict of the volume of each structure in mm3, by name.

    Args:
        ref_image: item of :class:`LoadHeadd`, whose header has the grid of the scan.
    """

    def __init__(self, ref_image: str = "image") -> None:
        self.ref_image = ref_image

    def __call__(self, data: Mapping[Hashable, object]) -> Data:
        """Replace ``pred`` in ``data``, and add ``volumes``."""
        pred, view, grid = prediction_of(data, self.ref_image)
        classes, volumes = restore(clean(pred.float().softmax(0)), view, grid)
        restored = MetaTensor(torch.from_numpy(classes)[None], affine=torch.as_tensor(grid.affine))
        return dict(data) | {"pred": restored, "volumes": volumes}


def save_anatomy(folder: Path, labels: Scan, volumes: Mapping[str, float]) -> None:
    """Write :data:`SEGMENTATION_FILES` into ``folder``.

    Args:
        folder: existing folder.
        labels: labels in FreeSurfer's numbers; the brain mask is where they are above 0.
        volumes: volume of each structure in mm3, by name.
    """
    labels.save(folder / "labels.nii.gz")
    labels.like((labels.array > 0).astype(np.uint8)).save(folder / "brain_mask.nii.gz")
    (folder / "colours.txt").write_text(colour_table(), encoding="utf-8")
    with (folder / "volumes.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["structure", "volume_mm3"])
        rows.writerows([name, f"{volume:.1f}"] for name, volume in volumes.items())


class SaveAnatomyd(SaveFolderd):
    """Write the files of :func:`save_anatomy` into a new folder.

    Args:
        output_dir: folder to write; if writing fails, nothing is left of it.
        overwrite: replace the folder of an earlier segmentation; otherwise an existing folder is an error.
    """

    FILES = SEGMENTATION_FILES

    def __call__(self, data: Mapping[Hashable, object]) -> Data:
        """Write the files; ``data`` is returned unchanged."""
        self.check()
        head, pred, volumes = data["image"], data["pred"], data["volumes"]
        assert isinstance(head, MetaTensor)
        assert isinstance(pred, Tensor)
        assert isinstance(volumes, Mapping)
        scan = Scan.read(str(head.meta["filename_or_obj"]))  # for its header
        labels = scan.like(to_freesurfer(pred[0].as_subclass(Tensor).cpu().numpy()))
        with atomic_folder(self.output_dir) as folder:
            save_anatomy(folder, labels, volumes)
        return dict(data)
