"""Write what the package ships of MNI152, and tissue classes for Colin27: ``python tests/make_sample.py``.

ITK's k-means finds the mean intensities of fluid, grey and white matter; a Markov random field then smooths the classes
by iterated conditional modes (Besag, Journal of the Royal Statistical Society B, 1986).
"""

from typing import Any

import itk
import numpy as np
from nilearn import datasets
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter

from voxelmorph_monai.affines import Affine
from voxelmorph_monai.io.images import read_image, save_image
from voxelmorph_monai.space.itk_bridge import from_itk, to_itk
from voxelmorph_monai.space.template import sample_scan

CLASSES = (1, 2, 3)  # fluid, grey, white: in the order of their intensities
NEIGHBOUR = 0.15  # how many units of log likelihood each neighbour of the same class is worth


def k_means(image: NDArray[np.float32], affine: Affine) -> NDArray[Any]:
    """Class of the nearest of four means: 0 for the background, then the tissues."""
    means = [0.0, *np.percentile(image[image > 0], (10, 50, 85))]
    classify = itk.ScalarImageKmeansImageFilter.New(to_itk(image, affine))
    for mean in means:
        classify.AddClassWithInitialMean(float(mean))
    classify.Update()
    return from_itk(classify.GetOutput())[0]


def tissue(image: NDArray[np.float32], affine: Affine, num_passes: int = 8) -> NDArray[np.uint8]:
    """Tissue of each voxel of a skull-stripped T1 image ``(X, Y, Z)``: 0 outside, 1 fluid, 2 grey, 3 white."""
    brain = image > 0
    classes = np.where(brain, np.maximum(k_means(image, affine), 1), 0)
    for _ in range(num_passes):
        energy = []
        for number in CLASSES:
            values = image[classes == number]
            same = 27 * uniform_filter((classes == number).astype(np.float32), 3)
            unlikely = (image - values.mean()) ** 2 / (2 * values.var()) + np.log(values.std())
            energy.append(unlikely - NEIGHBOUR * same)
        classes = np.where(brain, np.argmin(energy, axis=0) + 1, 0)
    return classes.astype(np.uint8)


def template() -> tuple[NDArray[np.uint8], Affine]:
    """The brain of MNI152: bytes, as nilearn's file holds them, 0 outside its brain mask; and its affine."""
    image, mask = datasets.load_mni152_template(resolution=1), datasets.load_mni152_brain_mask(resolution=1)
    bytes_ = np.rint(image.get_fdata() * 255).astype(np.uint8)
    return np.where(mask.get_fdata() > 0, bytes_, 0).astype(np.uint8), image.affine


def main() -> None:
    path = sample_scan("colin27")
    image, affine = read_image(path)
    save_image(path.with_name("mni152.nii.gz"), *template())
    save_image(path.with_name("colin27_tissue.nii.gz"), tissue(image, affine), affine)


if __name__ == "__main__":
    main()
