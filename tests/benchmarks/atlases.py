"""How good segmentation by 1, 3 and 5 atlases is: ``python tests/benchmarks/atlases.py PREPARED SCANS STRUCTURES``.

``PREPARED`` is what ``vxm prepare`` makes of the labelled scans; ``SCANS`` holds the scans and labels as they are,
``ID_t1.nii.gz`` and ``ID_labels.nii.gz``. Each of ``--scans`` is segmented by the first 1, 3 and 5 of ``--atlases`` and
compared with its labels on its own grid. Alignments are taken from ``PREPARED``, as a bundle would find them.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import itk
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from numpy.typing import NDArray

from voxelmorph_monai.apps.atlas_bundle import segmentation_network
from voxelmorph_monai.apps.shipped import shipped_weights
from voxelmorph_monai.atlas_transforms import RestoreLabelsd
from voxelmorph_monai.io.images import read_image, read_labels
from voxelmorph_monai.metrics import dice
from voxelmorph_monai.space.itk_bridge import transform_affine
from voxelmorph_monai.space.template import STANDARD_GRID
from voxelmorph_monai.transforms import MergeLabelsd


def merged(path: Path, merge: MergeLabelsd) -> NDArray[np.uint8]:
    labels = merge({"": torch.from_numpy(read_labels(path)[0].astype(np.int64))})[""]
    return labels.numpy().astype(np.uint8)  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("prepared", type=Path)
    parser.add_argument("originals", type=Path)
    parser.add_argument("structures", type=Path, help="as configs/neuromorphometrics.yaml")
    parser.add_argument("--atlases", nargs="+", default=["1000", "1001", "1002", "1006", "1007"])
    parser.add_argument("--scans", nargs="+", default=["1005", "1018", "1019"])
    args = parser.parse_args()
    structures = ConfigParser.load_config_file(args.structures)["structures"]
    merge = MergeLabelsd("", structures)

    def read(name: str) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        return read_image(args.prepared / "images" / f"{name}.nii.gz")[0], merged(
            args.prepared / "labels" / f"{name}.nii.gz", merge
        )

    pairs = [(np.rint(255 * image).astype(np.uint8), labels) for image, labels in map(read, args.atlases)]
    print("scan   atlases  Dice    processor seconds")
    for name in args.scans:
        image = torch.from_numpy(read(name)[0])[None, None]
        mapping = transform_affine(itk.transformread(str(args.prepared / "transforms" / f"{name}.txt"))[0])
        original, affine = read_labels(args.originals / f"{name}_labels.nii.gz")
        truth = torch.from_numpy(merged(args.originals / f"{name}_labels.nii.gz", merge).astype(np.int32))[None, None]
        meta = {"original_affine": affine, "spatial_shape": np.array(original.shape)}
        scan = MetaTensor(image[0], affine=torch.as_tensor(mapping @ STANDARD_GRID.around().affine), meta=meta)
        for number in (1, 3, 5):
            network, _ = segmentation_network(pairs[:number], len(structures), shipped_weights())
            start = time.process_time()
            with torch.inference_mode():
                found = RestoreLabelsd()({"image": scan, "pred": network.eval()(image)[0]})["pred"]
            seconds = time.process_time() - start
            assert isinstance(found, torch.Tensor)
            overlap = dice(found.as_subclass(torch.Tensor).int()[None], truth, len(structures))
            print(f"{name}   {number}        {float(overlap.nanmean()):.4f}  {seconds:.1f}", flush=True)


if __name__ == "__main__":
    main()
