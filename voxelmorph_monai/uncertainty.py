r"""How sure a probabilistic network is of a registration: samples of its posterior, and whether they can be believed.

The network predicts a normal distribution of velocities, :math:`q(v) = N(\mu, diag(\sigma^2))`, an approximation of the
posterior given the two scans (Dalca et al., MICCAI 2018). Each sample is integrated and applied like the mean itself.
What spreads is what the model leaves open, given its image noise and its smoothness prior, which somebody chose. It is
no error bar: a wrong affine alignment, scans unlike those of the training and other solutions are not in it.
The noise is independent from voxel to voxel of the velocity, so integration and interpolation average much of it away.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from voxelmorph_monai.files import atomic_folder, write_json
from voxelmorph_monai.networks import Registration
from voxelmorph_monai.preparation import Grid, grid_affine, rescale
from voxelmorph_monai.registration import (
    Image,
    Labels,
    RegistrationResult,
    check_output_folder,
    extended,
    load_network,
    network_input,
    register,
)
from voxelmorph_monai.spaces import read_image, read_labels, require_same_grid, save_image_like, warp_scan

__all__ = [
    "MEANING",
    "RunningVariance",
    "Uncertainty",
    "calibration_error",
    "estimate_uncertainty",
    "reliability",
    "uncertainty_files",
]

MEANING = (
    "sd_mm is the spread of the places that the model's approximate posterior gives a voxel in the moving scan, for "
    "this pair and these weights, given the image noise and the smoothness that the training assumed. It is not the "
    "error of the registration: a wrong alignment, unusual scans and other solutions are not in it."
)


class Uncertainty(NamedTuple):
    """What samples of the posterior say.

    Attributes:
        result: the registration by the mean velocity.
        sd_mm: ``(X, Y, Z)`` on the fixed grid: square root of the summed variances of the three coordinates of where a
            voxel's centre lies in the moving scan, mm.
        labels: values of the moving label map, background 0 first, ``(K,)``; None without one.
        counts: number of samples that carry each label to each voxel, ``(K, X, Y, Z)``; None without labels.
        num_samples: how many samples there were.
    """

    result: RegistrationResult
    sd_mm: NDArray[np.float32]
    labels: NDArray[Any] | None
    counts: NDArray[np.uint16] | None
    num_samples: int

    def most_probable(self) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """Label that most samples carry to each voxel (of equally many the smallest), and its probability."""
        assert self.labels is not None
        assert self.counts is not None
        confidence = self.counts.max(axis=0).astype(np.float32) / np.float32(self.num_samples)
        return self.labels[self.counts.argmax(axis=0)], confidence


class RunningVariance:
    """Mean and variance of arrays that come one by one and are not kept (Welford, Technometrics 1962).

    >>> spread = RunningVariance()
    >>> for value in (1.0, 2.0, 6.0):
    ...     spread.add(np.array([value]))
    >>> spread.mean.tolist(), spread.variance.tolist()
    ([3.0], [7.0])
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: NDArray[np.floating[Any]] = np.zeros(())
        self._squares: NDArray[np.floating[Any]] = np.zeros(())

    def add(self, values: NDArray[np.floating[Any]]) -> None:
        """Take one more array, of the same shape as the others."""
        self.count += 1
        before = values - self.mean
        self.mean = self.mean + before / self.count
        self._squares = self._squares + before * (values - self.mean)

    @property
    def variance(self) -> NDArray[np.floating[Any]]:
        """Variance so far, divided by n - 1."""
        return self._squares / (self.count - 1)


def _check(network: Registration, num_samples: int, seed: int) -> None:
    if network.network.log_variance is None:
        raise ValueError("network must be probabilistic (preset diffeomorphic), got another.")
    if not 2 <= num_samples <= 65535:
        raise ValueError(f"num_samples must be 2 to 65535, got {num_samples}.")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}.")


def _samples(network: Registration, pair: Tensor, num_samples: int, seed: int) -> Iterator[Tensor]:
    """Displacements ``(1, 3, *spatial)`` of sampled velocities, one by one; drawn on the CPU, alike on any device."""
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        found = network(pair)
        mean, deviation = found["dvf"], torch.exp(0.5 * found["log_variance"])
        for _ in range(num_samples):
            noise = torch.randn(mean.shape, generator=generator).to(mean)
            ddf = network.network.displacement(mean + deviation * noise)
            yield network.network.full(ddf, list(pair.shape[2:]))


def estimate_uncertainty(
    moving: Image,
    fixed: Image,
    network: Registration,
    *,
    moving_labels: Labels | None = None,
    num_samples: int = 50,
    seed: int = 0,
    space: str = "mni152",
    transform: str = "affine",
    grid: Grid | None = None,
    names: tuple[str, str] = ("moving", "fixed"),
) -> Uncertainty:
    """Register two scans as :func:`~voxelmorph_monai.registration.register` does, and sample the network's posterior.

    Memory does not grow with the number of samples; the label counts take 2 bytes a voxel and label.

    Args:
        moving: scan.
        fixed: scan.
        network: probabilistic, in evaluation mode.
        moving_labels: label map on the grid of the moving scan, to carry along with each sample (to the nearest voxel).
        num_samples: how many samples.
        seed: of the samples: the same seed gives the same ones.
        space: as in ``register``, like the others.
        transform: as in ``register``.
        grid: as in ``register``.
        names: as in ``register``.

    Raises:
        ValueError: a network without a variance, scans or options that cannot be used.
    """
    _check(network, num_samples, seed)
    result = register(moving, fixed, network=network, space=space, transform=transform, grid=grid, names=names)
    forward = result.forward
    assert result.grid is not None
    affine = grid_affine(result.grid, fixed if space == "fixed" else None)
    to_scans = np.asarray(forward.outer, np.float64), np.linalg.inv(forward.inner).astype(np.float64)
    scaled = (rescale(moving[0]), moving[1]), (rescale(fixed[0]), fixed[1])
    pair = network_input(scaled, to_scans, result.grid, affine).to(next(network.parameters()).device)
    labels = None if moving_labels is None else np.union1d([0], moving_labels[0]).astype(moving_labels[0].dtype)
    counts = None if labels is None else np.zeros((len(labels), *fixed[0].shape), np.uint16)
    spread = RunningVariance()
    for sample in _samples(network, pair, num_samples, seed):
        ddf = forward._replace(field=extended(sample, affine)).on_grid(fixed[0].shape, fixed[1])
        spread.add(np.tensordot(fixed[1][:3, :3].astype(np.float32), ddf, axes=1))
        if moving_labels is not None and labels is not None and counts is not None:
            place = np.searchsorted(labels, warp_scan(moving_labels, ddf, fixed[1], order=0))[None]
            np.put_along_axis(counts, place, np.take_along_axis(counts, place, 0) + np.uint16(1), 0)
    return Uncertainty(result, np.sqrt(spread.variance.sum(axis=0)).astype(np.float32), labels, counts, num_samples)


def reliability(confidence: NDArray[np.floating[Any]], correct: NDArray[np.bool_], num_bins: int = 10) -> pd.DataFrame:
    """Reliability diagram as a table: how often predictions of each confidence are right.

    Args:
        confidence: probability of each prediction, 0 to 1.
        correct: whether it is right, same shape.
        num_bins: intervals of equal width, closed above, as (0.9, 1]; 0 is in the first.

    Returns:
        A row for each bin that has predictions: ``up_to`` (its upper end), ``count``, mean ``confidence`` and
        ``accuracy``, the share that is right. Of a calibrated model the last two are equal.
    """
    bins = np.clip(np.ceil(confidence.ravel() * num_bins - 1e-6), 1, num_bins)  # k / n in float32 may lie above it
    frame = pd.DataFrame({"up_to": bins / num_bins, "confidence": confidence.ravel(), "accuracy": correct.ravel()})
    return (
        frame.astype(float)
        .groupby("up_to")
        .agg(count=("accuracy", "size"), confidence=("confidence", "mean"), accuracy=("accuracy", "mean"))
        .reset_index()
    )


def calibration_error(table: pd.DataFrame) -> float:
    r"""Expected calibration error of a :func:`reliability` table: :math:`\sum_b n_b |accuracy_b - confidence_b| / n`.

    0 for a calibrated model (Naeini et al., AAAI 2015; Guo et al., ICML 2017); NaN if there are no predictions.
    """
    if table.empty:
        return math.nan
    gaps = (table["accuracy"] - table["confidence"]).abs()
    return float(np.average(gaps, weights=table["count"]))


def _calibration(found: Uncertainty, fixed_labels: NDArray[Any]) -> dict[str, Any] | None:
    """Calibration of the most probable label, over the voxels that any sample carries a structure to; None of none."""
    assert found.counts is not None
    label, confidence = found.most_probable()
    counted = found.counts[0] < found.num_samples
    if not counted.any():
        return None
    table = reliability(confidence[counted], (label == fixed_labels)[counted])
    return {"expected_calibration_error": calibration_error(table), "reliability": table.to_dict("records")}


def uncertainty_files(
    moving: str | Path,
    fixed: str | Path,
    output: str | Path,
    *,
    weights: str | Path,
    preset: str = "diffeomorphic",
    device: str | None = None,
    moving_labels: str | Path | None = None,
    fixed_labels: str | Path | None = None,
    num_samples: int = 50,
    seed: int = 0,
    space: str = "mni152",
    transform: str = "affine",
    grid: Grid | None = None,
) -> dict[str, Any]:
    """Estimate the uncertainty of registering two files, and write it to the new folder ``output``, all or nothing.

    It gets, on the grid of the fixed scan, ``sd_mm.nii.gz``, the spread of the displacement; with moving labels
    ``label.nii.gz``, the most probable label, ``label_probability.nii.gz``, its probability, and
    ``probabilities/LABEL.nii.gz`` of each label; and ``summary.json``, with fixed labels the calibration, too, unless
    no sample carries a structure into the fixed grid.

    Returns:
        What is in ``summary.json``.
    """
    output = Path(output).absolute()
    inputs = [Path(path) for path in (moving, fixed, weights, moving_labels, fixed_labels) if path is not None]
    check_output_folder(output, inputs, (), overwrite=None)
    if fixed_labels is not None and moving_labels is None:
        raise ValueError("fixed_labels must come with moving_labels, which are carried to them, got none.")
    images = read_image(moving), read_image(fixed)
    given = [None if path is None else read_labels(path) for path in (moving_labels, fixed_labels)]
    for image, labels, path in zip(images, given, ((moving, moving_labels), (fixed, fixed_labels)), strict=True):
        if labels is not None:
            require_same_grid(image, labels, (str(path[0]), str(path[1])))
    found = estimate_uncertainty(
        *images,
        load_network(weights, preset, device=device),
        moving_labels=given[0],
        num_samples=num_samples,
        seed=seed,
        space=space,
        transform=transform,
        grid=grid,
        names=(str(moving), str(fixed)),
    )
    inside = found.sd_mm[images[1][0] > 0]
    summary = {
        "meaning": MEANING,
        "num_samples": num_samples,
        "seed": seed,
        "sd_mm": {"mean": float(inside.mean()), "median": float(np.median(inside)), "largest": float(inside.max())},
        "calibration": None if given[1] is None else _calibration(found, given[1][0]),
    }
    with atomic_folder(output) as folder:
        save_image_like(folder / "sd_mm.nii.gz", found.sd_mm, fixed)
        if found.labels is not None and found.counts is not None:
            label, probability = found.most_probable()
            save_image_like(folder / "label.nii.gz", label, fixed)
            save_image_like(folder / "label_probability.nii.gz", probability, fixed)
            (folder / "probabilities").mkdir()
            for value, count in zip(found.labels[1:], found.counts[1:], strict=True):
                share = count.astype(np.float32) / np.float32(num_samples)
                save_image_like(folder / "probabilities" / f"{value}.nii.gz", share, fixed)
        write_json(folder / "summary.json", summary)
    return summary
