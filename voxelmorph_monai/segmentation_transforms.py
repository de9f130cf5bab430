"""What the MONAI transforms of all segmentation networks share: load a scan, find its grid again, write a folder."""

import sys
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform, SaveImaged, Transform
from torch import Tensor

from voxelmorph_monai.affines import Affine, ImageGrid
from voxelmorph_monai.io.atomic import require_replaceable
from voxelmorph_monai.space.scan import Scan

__all__ = ["Data", "LoadScand", "SaveFolderd", "prediction_of", "refusal"]

Data = dict[Hashable, object]


def refusal(error: Exception) -> Exception:
    """Convert ``error`` so that a client of MONAI Label sees its message; elsewhere return it unchanged.

    MONAI Label reports only FastAPI's exceptions, and all others as "Internal Server Error".
    """
    fastapi = sys.modules.get("fastapi") if "monailabel" in sys.modules else None
    return error if fastapi is None else fastapi.HTTPException(422, str(error))


class LoadScand(MapTransform):
    """Load a scan, and resample it to the grid of a network: :meth:`resampled`, which subclasses define.

    The result is a MetaTensor ``(1, *size)``, float32 in [0, 1], whose affine maps its voxels to positions in the scan.
    The meta entries ``original_affine`` and ``spatial_shape`` hold the affine and the shape of the scan, as with
    MONAI's loaders. For formats and errors see :func:`~voxelmorph_monai.io.images.open_volume`.
    """

    def resampled(self, scan: Scan) -> tuple[Tensor, Affine]:
        """The network's image ``(1, *size)`` of a scan, and its affine (RAS, mm)."""
        raise NotImplementedError

    def __call__(self, data: Mapping[Hashable, object]) -> Data:
        """Replace the paths in ``data`` by the resampled scans."""
        loaded = dict(data)
        for key in self.key_iterator(loaded):
            path = str(loaded[key])
            try:
                scan = Scan.read(path)
                image, affine = self.resampled(scan)
            except (ValueError, OSError) as error:
                raise refusal(error) from error
            meta = {"filename_or_obj": path, "original_affine": scan.affine, "spatial_shape": np.array(scan.shape)}
            loaded[key] = MetaTensor(image, affine=torch.as_tensor(affine), meta=meta)
        return loaded


def prediction_of(data: Mapping[Hashable, object], ref_image: str) -> tuple[Tensor, ImageGrid, ImageGrid]:
    """The result ``pred`` ``(K, *size)`` of a network, its grid, and the grid of the scan.

    Args:
        data: items of a bundle's inference.
        ref_image: item of :class:`LoadScand`, whose header has both grids.
    """
    scan, pred = data[ref_image], data["pred"]
    assert isinstance(scan, MetaTensor)
    assert isinstance(pred, Tensor)
    original = np.asarray(scan.meta["original_affine"], np.float64)
    plain = pred.as_subclass(Tensor)
    grid = ImageGrid([int(n) for n in scan.meta["spatial_shape"]], original)
    return plain, ImageGrid(plain.shape[1:], scan.affine.cpu().numpy()), grid


class SaveFolderd(SaveImaged):
    """Write the files of a segmentation into a new folder.

    It inherits from ``SaveImaged`` only because MONAI Label skips transforms of this type.

    Args:
        output_dir: folder to write; if writing fails, nothing is left of it.
        overwrite: replace the folder of an earlier segmentation; otherwise an existing folder is an error.
    """

    FILES: Sequence[str]

    def __init__(self, output_dir: str | Path, overwrite: bool = False) -> None:
        Transform.__init__(self)
        self.output_dir = Path(output_dir)
        self.overwrite = overwrite

    def check(self) -> None:
        """Raise FileExistsError or ValueError if the folder must not be written; a bundle calls this at its start.

        The constructor does not check the folder, because MONAI Label creates this transform without using it.
        """
        require_replaceable(self.output_dir, self.overwrite, "a segmentation", self.FILES)
