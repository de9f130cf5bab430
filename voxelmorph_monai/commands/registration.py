"""Commands: register scans, one pair or many; look at the results."""

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
        help="common space: mni152 for brains and whole heads, both aligned to that template; fixed for scans of "
        "anything, moving aligned to fixed (default: %(default)s)",
    )
    group.add_argument(
        "--alignment",
        choices=ALIGNMENTS,
        default=DEFAULTS.alignment,
        help="alignment before the deformation; none if the headers align the scans (default: %(default)s)",
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
        help="scan to warp: NIfTI, MGZ, NRRD, MetaImage, DICOM file or folder",
    )
    group.add_argument("fixed", type=Path, nargs="?", metavar="FIXED", help="scan to warp it to")
    group.add_argument(
        "--moving-labels", type=Path, metavar="FILE", help="label map of the moving scan, warped with it"
    )
    group.add_argument(
        "--fixed-labels", type=Path, metavar="FILE", help="label map of the fixed scan, for the Dice before and after"
    )
    group.add_argument(
        "--moving-mask",
        type=Path,
        metavar="FILE",
        help="region of the moving scan to register, for example its brain (default: the whole scan)",
    )
    group.add_argument(
        "--fixed-mask",
        "--mask",
        type=Path,
        metavar="FILE",
        help="region of the fixed scan to register (default: the whole scan)",
    )
    group.add_argument(
        "--brain-extraction",
        choices=BRAIN_EXTRACTIONS,
        default=DEFAULTS.brain_extraction,
        help="auto finds the brain in whole heads (only with --space mni152, and if no mask is given); off uses scans "
        "as they are (default: %(default)s)",
    )
    group.add_argument(
        "--moving-series", type=int, metavar="N", help="number of the moving series, in a DICOM folder with several"
    )
    group.add_argument(
        "--fixed-series", type=int, metavar="N", help="number of the fixed series, in a DICOM folder with several"
    )
    _add_alignment_arguments(parser)
    add_grid_arguments(parser, fits=True, planar=True)
    group = parser.add_argument_group("network and refinement")
    group.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="weights of a network, or none to do without one (default: the bundled brain weights; none with "
        "--space fixed)",
    )
    group.add_argument("--preset", metavar="NAME", help="preset of the network (default: named beside the weights)")
    group.add_argument(
        "--refine",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="optimise the displacement on these two scans (default: --refine)",
    )
    group.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help=f"time limit of the refinement; inf: until nothing improves (default: {DEFAULTS.budget:g})",
    )
    group.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="refinement steps at each resolution, instead of a time, so that every run gives the same result",
    )
    group.add_argument(
        "--similarity",
        choices=SIMILARITIES,
        help="similarity that the refinement optimises: lncc for scans of one contrast, mi or mind for two contrasts, "
        f"for example T1 and T2 (default: {DEFAULTS.similarity})",
    )
    group.add_argument(
        "--smoothness",
        type=_smoothness,
        metavar="{low,default,high,MM}",
        help="smoothness of the refined displacement, by name or in mm; higher values let volumes change less from "
        "one place to the next (default: default; "
        + ", ".join(f"{name} {value:g} mm" for name, value in SMOOTHNESS.items())
        + f"; with --same-person {SAME_PERSON:g} mm)",
    )
    group.add_argument(
        "--symmetric",
        action="store_true",
        help="treat both scans alike, in twice the time; exchanging them gives the inverse map",
    )
    group.add_argument(
        "--same-person",
        action="store_true",
        help="two scans of one person: rigid alignment of the one to the other, no network unless --weights is given, "
        "and a displacement so smooth that only what has changed moves",
    )
    group.add_argument("--device", metavar="NAME", help="cpu or cuda (default: a GPU if there is one)")
    group = parser.add_argument_group("output")
    group.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder for the results")
    group.add_argument("--bids", action="store_true", help="name the files as BIDS derivatives of the moving scan")
    group.add_argument("--overwrite", action="store_true", help="replace an earlier registration in DIR")
    group.add_argument(
        "--report",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write report.html and report.png, to look at (default: --report)",
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
        help="table of pairs instead of MOVING and FIXED, with columns moving, fixed and, optionally, name, labels and "
        "masks; each pair gets a folder in DIR; the same command continues after an interruption",
    )
    group.add_argument(
        "--jobs", type=int, metavar="N", help="processes (default: as many as processors and memory allow)"
    )
    group.add_argument("--scheduler", metavar="ADDRESS", help="Dask cluster to run on, for example tcp://host:8786")


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
        print("neither weights nor refinement: the registration is affine only")
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
        raise ValueError("with --list, name the scans, labels and masks in the list; a series cannot be chosen there.")
    how: dict[str, Any] = {
        name: getattr(args, name) for name in ("jobs", "scheduler", "bids", "overwrite", "report", "show_face")
    }
    cohort = register_cohort(args.list, args.output, options=options, **how)
    for name, reason in list(cohort.errors.items())[:NUM_SHOWN]:
        print(f"vxm register: {name} failed: {reason}", file=sys.stderr)
    done = cohort.num_pairs - len(cohort.errors)
    print(f"{done} of {cohort.num_pairs} pairs are registered, {cohort.num_skipped} of them by an earlier call")
    print(f"{cohort.table}: what became of each")
    return 1 if cohort.errors else 0


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        type=Path,
        metavar="DIR",
        help="folder that vxm register --list, vxm segment, vxm prepare or an evaluation made",
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
    group.add_argument("moving", type=Path, metavar="MOVING", help="scan to warp, as for vxm register")
    group.add_argument("fixed", type=Path, metavar="FIXED", help="scan to warp it to")
    group.add_argument(
        "--moving-labels", type=Path, metavar="FILE", help="label map of the moving scan, warped with it"
    )
    group.add_argument(
        "--fixed-labels", type=Path, metavar="FILE", help="label map of the fixed scan, to check the calibration"
    )
    group.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder for the results")
    _add_alignment_arguments(parser)
    add_grid_arguments(parser, fits=True)
    group = parser.add_argument_group("network")
    group.add_argument("--weights", type=Path, required=True, metavar="FILE", help="weights of a probabilistic network")
    group.add_argument(
        "--preset", default="diffeomorphic", metavar="NAME", help="preset of the network (default: %(default)s)"
    )
    group.add_argument(
        "--samples", type=int, default=50, metavar="N", help="samples of the velocity (default: %(default)s)"
    )
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random seed of the samples (default: %(default)s)"
    )
    group.add_argument("--device", metavar="NAME", help="cpu or cuda (default: a GPU if there is one)")


def _uncertainty(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.uncertainty import uncertainty_files

    names = ("moving_labels", "fixed_labels", "weights", "preset", "device", "space", "alignment", "seed")
    options = {name: getattr(args, name) for name in names} | {"num_samples": args.samples, "grid": grid_of(args)}
    summary = uncertainty_files(args.moving, args.fixed, args.output, **options)
    print(f"{args.output}: sd_mm.nii.gz, in the fixed scan on average {summary['sd_mm']['mean']:.3f} mm")
    print(summary["meaning"])
    if summary["calibration"]:
        error = summary["calibration"]["expected_calibration_error"]
        print(f"expected calibration error of the labels {error:.3f}: 0 if a probability of 0.7 is right 7 times of 10")
    return 0


COMMANDS = {
    "register": Command(
        "register two scans: warped scan, transforms in both directions, a picture and a summary",
        "vxm register moving.nii.gz fixed.nii.gz --output registered",
        _add_register_arguments,
        _register,
    ),
    "report": Command(
        "write index.html for a folder of registrations: compare them, find outliers, accept and reject",
        "vxm report registered",
        _add_report_arguments,
        _index,
    ),
    "uncertainty": Command(
        "sample the posterior of a probabilistic network: spread of the displacement, label probabilities",
        "vxm uncertainty moving.nii.gz fixed.nii.gz --weights model.pt --output uncertainty --samples 50 --seed 0",
        _add_uncertainty_arguments,
        _uncertainty,
    ),
}
