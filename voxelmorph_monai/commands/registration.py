"""The commands ``register``, ``report`` and ``uncertainty``."""

import argparse
import sys
from argparse import SUPPRESS
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from voxelmorph_monai.apps.options import (
    ALIGNMENTS,
    BRAIN_EXTRACTIONS,
    DEFAULTS,
    SAME_PERSON,
    SIMILARITIES,
    SMOOTHNESS,
    SPACES,
    Options,
)
from voxelmorph_monai.commands.command import NUM_SHOWN, Command, add_grid_arguments, grid_of

__all__ = ["COMMANDS"]


def _add_alignment_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("alignment")
    group.add_argument(
        "--space",
        choices=SPACES,
        default=DEFAULTS.space,
        help="space to align the scans in: mni152 for brains and whole heads, which are both aligned to that template; "
        "fixed for any other scans, where moving is aligned to fixed (default: %(default)s)",
    )
    group.add_argument(
        "--alignment",
        choices=ALIGNMENTS,
        default=DEFAULTS.alignment,
        help="alignment before the deformation; none if the headers already align the scans (default: %(default)s)",
    )
    group.add_argument("--transform", dest="alignment", choices=ALIGNMENTS, default=SUPPRESS, help=SUPPRESS)


def _smoothness(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _add_register_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("input")
    group.add_argument(
        "moving",
        type=Path,
        nargs="?",
        metavar="MOVING",
        help="scan to warp (NIfTI, MGZ, NRRD, MetaImage, DICOM file or folder)",
    )
    group.add_argument("fixed", type=Path, nargs="?", metavar="FIXED", help="scan that MOVING is warped to")
    group.add_argument(
        "--moving-labels", type=Path, metavar="FILE", help="label map of the moving scan, which is warped as well"
    )
    group.add_argument(
        "--fixed-labels",
        type=Path,
        metavar="FILE",
        help="label map of the fixed scan; together with --moving-labels it gives the Dice overlap before and after",
    )
    group.add_argument(
        "--moving-mask",
        type=Path,
        metavar="FILE",
        help="mask of the region to register in the moving scan, for example its brain (default: the whole scan)",
    )
    group.add_argument(
        "--fixed-mask",
        "--mask",
        type=Path,
        metavar="FILE",
        help="mask of the region to register in the fixed scan (default: the whole scan)",
    )
    group.add_argument(
        "--brain-extraction",
        choices=BRAIN_EXTRACTIONS,
        default=DEFAULTS.brain_extraction,
        help="brain extraction: auto finds the brain in whole heads, with --space mni152 and without a mask; off uses "
        "the scans as they are (default: %(default)s)",
    )
    group.add_argument(
        "--moving-series", type=int, metavar="N", help="number of the DICOM series to use if MOVING holds several"
    )
    group.add_argument(
        "--fixed-series", type=int, metavar="N", help="number of the DICOM series to use if FIXED holds several"
    )
    _add_alignment_arguments(parser)
    add_grid_arguments(parser, fits=True, planar=True)
    group = parser.add_argument_group("network and refinement")
    group.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="weights of a network, or none to register without a network (default: the bundled brain weights; none "
        "with --space fixed or --same-person)",
    )
    group.add_argument(
        "--preset",
        metavar="NAME",
        help="architecture of the network (default: the one in the .json file beside the weights, or wide)",
    )
    group.add_argument(
        "--refine",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="improve the displacement by optimising it for these two scans (default: --refine)",
    )
    group.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="time limit of the refinement in seconds; inf continues until nothing improves (default: "
        f"{DEFAULTS.budget:g})",
    )
    group.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="number of refinement steps at each resolution; it replaces the time limit, so that every run gives the "
        "same result (default: as many as --budget allows)",
    )
    group.add_argument(
        "--similarity",
        choices=SIMILARITIES,
        help="similarity measure to optimise: lncc for scans of the same contrast, mi or mind for different contrasts, "
        f"for example T1 and T2 (default: {DEFAULTS.similarity})",
    )
    group.add_argument(
        "--smoothness",
        type=_smoothness,
        metavar="{low,default,high,MM}",
        help="smoothness of the refined displacement, by name or in mm; the higher the value, the less volume changes "
        "vary from place to place (default: default; "
        + ", ".join(f"{name} {value:g} mm" for name, value in SMOOTHNESS.items())
        + f"; with --same-person {SAME_PERSON:g} mm)",
    )
    group.add_argument(
        "--symmetric",
        action="store_true",
        help="treat both scans alike, so that exchanging them gives the inverse transform; takes twice the time",
    )
    group.add_argument(
        "--same-person",
        action="store_true",
        help="settings for two scans of one person: rigid alignment, a very smooth displacement that shows only real "
        "changes, and no network unless --weights is given",
    )
    group.add_argument("--device", metavar="NAME", help="device: cpu or cuda (default: a GPU if there is one)")
    group = parser.add_argument_group("output")
    group.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder for the results")
    group.add_argument("--bids", action="store_true", help="name the files as BIDS derivatives of the moving scan")
    group.add_argument("--overwrite", action="store_true", help="replace an earlier registration in DIR")
    group.add_argument(
        "--report",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write report.html and report.png for visual inspection (default: --report)",
    )
    group.add_argument(
        "--show-face",
        action="store_true",
        help="show the faces of whole heads in the report (default: hidden)",
    )
    group = parser.add_argument_group("cohort")
    group.add_argument(
        "--list",
        type=Path,
        metavar="CSV",
        help="table of pairs to register instead of MOVING and FIXED, with the columns moving, fixed and, optionally, "
        "name, moving_labels, fixed_labels, moving_mask and fixed_mask; each pair gets its own folder in DIR, and the "
        "same command continues after an interruption",
    )
    group.add_argument(
        "--jobs", type=int, metavar="N", help="number of processes (default: as many as processors and memory allow)"
    )
    group.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="address of a Dask cluster to run on, for example tcp://host:8786 (default: this machine)",
    )


def _register(args: argparse.Namespace) -> int:
    refinement = {name: getattr(args, name) for name in ("budget", "steps", "similarity", "smoothness")}
    refinement = {name: value for name, value in refinement.items() if value is not None}
    if not args.refine and refinement:
        raise ValueError(
            "--budget, --steps, --similarity and --smoothness configure the refinement; they cannot be combined with "
            "--no-refine."
        )
    names = (
        "weights",
        "preset",
        "device",
        "refine",
        "space",
        "alignment",
        "brain_extraction",
        "symmetric",
        "same_person",
    )
    options = Options(**{name: getattr(args, name) for name in names}, **refinement, grid=grid_of(args))
    if args.list is not None:
        return _register_list(args, options)
    if args.fixed is None or args.jobs is not None or args.scheduler is not None:
        raise ValueError("give two scans, or --list; --jobs and --scheduler apply only to --list.")
    from voxelmorph_monai.drawing import beside

    inputs = ("moving_labels", "fixed_labels", "moving_mask", "fixed_mask", "moving_series", "fixed_series")
    files = {name: getattr(args, name) for name in inputs}
    saving = {name: getattr(args, name) for name in ("bids", "overwrite", "report", "show_face")}
    with beside() if args.report else nullcontext():  # before torch is imported
        from voxelmorph_monai.apps.register_files import register_files

        summary = register_files(
            args.moving, args.fixed, args.output, options=options, progress=True, **files, **saving
        )
    for note in summary.get("notes", []):
        print(f"note: {note}")
    if summary["options"]["preset"] is None and not options.refines:
        print("the scans were only aligned, as neither a network nor the refinement was used")
    print(f"correlation {summary['correlation_before']:.3f} -> {summary['correlation_after']:.3f}")
    if summary["dice"]:
        print(f"mean Dice {summary['dice']['before']['mean']:.3f} -> {summary['dice']['after']['mean']:.3f}")
    for warning in summary.get("warnings", []):
        print(f"vxm register: look closely: {warning['text']}", file=sys.stderr)
    print(f"{args.output}" + (": look at report.html" if args.report else ""))
    return 0


def _register_list(args: argparse.Namespace, options: Options) -> int:
    from voxelmorph_monai.apps.cohort import register_cohort

    files = ("moving", "moving_labels", "fixed_labels", "moving_mask", "fixed_mask", "moving_series", "fixed_series")
    if any(getattr(args, name) is not None for name in files):
        raise ValueError(
            "with --list, the scans, labels and masks are named in the list, and a DICOM series cannot be chosen. "
            "Remove them from the command line."
        )
    how: dict[str, Any] = {
        name: getattr(args, name) for name in ("jobs", "scheduler", "bids", "overwrite", "report", "show_face")
    }
    cohort = register_cohort(args.list, args.output, options=options, **how)
    for name, reason in list(cohort.errors.items())[:NUM_SHOWN]:
        print(f"vxm register: {name} failed: {reason}", file=sys.stderr)
    done = cohort.num_pairs - len(cohort.errors)
    print(f"{done} of {cohort.num_pairs} pairs are registered, {cohort.num_skipped} of them by an earlier call")
    print(f"{cohort.table}: status and measures of each pair")
    return 1 if cohort.errors else 0


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        type=Path,
        metavar="DIR",
        help="folder written by vxm register --list, vxm segment (of several scans), vxm prepare or an evaluation",
    )


def _index(args: argparse.Namespace) -> int:
    from voxelmorph_monai.pages.cohort import save_index

    index = save_index(args.folder)
    flagged = sum(bool(entry.warnings or entry.odd) for entry in index.entries)
    failed = sum(bool(entry.failed) for entry in index.entries)
    print(f"{len(index.entries)} {index.kind.many}, {failed} of them failed, {flagged} flagged")
    print(f"{args.folder / 'index.html'}: look at it in a browser")
    return 0


def _add_uncertainty_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("input and output")
    group.add_argument("moving", type=Path, metavar="MOVING", help="scan to warp, in any format of vxm register")
    group.add_argument("fixed", type=Path, metavar="FIXED", help="scan that MOVING is warped to")
    group.add_argument(
        "--moving-labels", type=Path, metavar="FILE", help="label map of the moving scan, to warp with every sample"
    )
    group.add_argument(
        "--fixed-labels", type=Path, metavar="FILE", help="label map of the fixed scan, to test the label probabilities"
    )
    group.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder for the results")
    _add_alignment_arguments(parser)
    add_grid_arguments(parser, fits=True)
    group = parser.add_argument_group("network")
    group.add_argument("--weights", type=Path, required=True, metavar="FILE", help="weights of a probabilistic network")
    group.add_argument(
        "--preset", default="diffeomorphic", metavar="NAME", help="architecture of the network (default: %(default)s)"
    )
    group.add_argument(
        "--samples", type=int, default=50, metavar="N", help="number of sampled deformations (default: %(default)s)"
    )
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random seed of the samples (default: %(default)s)"
    )
    group.add_argument("--device", metavar="NAME", help="device: cpu or cuda (default: a GPU if there is one)")


def _uncertainty(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.uncertainty import uncertainty_files

    names = ("weights", "preset", "device", "space", "alignment")
    options = Options(**{name: getattr(args, name) for name in names}, grid=grid_of(args))
    summary = uncertainty_files(
        args.moving,
        args.fixed,
        args.output,
        options=options,
        moving_labels=args.moving_labels,
        fixed_labels=args.fixed_labels,
        num_samples=args.samples,
        seed=args.seed,
        progress=True,
    )
    print(f"{args.output}: sd_mm.nii.gz, {summary['sd_mm']['mean']:.3f} mm on average in the fixed scan")
    print(summary["meaning"])
    if summary["calibration"]:
        error = summary["calibration"]["expected_calibration_error"]
        print(f"expected calibration error of the label probabilities: {error:.3f} (0 is perfect)")
    return 0


COMMANDS = {
    "register": Command(
        "register two scans, or a list of pairs: warped scan, transforms in both directions, report and summary",
        "vxm register moving.nii.gz fixed.nii.gz --output registered",
        _add_register_arguments,
        _register,
    ),
    "report": Command(
        "write a page (index.html) to compare the results in a folder, find outliers, and accept or reject each result",
        "vxm report registered",
        _add_report_arguments,
        _index,
    ),
    "uncertainty": Command(
        "estimate the uncertainty of a registration by a probabilistic network",
        "vxm uncertainty moving.nii.gz fixed.nii.gz --weights model.pt --output uncertainty --samples 50 --seed 0",
        _add_uncertainty_arguments,
        _uncertainty,
    ),
}
