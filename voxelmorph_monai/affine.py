r"""Rigid and affine registration by mutual information, from any pose, in 2-D and 3-D.

The transform maps points of the fixed image to points of the moving one, as ITK resamples. It is found in three steps:

1. many rotations about the centres of what the images show, scored on coarse copies by the correlation of the two;
2. a short optimisation, with few parameters, on the same copies: of the best of them, and of where the headers put the
   images already;
3. a full optimisation of the one that is best then, on two finer copies.

Images that are the same where the headers put them stay there. How coarse is counted in sides of a cube as large as
what the fixed image shows, so that a mouse is registered as a man: for a brain, whose side is some 125 mm, the copies
have voxels of 8, 4 and 2 mm.

Steps 2 and 3 maximise the mutual information of Mattes et al. (IEEE TMI 2003) by ITK. Nothing is drawn at random and
sums are taken in one order, so that the same images give the same transform whatever the number of threads.
"""

from typing import Any, NamedTuple

import itk
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from voxelmorph_monai.spaces import (
    Affine,
    linear_transform,
    require_right_angles,
    spacing,
    to_itk,
    to_lps,
    transform_affine,
)

__all__ = ["register_affine"]

_COARSE = 0.064  # sides: a brain is about 20 voxels wide, 500 poses are scored within a second
_FINE = (0.032, 0.016)  # sides: finer copies change the result by less than 0.1 mm in a brain
_SMALLEST = 8.0  # mm, side of what is aligned as it is
_MARGINS = 0.4, 0.08  # sides, around the moving image: room for poses, ITK leaves out what falls outside; fixed image
_NUM_ROTATIONS = 500  # neighbours are some 30 degrees apart, half of what the optimisation makes up for
_NUM_STARTS = 8
_SAME = 0.9999  # correlation of images that differ by rounding alone
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
    shifted[:-1, -1] += affine[:-1, :-1] @ ([edge.start for edge in found] - width)
    return _Copy(padded, shifted)


def _coarsen(image: _Copy, size: float) -> _Copy:
    """Smooth and thin an image to voxels of about ``size`` mm."""
    factor = size / spacing(image.affine)
    smooth = ndimage.gaussian_filter(image.array, 0.42 * factor)  # one new voxel wide at half height
    step = np.maximum(np.rint(factor).astype(int), 1)
    affine = image.affine.copy()
    affine[:-1, :-1] *= step
    return _Copy(smooth[tuple(slice(None, None, n) for n in step)], affine)


def _side(image: tuple[NDArray[Any], Affine]) -> float:
    """Side in mm of a cube, or square, as large as all non-zero voxels together."""
    array, affine = image
    return float(np.count_nonzero(array) * np.prod(spacing(affine))) ** (1 / array.ndim)


def _centre(image: _Copy) -> NDArray[Any]:
    """Centre of the non-zero voxels, in mm (RAS)."""
    index = np.argwhere(image.array != 0).mean(axis=0)
    return image.affine[:-1, :-1] @ index + image.affine[:-1, -1]


def _rotations(number: int, spatial_dims: int) -> NDArray[Any]:
    """Evenly spread rotations ``(number, D, D)``, the identity first.

    In 3-D they lie on the super-Fibonacci spiral of Alexa (CVPR 2022).
    """
    if spatial_dims == 2:
        angles = 2 * np.pi * np.arange(number) / number
        return Rotation.from_euler("z", angles[:, None]).as_matrix()[:, :2, :2]
    s = np.arange(number - 1) + 0.5
    inner, outer = np.sqrt(s / (number - 1)), np.sqrt(1 - s / (number - 1))
    a, b = 2 * np.pi * s / np.sqrt(2), 2 * np.pi * s / 1.533751168755204288118041
    quaternions = np.stack([inner * np.sin(a), inner * np.cos(a), outer * np.sin(b), outer * np.cos(b)], axis=1)
    return np.concatenate([np.eye(3)[None], Rotation.from_quat(quaternions).as_matrix()])


def _standardise(array: NDArray[Any]) -> NDArray[Any]:
    centred = array - array.mean()
    return centred / max(float(np.sqrt((centred**2).sum())), 1e-9)


def _best_poses(moving: _Copy, fixed: _Copy, scale: float) -> list[Affine]:
    """The rotations (with ``scale``) about the centres of the brains that correlate best: matrices (RAS mm)."""
    centre, target = _centre(fixed), _centre(moving)
    to_voxels, pattern = np.linalg.inv(moving.affine), _standardise(fixed.array)
    poses, score = [], []
    for rotation in _rotations(_NUM_ROTATIONS, len(centre)):
        pose = np.eye(len(centre) + 1)
        pose[:-1, :-1] = scale * rotation
        pose[:-1, -1] = target - pose[:-1, :-1] @ centre
        matrix = to_voxels @ pose @ fixed.affine
        warped = ndimage.affine_transform(moving.array, matrix, output_shape=pattern.shape, order=1)
        poses.append(pose)
        score.append((_standardise(warped) * pattern).sum())  # no BLAS: its sums depend on the number of threads
    return [poses[i] for i in np.argsort(score)[::-1][:_NUM_STARTS]]


def _agree(moving: _Copy, fixed: _Copy) -> bool:
    """Whether the images are the same where the headers put them: then there is nothing to optimise, and to spoil."""
    there = ndimage.affine_transform(
        moving.array, np.linalg.inv(moving.affine) @ fixed.affine, output_shape=fixed.array.shape, order=1
    )
    return float((_standardise(there) * _standardise(fixed.array)).sum()) > _SAME


def _overlap(moving: _Copy, fixed: _Copy) -> bool:
    """Whether the headers put at least half of the fixed image into the moving one, so that ITK can start there."""
    there = ndimage.affine_transform(
        np.ones_like(moving.array), np.linalg.inv(moving.affine) @ fixed.affine, output_shape=fixed.array.shape, order=0
    )
    return bool(there[fixed.array != 0].mean() > 0.5)


def _transform(kind: str, pose: Affine, centre: NDArray[Any]) -> itk.Transform:
    """ITK transform of the given kind with the matrix ``pose`` (RAS mm), its parameters counted about ``centre``."""
    kinds = {
        ("rigid", 2): itk.Euler2DTransform[itk.D],
        ("rigid", 3): itk.VersorRigid3DTransform[itk.D],
        ("similarity", 2): itk.Similarity2DTransform[itk.D],
        ("similarity", 3): itk.Similarity3DTransform[itk.D],
        ("affine", 2): itk.AffineTransform[itk.D, 2],
        ("affine", 3): itk.AffineTransform[itk.D, 3],
    }
    transform = kinds[kind, len(centre)].New()
    lps, centre = to_lps(pose), to_lps(centre)
    transform.SetCenter(centre.tolist())
    transform.SetMatrix(itk.matrix_from_array(np.ascontiguousarray(lps[:-1, :-1])))
    transform.SetTranslation((lps[:-1, :-1] @ centre + lps[:-1, -1] - centre).tolist())
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
        moving: image whose background is 0, in any pose. A few very bright voxels spoil the histogram: clip them. Or
            ``(X, Y)`` with a 3 x 3 affine.
        fixed: the same.
        transform: ``"rigid"`` (6 parameters, 3 in 2-D) or ``"affine"`` (12 and 6).

    Returns:
        ITK transform in mm (LPS) that takes points of ``fixed`` to points of ``moving``.
    """
    if transform not in ("rigid", "affine"):
        raise ValueError(f"transform must be 'rigid' or 'affine', got '{transform}'.")
    for name, (array, affine) in (("moving", moving), ("fixed", fixed)):
        if array.ndim not in (2, 3) or affine.shape != (array.ndim + 1,) * 2 or not array.any():
            raise ValueError(f"{name} must be (X, Y, Z) and not 0 everywhere, got {array.shape}.")
        require_right_angles(affine, name)
    if moving[0].ndim != fixed[0].ndim:
        raise ValueError(f"moving and fixed must both be 2-D or 3-D, got {moving[0].shape} and {fixed[0].shape}.")
    if _agree(_Copy(*moving), _Copy(*fixed)):
        return linear_transform(np.eye(fixed[0].ndim + 1))
    side, scale = _side(fixed), 1.0
    if side < _SMALLEST:  # ITK's optimiser counts in mm
        larger = np.diag([100 / side] * fixed[0].ndim + [1])  # about a brain's
        grown = [(array, larger @ affine) for array, affine in (moving, fixed)]
        found = transform_affine(register_affine(grown[0], grown[1], transform))
        return linear_transform(np.linalg.inv(larger) @ found @ larger)
    images = _around_brain(*moving, margin=_MARGINS[0] * side), _around_brain(*fixed, margin=_MARGINS[1] * side)
    coarse = _coarsen(images[0], _COARSE * side), _coarsen(images[1], _COARSE * side)
    centre, kind = _centre(coarse[1]), "rigid"
    if transform == "affine":
        kind, scale = "similarity", _side(moving) / side
    poses = _best_poses(*coarse, scale)
    if _overlap(*coarse):
        poses.append(np.eye(len(centre) + 1))
    starts = [_transform(kind, pose, centre) for pose in poses]
    values = [_optimise(start, *coarse) for start in starts]
    result = _transform(transform, transform_affine(starts[int(np.argmin(values))]), centre)
    for size in _FINE:
        _optimise(result, _coarsen(images[0], size * side), _coarsen(images[1], size * side), share=0.25)
    return result
