r"""Rigid and affine registration by mutual information, from any pose.

The transform maps points of the fixed image to points of the moving one, as ITK resamples. It is found in three steps:

1. many rotations about the centres of the brains, scored on 8 mm copies by the correlation of the two images;
2. a short optimisation of the best of them, with few parameters, on the same copies;
3. a full optimisation of the one that is best then, on 4 mm and 2 mm copies.

Steps 2 and 3 maximise the mutual information of Mattes et al. (IEEE TMI 2003) by ITK. Nothing is drawn at random and
sums are taken in one order, so that the same images give the same transform whatever the number of threads.
"""

from typing import Any, NamedTuple

import itk
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from voxelmorph_monai.spaces import Affine, require_right_angles, spacing, to_itk, to_lps, transform_affine

__all__ = ["register_affine"]

_COARSE = 8.0  # mm: a brain is about 20 voxels wide, 500 poses are scored within a second
_FINE = (4.0, 2.0)  # mm: finer copies change the result by less than 0.1 mm
_NUM_ROTATIONS = 500  # neighbours are some 30 degrees apart, half of what the optimisation makes up for
_NUM_STARTS = 8
_SEED = 121212


class _Copy(NamedTuple):
    """Coarse copy of an image."""

    array: NDArray[np.float32]
    affine: Affine


def _around_brain(array: NDArray[Any], affine: Affine, margin: float) -> _Copy:
    """Cut or pad ``array`` to ``margin`` mm around its non-zero voxels."""
    found = ndimage.find_objects((array != 0).astype(np.uint8))[0]
    width = np.ceil(margin / spacing(affine)).astype(int)
    padded = np.pad(array[found], [(n, n) for n in width])
    shifted = affine.copy()
    shifted[:3, 3] += affine[:3, :3] @ ([edge.start for edge in found] - width)
    return _Copy(padded, shifted)


def _coarsen(image: _Copy, size: float) -> _Copy:
    """Smooth and thin an image to voxels of about ``size`` mm."""
    factor = size / spacing(image.affine)
    smooth = ndimage.gaussian_filter(image.array, 0.42 * factor)  # one new voxel wide at half height
    step = np.maximum(np.rint(factor).astype(int), 1)
    affine = image.affine.copy()
    affine[:3, :3] *= step
    return _Copy(smooth[:: step[0], :: step[1], :: step[2]], affine)


def _volume(image: _Copy) -> float:
    """Volume of the non-zero voxels, in mm^3."""
    return float(np.count_nonzero(image.array) * np.prod(spacing(image.affine)))


def _centre(image: _Copy) -> NDArray[Any]:
    """Centre of the non-zero voxels, in mm (RAS)."""
    index = np.argwhere(image.array != 0).mean(axis=0)
    return image.affine[:3, :3] @ index + image.affine[:3, 3]


def _rotations(number: int) -> NDArray[Any]:
    """Evenly spread rotations ``(number, 3, 3)``, the identity first (super-Fibonacci spiral, Alexa, CVPR 2022)."""
    s = np.arange(number - 1) + 0.5
    inner, outer = np.sqrt(s / (number - 1)), np.sqrt(1 - s / (number - 1))
    a, b = 2 * np.pi * s / np.sqrt(2), 2 * np.pi * s / 1.533751168755204288118041
    quaternions = np.stack([inner * np.sin(a), inner * np.cos(a), outer * np.sin(b), outer * np.cos(b)], axis=1)
    return np.concatenate([np.eye(3)[None], Rotation.from_quat(quaternions).as_matrix()])


def _standardise(array: NDArray[Any]) -> NDArray[Any]:
    centred = array - array.mean()
    return centred / max(float(np.sqrt((centred**2).sum())), 1e-9)


def _best_poses(moving: _Copy, fixed: _Copy, scale: float) -> list[Affine]:
    """The rotations (with ``scale``) about the centres of the brains that correlate best: 4 x 4 matrices (RAS mm)."""
    centre, target = _centre(fixed), _centre(moving)
    to_voxels, pattern = np.linalg.inv(moving.affine), _standardise(fixed.array)
    poses, score = [], []
    for rotation in _rotations(_NUM_ROTATIONS):
        pose = np.eye(4)
        pose[:3, :3] = scale * rotation
        pose[:3, 3] = target - pose[:3, :3] @ centre
        matrix = to_voxels @ pose @ fixed.affine
        warped = ndimage.affine_transform(moving.array, matrix, output_shape=pattern.shape, order=1)
        poses.append(pose)
        score.append((_standardise(warped) * pattern).sum())  # no BLAS: its sums depend on the number of threads
    return [poses[i] for i in np.argsort(score)[::-1][:_NUM_STARTS]]


def _transform(kind: str, pose: Affine, centre: NDArray[Any]) -> itk.Transform:
    """ITK transform of the given kind with the matrix ``pose`` (RAS mm), its parameters counted about ``centre``."""
    types = {"rigid": "VersorRigid3DTransform", "similarity": "Similarity3DTransform", "affine": "AffineTransform"}
    template = getattr(itk, types[kind])
    transform = (template[itk.D, 3] if kind == "affine" else template[itk.D]).New()
    lps = to_lps(pose)
    centre = to_lps(centre)
    transform.SetCenter(centre.tolist())
    transform.SetMatrix(itk.matrix_from_array(lps[:3, :3]))
    transform.SetTranslation((lps[:3, :3] @ centre + lps[:3, 3] - centre).tolist())
    return transform


def _optimise(transform: itk.Transform, moving: _Copy, fixed: _Copy, share: float = 1.0) -> float:
    """Optimise ``transform`` in place; returns the negative mutual information over a ``share`` of the fixed voxels."""
    moving_image, fixed_image = to_itk(*moving), to_itk(*fixed)
    images = type(fixed_image), type(moving_image)
    metric = itk.MattesMutualInformationImageToImageMetricv4[images].New(
        NumberOfHistogramBins=32,
        # Derivatives at the sampled points, not interpolated between voxels: only these fit the metric well enough for
        # different starts to end within 0.3 mm of one another.
        UseMovingImageGradientFilter=False,
        UseFixedImageGradientFilter=False,
        MaximumNumberOfWorkUnits=1,  # several would add up their histograms in an order of their own
    )
    optimizer = itk.RegularStepGradientDescentOptimizerv4.New(
        ScalesEstimator=itk.RegistrationParameterScalesFromPhysicalShift[type(metric)].New(Metric=metric),
        NumberOfIterations=200,
        RelaxationFactor=0.8,
        MinimumStepLength=1e-3,
        GradientMagnitudeTolerance=0.0,  # in units of the metric: no measure of how far there is to go
        ReturnBestParametersAndValue=True,
    )
    method = itk.ImageRegistrationMethodv4[images].New(
        FixedImage=fixed_image,
        MovingImage=moving_image,
        Metric=metric,
        Optimizer=optimizer,
        InitialTransform=transform,
        InPlace=True,
        MetricSamplingStrategy=itk.ImageRegistrationMethodv4Enums.MetricSamplingStrategy_REGULAR,
    )
    method.MetricSamplingReinitializeSeed(_SEED)
    method.SetNumberOfLevels(1)  # first: it resets what is set for each level
    method.SetMetricSamplingPercentage(share)
    method.SetShrinkFactorsPerLevel([1])
    method.SetSmoothingSigmasPerLevel([0])
    method.Update()
    return float(optimizer.GetValue())


def register_affine(
    moving: tuple[NDArray[Any], Affine], fixed: tuple[NDArray[Any], Affine], transform: str = "affine"
) -> itk.Transform:
    """Align two skull-stripped images ``(array, affine)``, as :func:`~voxelmorph_monai.spaces.read_image` gives them.

    Args:
        moving: image whose background is 0, in any pose. A few very bright voxels spoil the histogram: clip them.
        fixed: the same.
        transform: ``"rigid"`` (6 parameters) or ``"affine"`` (12 parameters).

    Returns:
        ITK transform in mm (LPS) that takes points of ``fixed`` to points of ``moving``.
    """
    if transform not in ("rigid", "affine"):
        raise ValueError(f"transform must be 'rigid' or 'affine', got '{transform}'.")
    for name, (array, affine) in (("moving", moving), ("fixed", fixed)):
        if array.ndim != 3 or not array.any():
            raise ValueError(f"{name} must be (X, Y, Z) and not 0 everywhere, got {array.shape}.")
        require_right_angles(affine, name)
    moving_brain = _around_brain(*moving, margin=50.0)  # room for poses: ITK leaves out what falls outside the image
    fixed_brain = _around_brain(*fixed, margin=10.0)
    coarse = _coarsen(moving_brain, _COARSE), _coarsen(fixed_brain, _COARSE)
    centre = _centre(coarse[1])
    kind, scale = "rigid", 1.0
    if transform == "affine":
        kind, scale = "similarity", (_volume(moving_brain) / _volume(fixed_brain)) ** (1 / 3)
    starts = [_transform(kind, pose, centre) for pose in _best_poses(*coarse, scale)]
    values = [_optimise(start, *coarse) for start in starts]
    result = _transform(transform, transform_affine(starts[int(np.argmin(values))]), centre)
    for size in _FINE:
        _optimise(result, _coarsen(moving_brain, size), _coarsen(fixed_brain, size), share=0.25)
    return result
