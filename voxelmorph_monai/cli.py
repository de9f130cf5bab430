"""The command line ``vxm``.

The work is imported inside the functions that need it, here and nowhere else in the package: importing torch and ITK
takes seconds, which nobody should wait for ``vxm --help``.
"""

import argparse
import atexit
import os
import signal
import sys
import textwrap
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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

__all__ = ["main"]

_NUM_SHOWN = 10  # of the pairs of a list that failed


class _Command(NamedTuple):
    """A command: one line of help, an example, what it takes, what it does (the exit code)."""

    help: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _add_grid_arguments(parser: argparse.ArgumentParser, *, fits: bool = False, planar: bool = False) -> None:
    group = parser.add_argument_group("working grid")
    fixed = "; with --space fixed: a grid that fits the fixed scan" if fits else ""
    slices = " (two numbers for slices)" if planar else ""
    group.add_argument(
        "--size",
        nargs="+",
        type=int,
        metavar="N",
        help=f"voxels along left-right, superior-inferior, posterior-anterior{slices} (default: 160 192 224{fixed})",
    )
    group.add_argument("--spacing", type=float, metavar="MM", help="side of a voxel (default: 1.0)")


def _grid_of(args: argparse.Namespace) -> Any:
    """The grid that is asked for; None for the one that a registration takes by default."""
    from voxelmorph_monai.space.template import WorkingGrid

    given = {"size": args.size and tuple(args.size), "spacing": args.spacing}
    if args.size is None and hasattr(args, "space"):
        if args.spacing is None:
            return None
        if args.space == "fixed":
            raise ValueError("--spacing needs --size with --space fixed.")
    return WorkingGrid(**{key: value for key, value in given.items() if value is not None})


def _add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("input and output")
    group.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="folder of scans, or a scan (NIfTI, MGZ)")
    group.add_argument("output", type=Path, metavar="OUTPUT", help="new folder, or that of an earlier run to continue")
    group.add_argument(
        "--images",
        default="*.nii.gz",
        metavar="PATTERN",
        help="file names of the scans in a folder; * stands for the name of the scan (default: %(default)s)",
    )
    group.add_argument(
        "--labels",
        metavar="PATTERN",
        help="file name of the label map of each scan, with its name for * (default: none)",
    )
    group.add_argument(
        "--maps",
        action="store_true",
        help="paint images from label maps (with FreeSurfer's numbers) instead of reading scans",
    )
    _add_grid_arguments(parser)
    group = parser.add_argument_group("split")
    group.add_argument(
        "--split", type=Path, metavar="JSON", help="names of the scans by section (default: random split)"
    )
    group.add_argument(
        "--validation",
        type=float,
        default=0.1,
        metavar="FRACTION",
        help="fraction of the scans for validation (default: %(default)s)",
    )
    group.add_argument(
        "--test",
        type=float,
        default=0.1,
        metavar="FRACTION",
        help="fraction of the scans for the test (default: %(default)s)",
    )
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random seed of the split (default: %(default)s)"
    )
    group = parser.add_argument_group("computation")
    group.add_argument(
        "--jobs", type=int, metavar="N", help="processes (default: as many as processors and memory allow)"
    )


def _prepare(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.prepare import prepare

    options = {
        key: getattr(args, key) for key in ("images", "labels", "maps", "split", "validation", "test", "seed", "jobs")
    }
    prepared = prepare(args.inputs, args.output, grid=_grid_of(args), **options)
    for name, reason in sorted(prepared.errors.items()):
        print(f"vxm prepare: {name} failed: {reason}", file=sys.stderr)
    print(f"{prepared.datalist}\n{prepared.datalist.with_name('qc.png')}: look at it before you train")
    return 1 if prepared.errors else 0


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
        help="auto finds the brain in whole heads without a mask, with --space mni152; off takes scans as they are "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--moving-series", type=int, metavar="N", help="number of the moving series, in a DICOM folder with several"
    )
    group.add_argument(
        "--fixed-series", type=int, metavar="N", help="number of the fixed series, in a DICOM folder with several"
    )
    _add_alignment_arguments(parser)
    _add_grid_arguments(parser, fits=True, planar=True)
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
    from voxelmorph_monai.apps.register_files import register_files

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
    options = Options(**{name: getattr(args, name) for name in names}, **refinement, grid=_grid_of(args))
    if args.list is not None:
        return _register_list(args, options)
    if args.fixed is None or args.jobs is not None or args.scheduler is not None:
        raise ValueError("give two scans, or --list; --jobs and --scheduler apply only to --list.")
    inputs = ("moving_labels", "fixed_labels", "moving_mask", "fixed_mask", "moving_series", "fixed_series")
    files = {name: getattr(args, name) for name in inputs}
    saving = {name: getattr(args, name) for name in ("bids", "overwrite", "report", "show_face")}
    summary = register_files(args.moving, args.fixed, args.output, options=options, progress=True, **files, **saving)
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
        raise ValueError("scans, their series, labels and masks cannot be combined with --list.")
    how: dict[str, Any] = {
        name: getattr(args, name) for name in ("jobs", "scheduler", "bids", "overwrite", "report", "show_face")
    }
    cohort = register_cohort(args.list, args.output, options=options, **how)
    for name, reason in list(cohort.errors.items())[:_NUM_SHOWN]:
        print(f"vxm register: {name} failed: {reason}", file=sys.stderr)
    done = cohort.num_pairs - len(cohort.errors)
    print(f"{done} of {cohort.num_pairs} pairs are registered, {cohort.num_skipped} of them by an earlier call")
    print(f"{cohort.table}: what became of each")
    return 1 if cohort.errors else 0


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="folder of registrations, as vxm register --list makes it"
    )


def _index(args: argparse.Namespace) -> int:
    from voxelmorph_monai.pages.cohort import save_index

    entries = save_index(args.folder)
    flagged = sum(bool(entry.warnings or entry.odd) for entry in entries)
    failed = sum(bool(entry.failed) for entry in entries)
    print(f"{len(entries)} pairs, {failed} of them failed, {flagged} flagged")
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
    _add_grid_arguments(parser, fits=True)
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
    options = {name: getattr(args, name) for name in names} | {"num_samples": args.samples, "grid": _grid_of(args)}
    summary = uncertainty_files(args.moving, args.fixed, args.output, **options)
    print(f"{args.output}: sd_mm.nii.gz, in the fixed scan on average {summary['sd_mm']['mean']:.3f} mm")
    print(summary["meaning"])
    if summary["calibration"]:
        error = summary["calibration"]["expected_calibration_error"]
        print(f"expected calibration error of the labels {error:.3f}: 0 if a probability of 0.7 is right 7 times of 10")
    return 0


def _add_longitudinal_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("input and output")
    group.add_argument(
        "visits", nargs="+", type=Path, metavar="VISIT", help="scans of one person, in the order of time"
    )
    what = group.add_mutually_exclusive_group()
    what.add_argument("--labels", nargs="+", type=Path, metavar="FILE", help="label map of each visit")
    what.add_argument("--anatomy", action="store_true", help="label the visits as vxm segment does")
    group.add_argument(
        "--exclude", nargs="+", type=Path, metavar="FILE", help="mask of each visit with what is not compared"
    )
    group.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder for tables and maps")
    group.add_argument("--overwrite", action="store_true", help="replace an earlier result in DIR")
    group = parser.add_argument_group("computation")
    group.add_argument(
        "--steps",
        type=int,
        default=20,
        metavar="N",
        help="refinement steps at each resolution (default: %(default)s)",
    )
    group.add_argument(
        "--similarity",
        choices=SIMILARITIES,
        default="lncc",
        help="similarity that the refinement optimises (default: %(default)s)",
    )
    group.add_argument(
        "--spacing", type=float, metavar="MM", help="side of a voxel (default: that of the finest visit)"
    )
    group.add_argument(
        "--device", metavar="NAME", help="device for --anatomy, cpu or cuda (default: a GPU if there is one)"
    )


def _longitudinal(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.longitudinal import longitudinal_files

    names = ("labels", "anatomy", "device", "steps", "similarity", "spacing", "overwrite")
    options = {name: getattr(args, name) for name in names}
    for row in longitudinal_files(args.visits, args.output, excluded=args.exclude, **options):
        changes = [f"{value} %" for name, value in row.items() if name.startswith("change")]
        print(f"{row['structure']}: {row['ml_1']} ml, then {', '.join(changes)}")
    print(f"{args.output}: structures.csv, and maps of the local change")
    return 0


def _add_template_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("input and output")
    group.add_argument(
        "list", type=Path, metavar="CSV", help="table of scans, with columns image and, optionally, labels"
    )
    group.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="new folder, or that of an earlier call to continue"
    )
    group = parser.add_argument_group("computation")
    group.add_argument(
        "--start",
        choices=("scans", "mni152"),
        default="scans",
        help="what the scans are first aligned to: one of them, or MNI152 (default: %(default)s)",
    )
    group.add_argument(
        "--rounds", type=int, default=4, metavar="N", help="rounds of registration (default: %(default)s)"
    )
    group.add_argument(
        "--steps",
        type=int,
        default=20,
        metavar="N",
        help="refinement steps at each resolution (default: %(default)s)",
    )
    group.add_argument(
        "--similarity",
        choices=SIMILARITIES,
        default="lncc",
        help="similarity that the refinement optimises (default: %(default)s)",
    )
    group.add_argument("--spacing", type=float, metavar="MM", help="side of a voxel (default: that of the finest scan)")
    group.add_argument(
        "--jobs", type=int, metavar="N", help="processes (default: as many as processors and memory allow)"
    )
    group.add_argument("--scheduler", metavar="ADDRESS", help="Dask cluster to run on, for example tcp://host:8786")


def _template(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.template_building import build_template

    names = ("start", "rounds", "steps", "similarity", "spacing", "jobs", "scheduler")
    print(build_template(args.list, args.output, **{name: getattr(args, name) for name in names}))
    return 0


def _add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of an evaluation; the first is the reference"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder for tables and pictures")
    parser.add_argument(
        "--published", metavar="NAME", help="published results to show as well: ixi, lpba40 or oasis (default: none)"
    )
    parser.add_argument(
        "--common",
        action="store_true",
        help="compare only the pairs and structures that all runs share",
    )


def _compare(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.compare import compare_runs, published

    tables = published(args.published) if args.published else []
    found = compare_runs(args.runs, args.output, common=args.common)
    print(found.measures.to_string(float_format=lambda value: f"{value:.4g}", na_rep=""))
    print("difference to the first run, [low, high] its 95 % interval (Student), p by Wilcoxon, p_holm corrected")
    print(found.note or "", end="\n" if found.note else "")
    for table in tables:
        print(f"\n{table.title}\nsource: {table.source}\nmeasured by others, perhaps on other scans: no statistics")
        for method, numbers in table.methods.items():
            print(f"  {method:<18}" + ", ".join(f"{measure} {value}" for measure, value in numbers.items()))
    print(f"{args.output}: measures.csv, structures.csv, and a picture of each measure of structures")
    return 0


_ORDER = """\
transform files:
  .h5 .tfm .txt .mat  ITK, 3D Slicer, ANTs' GenericAffine
  .nii .nii.gz        displacement fields: ANTs' Warp, SPM's y_, NiftyReg's -def and -disp
  .lta                FreeSurfer, linear
  '[FILE,1]'          the inverse of the transform in FILE
Several transforms are given in ANTs' order: a point of the fixed image goes
through the first one first."""


def _file(text: str) -> Path:
    """A path of a file, or the beginning of its name; the slash of a folder would get lost in it."""
    if text.endswith(("/", os.sep)):
        raise argparse.ArgumentTypeError(f"'{text}' is a folder. Give a file, or the beginning of its name")
    return Path(text)


def _add_transforms(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "transforms", nargs="+", metavar="TRANSFORM", help="transform file; several in ANTs' order, see below"
    )
    parser.epilog = f"{_ORDER}\n\n{parser.epilog}"


def _add_saving_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--to",
        choices=("itk", "1007", "1006", "ants", "lta", "fsl"),
        help="format to write; lta is FreeSurfer's and linear (default: by the file name, 1007 for .nii and .nii.gz)",
    )
    parser.add_argument(
        "--reference", type=Path, metavar="FILE", help="fixed image, which gives a displacement its grid"
    )
    parser.add_argument("--moving", type=Path, metavar="FILE", help="moving image, needed for fsl and lta")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def _saving(args: argparse.Namespace) -> dict[str, Any]:
    """How to save a transform, known to be possible before it is worked out."""
    from voxelmorph_monai.maps.files import check_target

    inputs = [*args.transforms, *filter(None, (args.reference, args.moving))]
    check_target(args.output, args.to, args.overwrite, inputs)
    grids = {"grid": _grid(args.reference), "moving_grid": _grid(args.moving)}
    return {"form": args.to, "overwrite": args.overwrite, "inputs": inputs, **grids}


def _grid(path: Path | None) -> Any:
    from voxelmorph_monai.apps.apply import read_grid

    return None if path is None else read_grid(path)


def _report(residual: float) -> None:
    if residual:
        print(f"inverted numerically; the inverse misses by {residual:.2g} mm at most")


def _interpolation(text: str) -> str:
    """The name of an interpolation; the former word for that of labels is still understood."""
    if text != "label":
        return text
    print("vxm apply: --interpolation label is now called linear", file=sys.stderr)
    return "linear"


def _add_apply_arguments(parser: argparse.ArgumentParser) -> None:
    _add_transforms(parser)
    group = parser.add_argument_group("what to warp (one of them)")
    what = group.add_mutually_exclusive_group(required=True)
    what.add_argument("--image", type=Path, metavar="FILE", help="moving image, or a series of them (NIfTI)")
    what.add_argument("--labels", type=Path, metavar="FILE", help="label map of the moving image")
    what.add_argument(
        "--vectors",
        type=Path,
        metavar="FILE",
        help="moving image of vectors, three numbers per voxel, which are rotated",
    )
    what.add_argument("--points", type=Path, metavar="FILE", help="points (.csv, .fcsv, .mrk.json)")
    what.add_argument(
        "--surface", type=Path, metavar="FILE", help="surface (GIFTI, FreeSurfer, .vtk, .vtp, .stl, .ply)"
    )
    what.add_argument("--streamlines", type=Path, metavar="FILE", help="streamlines (.trk, .tck, .trx)")
    group.add_argument("--series", type=int, metavar="N", help="number of the series, in a DICOM folder with several")
    group = parser.add_argument_group("images and labels")
    group.add_argument(
        "--reference",
        type=Path,
        metavar="FILE",
        help="fixed image, which gives the output its grid; for a surface or streamlines, the image that they go to",
    )
    group.add_argument("--bvec", type=Path, metavar="FILE", help="gradients of a diffusion series, which are rotated")
    group.add_argument(
        "--reference-series",
        type=int,
        metavar="N",
        help="number of the reference's series, in a DICOM folder with several",
    )
    group.add_argument(
        "--interpolation",
        type=_interpolation,
        choices=("linear", "nearest", "bspline", "lanczos"),
        help="interpolation of images: any of these (default: linear); of labels: nearest, or linear for the label "
        "with the largest linearly interpolated weight (default: nearest)",
    )
    group = parser.add_argument_group("points, surfaces and streamlines")
    group.add_argument(
        "--points-of",
        choices=("fixed", "moving"),
        help="image that they were drawn in: points of the fixed image go to the moving one, along the "
        "transform; points of the moving image go to the fixed one, along its inverse",
    )
    group.add_argument(
        "--coordinates",
        choices=("RAS", "LPS", "tkr"),
        help="coordinate system, if a CSV file, surface or vectors do not state it; tkr is FreeSurfer's",
    )
    group.add_argument("--volume", type=Path, metavar="FILE", help="image that a FreeSurfer surface was made from")
    group = parser.add_argument_group("output")
    group.add_argument("--output", type=Path, required=True, metavar="FILE", help="file to write")
    group.add_argument("--overwrite", action="store_true", help="replace an existing output")


def _apply(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.apply import apply_to_image, apply_to_points
    from voxelmorph_monai.apps.apply_series import is_series

    if args.surface is not None or args.streamlines is not None:
        return _apply_to_shape(args)
    if args.vectors is not None or (args.image is not None and is_series(args.image)):
        return _apply_to_series(args)
    if args.bvec is not None:
        raise ValueError("--bvec needs a series of volumes as --image: a 4-D NIfTI file.")
    if args.volume is not None or args.coordinates == "tkr":
        raise ValueError("--volume and --coordinates tkr apply only to surfaces.")
    if args.points is None and (args.reference is None or args.points_of or args.coordinates):
        raise ValueError("an image or label map needs --reference, and takes no --points-of or --coordinates.")
    if args.points is not None and (args.points_of is None or args.reference or args.interpolation):
        raise ValueError("points need --points-of (fixed or moving), and take no --reference or --interpolation.")
    series = {"series": args.series, "reference_series": args.reference_series}
    if args.points is not None and any(number is not None for number in series.values()):
        raise ValueError("--series and --reference-series choose images; they cannot be combined with --points.")
    options: dict[str, Any] = {"overwrite": args.overwrite}
    if args.points is not None:
        residual = apply_to_points(
            args.transforms,
            args.points,
            args.output,
            drawn_in=args.points_of,
            coordinates=args.coordinates,
            **options,
        )
    else:
        kind, path = ("image", args.image) if args.image else ("labels", args.labels)
        options |= {"kind": kind, "interpolation": args.interpolation, **series}
        residual = apply_to_image(args.transforms, path, args.reference, args.output, **options)
    _report(residual)
    return 0


def _apply_to_series(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.apply_series import apply_to_series, apply_to_vectors

    if args.reference is None or args.points_of or args.volume or args.series is not None:
        raise ValueError("a series or vectors need --reference, and take no --points-of, --volume or --series.")
    options = {"interpolation": args.interpolation or "linear", "overwrite": args.overwrite}
    if args.vectors is not None:
        if args.bvec is not None or args.reference_series is not None:
            raise ValueError("vectors take neither --bvec nor --reference-series.")
        options |= {"coordinates": args.coordinates}
        residual = apply_to_vectors(args.transforms, args.vectors, args.reference, args.output, **options)
    else:
        options |= {"bvec": args.bvec, "reference_series": args.reference_series}
        residual = apply_to_series(args.transforms, args.image, args.reference, args.output, **options)
    _report(residual)
    return 0


def _apply_to_shape(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.apply_shapes import apply_to_streamlines, apply_to_surface

    if args.points_of is None or args.interpolation or args.series is not None or args.reference_series is not None:
        raise ValueError("surfaces and streamlines need --points-of, and take neither --interpolation nor a series.")
    options = {"made_from": args.points_of, "reference": args.reference, "overwrite": args.overwrite}
    if args.surface is not None:
        options |= {"coordinates": args.coordinates, "volume": args.volume}
        residual = apply_to_surface(args.transforms, args.surface, args.output, **options)
    else:
        if args.coordinates or args.volume:
            raise ValueError("streamlines are in scanner RAS: --coordinates and --volume apply only to surfaces.")
        residual = apply_to_streamlines(args.transforms, args.streamlines, args.output, **options)
    _report(residual)
    return 0


def _add_compose_arguments(parser: argparse.ArgumentParser) -> None:
    _add_transforms(parser)
    parser.add_argument("--output", type=_file, required=True, metavar="FILE", help="transform file to write")
    _add_saving_arguments(parser)


def _compose(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.apply import open_chain
    from voxelmorph_monai.maps.files import save_chain

    saving = _saving(args)
    transform, residual, spatial_dims = open_chain(args.transforms, args.reference, args.moving)
    save_chain(args.output, transform, spatial_dims=spatial_dims, **saving)
    _report(residual)
    return 0


def _invert(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.apply import open_chain
    from voxelmorph_monai.maps.chains import invert_transform
    from voxelmorph_monai.maps.files import save_chain

    saving = _saving(args)
    transform, missed, spatial_dims = open_chain(args.transforms, args.reference, args.moving)
    inverse, residual = invert_transform(transform)
    save_chain(args.output, inverse, spatial_dims=spatial_dims, **saving)
    _report(max(missed, residual))
    return 0


def _add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="INPUT", help="transform file, see below")
    parser.epilog = f"{_ORDER}\n\n{parser.epilog}"
    parser.add_argument(
        "output", type=_file, metavar="OUTPUT", help="file to write; with --to ants, prefix of two files"
    )
    parser.add_argument(
        "--from",
        dest="origin",
        choices=("fsl",),
        help="program that wrote INPUT, if it is FSL; give its -in as --moving and its -ref as --reference",
    )
    _add_saving_arguments(parser)


def _convert(args: argparse.Namespace) -> int:
    from voxelmorph_monai.maps.files import read_fsl_transform, save_chain

    args.transforms = [args.input]
    if args.origin is None:
        return _compose(args)
    if args.reference is None or args.moving is None:
        raise ValueError("an FSL transform needs both images (--reference and --moving).")
    saving = _saving(args)
    save_chain(args.output, read_fsl_transform(args.input, saving["grid"], saving["moving_grid"]), **saving)
    return 0


def _add_jacobian_arguments(parser: argparse.ArgumentParser) -> None:
    _add_transforms(parser)
    parser.add_argument(
        "--reference", type=Path, required=True, metavar="FILE", help="fixed image, which gives the grid"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="image to write")
    parser.add_argument("--log", action="store_true", help="write the natural logarithm of the determinant")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def _jacobian(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.apply import jacobian_file

    jacobian_file(args.transforms, args.reference, args.output, logarithm=args.log, overwrite=args.overwrite)
    return 0


def _add_segment_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "scans",
        nargs="*",
        type=Path,
        metavar="SCAN",
        help="scan of a head: NIfTI, MGZ, NRRD, MetaImage, DICOM file or folder; or several, or a folder of them",
    )
    parser.add_argument(
        "--list",
        type=Path,
        metavar="CSV",
        help="table of scans instead of SCAN, with the column scan and, optionally, name; several scans get a folder "
        "each in PATH, and one table of volumes; the same command continues after an interruption",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="PATH",
        help="new folder for labels, brain mask, brain, volumes and colours; or a NIfTI file for the labels only",
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="weights of the network (default: the bundled ones)"
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def _segment(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.segment import by_name, read_list, segment_file, segment_files

    how = {name: getattr(args, name) for name in ("weights", "device", "overwrite")}
    if bool(args.scans) == (args.list is not None):
        raise ValueError("give scans, or --list.")
    scans = by_name(args.scans) if args.list is None else read_list(args.list)
    if args.list is None and list(scans.values()) == args.scans and len(scans) == 1:
        segment_file(args.scans[0], args.output, **how)
        return 0
    done = segment_files(scans, args.output, **how)
    for name, reason in list(done.errors.items())[:_NUM_SHOWN]:
        print(f"vxm segment: {name} failed: {reason}", file=sys.stderr)
    good = len(scans) - len(done.errors)
    print(f"{good} of {len(scans)} scans are segmented, {done.num_skipped} of them by an earlier call")
    print(f"{done.table}: their volumes")
    return 1 if done.errors else 0


def _add_quickstart_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, default=Path("quickstart"), metavar="DIR", help="new folder (default: %(default)s)"
    )


def _quickstart(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.quickstart import quickstart

    quickstart(args.output)
    return 0


def _add_datalist_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "layout",
        metavar="LAYOUT",
        help="ixi, oasis (neurite-OASIS), learn2reg, lpba40, folder (with images/ and labels/) or csv",
    )
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="folder of the data set; for csv: table of scans or pairs"
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write, the dataset_dir of the bundle")
    parser.add_argument(
        "--folds", type=int, metavar="N", help="number of parts to split the scans into (default: as published, else 5)"
    )
    parser.add_argument(
        "--fold", type=int, default=0, metavar="K", help="part that is the test set (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random seed of the split (default: %(default)s)"
    )


def _datalist(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.datalists import write_datalist

    options = {"folds": args.folds, "fold": args.fold, "seed": args.seed}
    print(write_datalist(args.layout, args.source, args.output, **options))
    return 0


def _add_label_app_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", type=Path, metavar="DIR", help="new folder for the app")


def _label_app(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.label_propagation import copy_label_app

    copy_label_app(args.output)
    print(f"monailabel start_server --app {args.output} --studies STUDIES --host 127.0.0.1")
    return 0


def _add_import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="Keras file of the authors (.h5), or checkpoint of VxmDense (.pt)"
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="new file (.pt)")
    parser.add_argument("--xy", action="store_true", help="read a file of the authors' models/xy/, whose axes are x, y")


def _import_weights(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.import_weights import import_weights

    preset = import_weights(args.source, args.output, xy=args.xy)
    print(f"{args.output}: weights of preset {preset}, for intensities in [0, 1]")
    return 0


def _add_pack_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of the bundle")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder for the zip file, new or with other bundles"
    )
    parser.add_argument(
        "--url", default="", help="address that the folder will be published at, for model_info.json (default: none)"
    )


def _pack_bundle(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.pack_bundle import pack_bundle

    packed = pack_bundle(args.bundle, args.output, args.url)
    if packed.left_out:
        print(f"not part of a bundle, left out: {', '.join(packed.left_out)}")
    print(f"{packed.archive}: {len(packed.files)} files, entered in {args.output / 'model_info.json'}")
    return 0


def _add_atlas_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "scans",
        nargs="*",
        type=Path,
        metavar="IMAGE LABELS",
        help="skull-stripped T1 scan and its label map, for each atlas (default: MNI152 and its tissues)",
    )
    parser.add_argument("--names", type=Path, metavar="CSV", help="names of the labels, in columns number and name")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder for the bundle")
    parser.add_argument(
        "--license", type=Path, metavar="FILE", help="terms of the scans and labels, copied to the bundle"
    )


def _make_atlas_bundle(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.atlas_bundle import make_atlas_bundle

    if len(args.scans) % 2:
        raise ValueError(f"{len(args.scans)} files are not pairs of a scan and its labels. Give IMAGE LABELS for each.")
    atlases = list(zip(args.scans[::2], args.scans[1::2], strict=True))
    bundle = make_atlas_bundle(atlases, args.output, names=args.names, licence=args.license)
    print(f"{bundle}: read docs/README.md")
    return 0


_COMMANDS = {
    "prepare": _Command(
        "align T1 scans to MNI152, for training: one grid, one orientation, intensities from 0 to 1",
        "vxm prepare scans/ prepared/ --images '*_t1.nii.gz' --labels '*_labels.nii.gz'",
        _add_prepare_arguments,
        _prepare,
    ),
    "register": _Command(
        "register two scans: warped scan, transforms in both directions, a picture and a summary",
        "vxm register moving.nii.gz fixed.nii.gz --output registered",
        _add_register_arguments,
        _register,
    ),
    "report": _Command(
        "write index.html for a folder of registrations: compare them, find outliers, accept and reject",
        "vxm report registered",
        _add_report_arguments,
        _index,
    ),
    "apply": _Command(
        "apply transforms (ours, or those of ITK, ANTs, 3D Slicer, FreeSurfer) to an image, labels or points",
        "vxm apply registered/forward.h5 --image moving.nii.gz --reference fixed.nii.gz --output warped.nii.gz",
        _add_apply_arguments,
        _apply,
    ),
    "compose": _Command(
        "write several transforms as one",
        "vxm compose 1Warp.nii.gz 0GenericAffine.mat --output both.h5",
        _add_compose_arguments,
        _compose,
    ),
    "invert": _Command(
        "invert a transform: exactly if it is linear, numerically if it is a displacement field",
        "vxm invert displacement.nii.gz --output inverse.h5",
        _add_compose_arguments,
        _invert,
    ),
    "convert": _Command(
        "convert a transform to the format of ITK, ANTs, FSL or FreeSurfer, or to a NIfTI displacement field",
        "vxm convert forward.h5 displacement.nii.gz --reference fixed.nii.gz",
        _add_convert_arguments,
        _convert,
    ),
    "jacobian": _Command(
        "write the Jacobian determinant of a transform: the change of volume at each voxel of the fixed image",
        "vxm jacobian forward.h5 --reference fixed.nii.gz --output jacobian.nii.gz",
        _add_jacobian_arguments,
        _jacobian,
    ),
    "uncertainty": _Command(
        "sample the posterior of a probabilistic network: spread of the displacement, label probabilities",
        "vxm uncertainty moving.nii.gz fixed.nii.gz --weights model.pt --output uncertainty --samples 50 --seed 0",
        _add_uncertainty_arguments,
        _uncertainty,
    ),
    "longitudinal": _Command(
        "measure the change of volume between scans of one person, all visits treated alike",
        "vxm longitudinal baseline.nii.gz year1.nii.gz --output change --anatomy",
        _add_longitudinal_arguments,
        _longitudinal,
    ),
    "template": _Command(
        "build the template of a group of scans: their mean shape and mean intensity",
        "vxm template scans.csv --output template",
        _add_template_arguments,
        _template,
    ),
    "segment": _Command(
        "segment a head scan of any contrast: 29 structures and the brain mask",
        "vxm segment scan.nii.gz --output segmentation",
        _add_segment_arguments,
        _segment,
    ),
    "compare": _Command(
        "compare evaluations of the same pairs, with paired statistics and published results",
        "vxm compare training_a training_b --output comparison --published ixi",
        _add_compare_arguments,
        _compare,
    ),
    "datalist": _Command(
        "list a data set for training: IXI, OASIS, Learn2Reg, LPBA40, a folder, a table",
        "vxm datalist oasis neurite-oasis/ oasis/",
        _add_datalist_arguments,
        _datalist,
    ),
    "label-app": _Command(
        "copy the app for MONAI Label, which serves registration and labels to 3D Slicer and OHIF",
        "vxm label-app voxelmorph",
        _add_label_app_arguments,
        _label_app,
    ),
    "make-atlas-bundle": _Command(
        "make a MONAI bundle that segments skull-stripped T1 scans by labelled atlases",
        "vxm make-atlas-bundle a.nii.gz a_labels.nii.gz --names labels.csv --output bundles/my_atlas_segmentation",
        _add_atlas_arguments,
        _make_atlas_bundle,
    ),
    "import-weights": _Command(
        "import weights of the VoxelMorph authors: Keras files (CVPR 2018, MICCAI 2018), PyTorch's VxmDense",
        "vxm import-weights cvpr2018_vm2_cc.h5 vm2.pt",
        _add_import_arguments,
        _import_weights,
    ),
    "pack-bundle": _Command(
        "pack a bundle as the zip file that MONAI downloads, and enter it in model_info.json",
        "vxm pack-bundle bundles/brain_t1_registration --output release --url https://host/releases/download/v1",
        _add_pack_arguments,
        _pack_bundle,
    ),
    "quickstart": _Command(
        "register two brains that are included",
        "vxm quickstart --output quickstart",
        _add_quickstart_arguments,
        _quickstart,
    ),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vxm", description="Learned deformable registration of medical images.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.help,
            description=textwrap.fill(f"{command.help[0].upper()}{command.help[1:]}.", 80),
            epilog=f"example:\n  {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,  # an example in two lines could not be copied
        )
        command.add_arguments(sub)
    return parser


def _leave(codes: Sequence[int]) -> None:
    """End the process at once with the first of ``codes``, if there is one.

    It takes 0.8 s to take torch and the memory apart. And where a full disk cut a file short, HDF5 would crash when it
    closes it.
    """
    if codes:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(codes[0])


def _terminate(*_: object) -> None:
    """Let what is half done be removed, as after an interruption."""
    raise KeyboardInterrupt("SIGTERM")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``vxm`` with the given arguments (default: the process's); returns the exit code.

    0 success, 1 some of the work failed, 2 wrong input, 130 interrupted, 143 terminated.
    """
    if argv is not None:
        return _run(argv)
    from voxelmorph_monai.memory import keep_freed_memory
    from voxelmorph_monai.threads import wait_without_spinning

    codes: list[int] = []
    atexit.register(_leave, codes)  # what libraries register later is done before
    keep_freed_memory()
    wait_without_spinning()
    signal.signal(signal.SIGTERM, _terminate)
    codes.append(_run(sys.argv[1:]))
    return codes[0]


def _run(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    try:
        return _COMMANDS[args.command].run(args)
    except (ValueError, TypeError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error).__name__ != "OutOfMemoryError":  # torch's, of a GPU
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"vxm {args.command}: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"vxm {args.command}: {'terminated' if error.args else 'interrupted'}", file=sys.stderr)
        return 143 if error.args else 130


if __name__ == "__main__":
    sys.exit(main())
