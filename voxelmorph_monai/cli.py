"""The command line ``vxm``.

The work is imported inside the functions that need it, here and nowhere else in the package: importing torch and ITK
takes seconds, which nobody should wait for ``vxm --help``.
"""

import argparse
import atexit
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["main"]

_NUM_SHOWN = 10  # of the pairs of a list that failed


class _Command(NamedTuple):
    """A command: one line of help, an example, what it takes, what it does (the exit code)."""

    help: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _add_grid_arguments(parser: argparse.ArgumentParser, *, fits: bool = False, planar: bool = False) -> None:
    fixed = "; with --space fixed what fits the fixed scan, which --size changes" if fits else ""
    slices = "; two for 2-D" if planar else ""
    parser.add_argument("--size", nargs="+", type=int, help=f"voxels along L-R, I-S, A-P{slices} (160 192 224{fixed})")
    parser.add_argument("--spacing", type=float, metavar="MM", help="side of a voxel (1.0)")


def _grid_of(args: argparse.Namespace) -> Any:
    """The grid that is asked for; None for the one that fits."""
    from voxelmorph_monai.preparation import Grid

    given = {"size": args.size and tuple(args.size), "spacing": args.spacing}
    if args.size is None and getattr(args, "space", None) == "fixed":
        if args.spacing is not None:
            raise ValueError("--spacing with --space fixed must come with --size.")
        return None
    return Grid(**{key: value for key, value in given.items() if value is not None})


def _add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", type=Path, help="folders of scans, or scans (NIfTI, MGZ)")
    parser.add_argument("output", type=Path, help="folder to write, new or of an earlier run")
    parser.add_argument(
        "--images", default="*.nii.gz", metavar="PATTERN", help="scans in a folder; * is the name (%(default)s)"
    )
    parser.add_argument("--labels", metavar="PATTERN", help="labels of the scan with that name (default: none)")
    parser.add_argument("--maps", action="store_true", help="the inputs are label maps (FreeSurfer's): paint images")
    _add_grid_arguments(parser)
    parser.add_argument("--split", type=Path, metavar="JSON", help="names of scans by section (default: drawn)")
    parser.add_argument("--validation", type=float, default=0.1, metavar="SHARE", help="drawn (%(default)s)")
    parser.add_argument("--test", type=float, default=0.1, metavar="SHARE", help="drawn (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (%(default)s)")
    parser.add_argument("--jobs", type=int, help="processes (default: by processors and memory)")


def _prepare(args: argparse.Namespace) -> int:
    from voxelmorph_monai.preparation import prepare

    options = {
        key: getattr(args, key) for key in ("images", "labels", "maps", "split", "validation", "test", "seed", "jobs")
    }
    prepared = prepare(args.inputs, args.output, grid=_grid_of(args), **options)
    for name, reason in sorted(prepared.errors.items()):
        print(f"vxm prepare: {name} failed: {reason}", file=sys.stderr)
    print(f"{prepared.datalist}\n{prepared.datalist.with_name('qc.png')}: look at it before you train")
    return 1 if prepared.errors else 0


def _add_alignment_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--space",
        choices=("mni152", "fixed"),
        default="mni152",
        help="align both to MNI152 (skull-stripped brains), or moving to fixed (anything) (%(default)s)",
    )
    parser.add_argument(
        "--transform", choices=("affine", "rigid", "none"), default="affine", help="to align with (%(default)s)"
    )


def _add_register_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "moving", type=Path, nargs="?", help="scan to warp (NIfTI, MGZ, NRRD, MHA, folder of a DICOM series)"
    )
    parser.add_argument("fixed", type=Path, nargs="?", help="scan to warp it to")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write, new")
    parser.add_argument(
        "--list",
        type=Path,
        metavar="CSV",
        help="instead of two scans: pairs, in columns moving, fixed and maybe name, and labels and masks as below; "
        "each gets a folder in DIR; repeat the command to go on after an interruption",
    )
    parser.add_argument("--jobs", type=int, help="of a list: processes (default: by processors and memory)")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="of a list: Dask cluster to run on, as tcp://host:8786")
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="of a network, or 'none' (default: those of the bundle; with --space fixed none, they know brains alone)",
    )
    parser.add_argument("--preset", default="wide", metavar="NAME", help="of the network (%(default)s)")
    parser.add_argument(
        "--refine",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="then optimise the displacement on the two scans (the default)",
    )
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="of refinement; inf: until nothing improves (30)"
    )
    parser.add_argument(
        "--similarity",
        choices=("lncc", "mi", "mind"),
        help="to refine by: lncc for scans of one contrast, mi or mind for two, as T1 and T2 (lncc)",
    )
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda (default: a GPU if there is one)")
    _add_alignment_arguments(parser)
    parser.add_argument("--moving-labels", type=Path, metavar="FILE", help="label map to warp too")
    parser.add_argument("--fixed-labels", type=Path, metavar="FILE", help="with moving labels: report the Dice")
    parser.add_argument("--moving-mask", type=Path, metavar="FILE", help="register only what lies in it, as of a brain")
    parser.add_argument("--fixed-mask", "--mask", type=Path, metavar="FILE", help="the same of the fixed scan")
    _add_grid_arguments(parser, fits=True, planar=True)
    parser.add_argument("--bids", action="store_true", help="name the files as BIDS derivatives of the moving scan")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier registration in DIR")


def _register(args: argparse.Namespace) -> int:
    from voxelmorph_monai.registration import register_files, shipped_weights

    if not args.refine and (args.budget is not None or args.similarity is not None):
        raise ValueError("--budget and --similarity are of the refinement, they must not come with --no-refine.")
    budget = 0.0 if not args.refine else 30.0 if args.budget is None else args.budget
    weights = None if args.weights == Path("none") else args.weights
    if args.weights is None and args.space == "mni152":
        weights = shipped_weights()
    names = ("preset", "device", "space", "transform", "bids", "overwrite")
    options = {name: getattr(args, name) for name in names} | {
        "weights": weights,
        "budget": budget,
        "similarity": args.similarity or "lncc",
        "grid": _grid_of(args),
    }
    if args.list is not None:
        return _register_list(args, options)
    if args.fixed is None or args.jobs is not None or args.scheduler is not None:
        raise ValueError("two scans, without --jobs and --scheduler, or a --list must be given.")
    files = {name: getattr(args, name) for name in ("moving_labels", "fixed_labels", "moving_mask", "fixed_mask")}
    summary = register_files(args.moving, args.fixed, args.output, **files, **options, progress=True)
    if weights is None and not budget:
        print("neither weights nor refinement: the registration is affine only")
    print(f"correlation {summary['similarity_before']:.3f} -> {summary['similarity_after']:.3f}")
    if summary["dice"]:
        print(f"mean Dice {summary['dice']['before']['mean']:.3f} -> {summary['dice']['after']['mean']:.3f}")
    print(f"{args.output}: look at report.png")
    return 0


def _register_list(args: argparse.Namespace, options: dict[str, Any]) -> int:
    from voxelmorph_monai.cohort import register_cohort

    files = ("moving", "moving_labels", "fixed_labels", "moving_mask", "fixed_mask")
    if any(getattr(args, name) is not None for name in files):
        raise ValueError("scans, labels and masks must be named in the --list, or be given without one.")
    cohort = register_cohort(args.list, args.output, jobs=args.jobs, scheduler=args.scheduler, **options)
    for name, reason in list(cohort.errors.items())[:_NUM_SHOWN]:
        print(f"vxm register: {name} failed: {reason}", file=sys.stderr)
    done = cohort.num_pairs - len(cohort.errors)
    print(f"{done} of {cohort.num_pairs} pairs are registered, {cohort.num_skipped} of them by an earlier call")
    print(f"{cohort.table}: what became of each")
    return 1 if cohort.errors else 0


def _add_uncertainty_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("moving", type=Path, help="scan to warp, as of vxm register")
    parser.add_argument("fixed", type=Path, help="scan to warp it to")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write, new")
    parser.add_argument("--weights", type=Path, required=True, metavar="FILE", help="of a probabilistic network")
    parser.add_argument("--preset", default="diffeomorphic", metavar="NAME", help="of the network (%(default)s)")
    parser.add_argument("--samples", type=int, default=50, metavar="N", help="of the velocity (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (%(default)s)")
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda (default: a GPU if there is one)")
    _add_alignment_arguments(parser)
    parser.add_argument("--moving-labels", type=Path, metavar="FILE", help="label map to carry along")
    parser.add_argument("--fixed-labels", type=Path, metavar="FILE", help="with moving labels: check the calibration")
    _add_grid_arguments(parser, fits=True)


def _uncertainty(args: argparse.Namespace) -> int:
    from voxelmorph_monai.uncertainty import uncertainty_files

    names = ("moving_labels", "fixed_labels", "weights", "preset", "device", "space", "transform", "seed")
    options = {name: getattr(args, name) for name in names} | {"num_samples": args.samples, "grid": _grid_of(args)}
    summary = uncertainty_files(args.moving, args.fixed, args.output, **options)
    print(f"{args.output}: sd_mm.nii.gz, in the fixed scan on average {summary['sd_mm']['mean']:.3f} mm")
    print(summary["meaning"])
    if summary["calibration"]:
        error = summary["calibration"]["expected_calibration_error"]
        print(f"expected calibration error of the labels {error:.3f}: 0 if a probability of 0.7 is right 7 times of 10")
    return 0


def _add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of evaluations, the reference first")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write, new")
    parser.add_argument("--published", metavar="NAME", help="show the literature's tables too: ixi, lpba40 or oasis")
    parser.add_argument("--common", action="store_true", help="compare what all share of different pairs or structures")


def _compare(args: argparse.Namespace) -> int:
    from voxelmorph_monai.comparison import compare_runs, published

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


_ORDER = (
    "TRANSFORM is an ITK transform (.h5, .tfm, .txt, .mat; ANTs' GenericAffine), a displacement (.nii, .nii.gz of "
    "intent 1006 or 1007; ANTs' Warp) or FreeSurfer's .lta, or '[FILE,1]' for the inverse of what is in FILE. Several "
    "are listed as for ANTs: a point of the fixed image goes through the first one first."
)


def _file(text: str) -> Path:
    """A path of a file, or the beginning of its name; the slash of a folder would get lost in it."""
    if text.endswith(("/", os.sep)):
        raise argparse.ArgumentTypeError(f"'{text}' must be a file, or the beginning of its name, not a folder")
    return Path(text)


def _add_transforms(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("transforms", nargs="+", metavar="TRANSFORM", help="in ANTs' order, see below")
    parser.epilog = f"{_ORDER} {parser.epilog}"


def _add_saving_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--to",
        choices=("itk", "1007", "1006", "ants", "lta", "fsl"),
        help="format (default: by the ending, 1007 for .nii, .nii.gz); lta is FreeSurfer's, linear",
    )
    parser.add_argument("--reference", type=Path, metavar="FILE", help="fixed image, for the grid of a displacement")
    parser.add_argument("--moving", type=Path, metavar="FILE", help="moving image, which fsl and lta need too")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")


def _saving(args: argparse.Namespace) -> dict[str, Any]:
    """How to save a transform, known to be possible before it is worked out."""
    from voxelmorph_monai.transform_files import check_target

    inputs = [*args.transforms, *filter(None, (args.reference, args.moving))]
    check_target(args.output, args.to, args.overwrite, inputs)
    grids = {"grid": _grid(args.reference), "moving_grid": _grid(args.moving)}
    return {"form": args.to, "overwrite": args.overwrite, "inputs": inputs, **grids}


def _grid(path: Path | None) -> Any:
    from voxelmorph_monai.apply import read_grid

    return None if path is None else read_grid(path)


def _report(residual: float) -> None:
    if residual:
        print(f"inverted numerically; the inverse misses by {residual:.2g} mm at most")


def _add_apply_arguments(parser: argparse.ArgumentParser) -> None:
    _add_transforms(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--image", type=Path, metavar="FILE", help="moving image to pull onto the reference")
    what.add_argument("--labels", type=Path, metavar="FILE", help="moving label map to pull onto the reference")
    what.add_argument("--points", type=Path, metavar="FILE", help="points to take along: .csv, .fcsv, .mrk.json")
    parser.add_argument("--reference", type=Path, metavar="FILE", help="fixed image, whose grid the output gets")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="file to write")
    parser.add_argument(
        "--interpolation",
        choices=("linear", "nearest", "bspline", "lanczos", "label"),
        help="of an image (linear, or the others but label), of labels (label: linear for each; or nearest)",
    )
    parser.add_argument(
        "--points-of",
        choices=("fixed", "moving"),
        help="where the points were drawn: those of the fixed image go to the moving one, along the transform; those "
        "of the moving image go to the fixed one, as the image does, by the inverse",
    )
    parser.add_argument("--coordinates", choices=("RAS", "LPS"), help="of points in a CSV file, which does not tell")
    parser.add_argument("--overwrite", action="store_true", help="replace the output")


def _apply(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apply import pull_file, take_points

    if args.points is None and (args.reference is None or args.points_of or args.coordinates):
        raise ValueError("an image or label map must come with --reference, and without --points-of or --coordinates.")
    if args.points is not None and (args.points_of is None or args.reference or args.interpolation):
        raise ValueError("points must come with --points-of (fixed or moving), without --reference or --interpolation.")
    options: dict[str, Any] = {"overwrite": args.overwrite}
    if args.points is not None:
        residual = take_points(
            args.transforms,
            args.points,
            args.output,
            drawn_in=args.points_of,
            coordinates=args.coordinates,
            **options,
        )
    else:
        kind, path = ("image", args.image) if args.image else ("labels", args.labels)
        options |= {"kind": kind, "interpolation": args.interpolation}
        residual = pull_file(args.transforms, path, args.reference, args.output, **options)
    _report(residual)
    return 0


def _add_compose_arguments(parser: argparse.ArgumentParser) -> None:
    _add_transforms(parser)
    parser.add_argument("--output", type=_file, required=True, metavar="FILE", help="transform to write")
    _add_saving_arguments(parser)


def _compose(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apply import open_chain
    from voxelmorph_monai.transform_files import save_chain

    saving = _saving(args)
    transform, residual, spatial_dims = open_chain(args.transforms, args.reference, args.moving)
    save_chain(args.output, transform, spatial_dims=spatial_dims, **saving)
    _report(residual)
    return 0


def _invert(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apply import open_chain
    from voxelmorph_monai.chains import invert_transform
    from voxelmorph_monai.transform_files import save_chain

    saving = _saving(args)
    transform, missed, spatial_dims = open_chain(args.transforms, args.reference, args.moving)
    inverse, residual = invert_transform(transform)
    save_chain(args.output, inverse, spatial_dims=spatial_dims, **saving)
    _report(max(missed, residual))
    return 0


def _add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="INPUT", help="transform, see below")
    parser.epilog = f"{_ORDER} {parser.epilog}"
    parser.add_argument("output", type=_file, metavar="OUTPUT", help="file, or with --to ants the prefix of two")
    parser.add_argument(
        "--from",
        dest="origin",
        choices=("fsl",),
        help="the input is FSL's, for --moving and --reference (its -in, -ref)",
    )
    _add_saving_arguments(parser)


def _convert(args: argparse.Namespace) -> int:
    from voxelmorph_monai.transform_files import read_fsl_transform, save_chain

    args.transforms = [args.input]
    if args.origin is None:
        return _compose(args)
    if args.reference is None or args.moving is None:
        raise ValueError("a transform of FSL must come with both images (--reference and --moving).")
    saving = _saving(args)
    save_chain(args.output, read_fsl_transform(args.input, saving["grid"], saving["moving_grid"]), **saving)
    return 0


def _add_jacobian_arguments(parser: argparse.ArgumentParser) -> None:
    _add_transforms(parser)
    parser.add_argument("--reference", type=Path, required=True, metavar="FILE", help="fixed image")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="image to write")
    parser.add_argument("--log", action="store_true", help="the natural logarithm")
    parser.add_argument("--overwrite", action="store_true", help="replace the output")


def _jacobian(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apply import jacobian_file

    jacobian_file(args.transforms, args.reference, args.output, logarithm=args.log, overwrite=args.overwrite)
    return 0


def _add_quickstart_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="folder to write (%(default)s)")


def _quickstart(args: argparse.Namespace) -> int:
    from voxelmorph_monai.quickstart import quickstart

    quickstart(args.output)
    return 0


def _add_datalist_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "layout", help="ixi, oasis (neurite-OASIS), learn2reg, lpba40, folder (images/, labels/) or csv"
    )
    parser.add_argument("source", type=Path, help="its folder; of csv: a table of scans or pairs")
    parser.add_argument("output", type=Path, help="folder to write, the dataset_dir of the bundle")
    parser.add_argument("--folds", type=int, metavar="N", help="split scans into N parts (default: as published, or 5)")
    parser.add_argument("--fold", type=int, default=0, metavar="K", help="the part for the test (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split (%(default)s)")


def _datalist(args: argparse.Namespace) -> int:
    from voxelmorph_monai.datasets import write_datalist

    options = {"folds": args.folds, "fold": args.fold, "seed": args.seed}
    print(write_datalist(args.layout, args.source, args.output, **options))
    return 0


def _add_label_app_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", type=Path, metavar="DIR", help="folder to write, new")


def _label_app(args: argparse.Namespace) -> int:
    from voxelmorph_monai.propagation import copy_label_app

    copy_label_app(args.output)
    print(f"monailabel start_server --app {args.output} --studies STUDIES --host 127.0.0.1")
    return 0


def _add_import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, help="Keras file of the authors (.h5), or checkpoint of their VxmDense (.pt)"
    )
    parser.add_argument("output", type=Path, help="file to write, new (.pt)")
    parser.add_argument("--xy", action="store_true", help="the file is of models/xy/: axes counted as x, y")


def _import_weights(args: argparse.Namespace) -> int:
    from voxelmorph_monai.weights import import_weights

    preset = import_weights(args.source, args.output, xy=args.xy)
    print(f"{args.output}: weights of preset {preset}, for intensities in [0, 1]")
    return 0


def _add_pack_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="folder of the bundle")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder to write, or of other bundles"
    )
    parser.add_argument("--url", default="", help="address of the folder it will be published in, for model_info.json")


def _pack_bundle(args: argparse.Namespace) -> int:
    from voxelmorph_monai.distribution import pack_bundle

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
        help="skull-stripped T1 scan and its label map, one after the other (default: MNI152 and its tissues)",
    )
    parser.add_argument("--names", type=Path, metavar="CSV", help="columns number and name: what the labels are called")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="bundle to write, new")
    parser.add_argument("--license", type=Path, metavar="FILE", help="terms of the scans and labels, to come along")


def _make_atlas_bundle(args: argparse.Namespace) -> int:
    from voxelmorph_monai.atlas_bundle import make_atlas_bundle

    if len(args.scans) % 2:
        raise ValueError(f"scans must come with labels, IMAGE LABELS, but there are {len(args.scans)} files.")
    atlases = list(zip(args.scans[::2], args.scans[1::2], strict=True))
    bundle = make_atlas_bundle(atlases, args.output, names=args.names, licence=args.license)
    print(f"{bundle}: read docs/README.md")
    return 0


_COMMANDS = {
    "prepare": _Command(
        "align skull-stripped T1 scans to MNI152 and write them on one grid, with a datalist for training",
        "vxm prepare scans/ prepared/ --images '*_t1.nii.gz' --labels '*_labels.nii.gz'",
        _add_prepare_arguments,
        _prepare,
    ),
    "register": _Command(
        "register two scans in physical space; write the warped scan, ITK transforms, a picture and a summary",
        "vxm register moving.nii.gz fixed.nii.gz --output registered",
        _add_register_arguments,
        _register,
    ),
    "apply": _Command(
        "apply transforms, ours or of ITK, ANTs or 3D Slicer, to an image, labels or points",
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
        "invert a transform: exactly if it is linear, numerically if it is a displacement",
        "vxm invert displacement.nii.gz --output inverse.h5",
        _add_compose_arguments,
        _invert,
    ),
    "convert": _Command(
        "write a transform in another format: ITK, ANTs, FSL, FreeSurfer, displacement of intent 1006 or 1007",
        "vxm convert forward.h5 displacement.nii.gz --reference fixed.nii.gz",
        _add_convert_arguments,
        _convert,
    ),
    "jacobian": _Command(
        "write by how much a transform changes the volume at each voxel of the fixed image",
        "vxm jacobian forward.h5 --reference fixed.nii.gz --output jacobian.nii.gz",
        _add_jacobian_arguments,
        _jacobian,
    ),
    "uncertainty": _Command(
        "sample the posterior of a probabilistic network: spread of the displacement, probabilities of labels",
        "vxm uncertainty moving.nii.gz fixed.nii.gz --weights model.pt --output uncertainty --samples 50 --seed 0",
        _add_uncertainty_arguments,
        _uncertainty,
    ),
    "compare": _Command(
        "put evaluations of the same pairs side by side, with paired statistics and published numbers",
        "vxm compare training_a training_b --output comparison --published ixi",
        _add_compare_arguments,
        _compare,
    ),
    "datalist": _Command(
        "list the scans or pairs of a data set for training: IXI, OASIS, Learn2Reg, LPBA40, a folder, a table",
        "vxm datalist oasis neurite-oasis/ oasis/",
        _add_datalist_arguments,
        _datalist,
    ),
    "label-app": _Command(
        "copy the app for MONAI Label: labels for 3D Slicer and OHIF from labelled scans, registration, training",
        "vxm label-app voxelmorph",
        _add_label_app_arguments,
        _label_app,
    ),
    "make-atlas-bundle": _Command(
        "make a MONAI bundle that segments skull-stripped T1 scans from labelled ones",
        "vxm make-atlas-bundle a.nii.gz a_labels.nii.gz --names labels.csv --output bundles/my_atlas_segmentation",
        _add_atlas_arguments,
        _make_atlas_bundle,
    ),
    "import-weights": _Command(
        "read weights of the authors: Keras files (CVPR 2018, MICCAI 2018), checkpoints of VxmDense in PyTorch",
        "vxm import-weights cvpr2018_vm2_cc.h5 vm2.pt",
        _add_import_arguments,
        _import_weights,
    ),
    "pack-bundle": _Command(
        "write a bundle as the zip file that MONAI downloads, and enter it in model_info.json",
        "vxm pack-bundle bundles/brain_t1_registration --output release --url https://host/releases/download/v1",
        _add_pack_arguments,
        _pack_bundle,
    ),
    "quickstart": _Command(
        "register two brains that come with the project",
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
            name, help=command.help, description=command.help, epilog=f"example: {command.example}"
        )
        command.add_arguments(sub)
    return parser


def _leave(code: int) -> None:
    """End the process at once: where a full disk cut a file short, HDF5 crashes when it closes it at the end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _terminate(*_: object) -> None:
    """Let what is half done be removed, as after an interruption."""
    raise KeyboardInterrupt("SIGTERM")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``vxm`` with the given arguments (default: the process's); returns the exit code.

    0 success, 1 some of the work failed, 2 wrong input, 130 interrupted, 143 terminated.
    """
    args = _parser().parse_args(argv)
    if argv is None:
        from voxelmorph_monai.processes import keep_freed_memory

        keep_freed_memory()
        signal.signal(signal.SIGTERM, _terminate)
    try:
        return _COMMANDS[args.command].run(args)
    except (ValueError, TypeError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error).__name__ != "OutOfMemoryError":  # torch's, of a GPU
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"vxm {args.command}: {reason}", file=sys.stderr)
        if argv is None:
            atexit.register(_leave, 2)
        return 2
    except KeyboardInterrupt as error:
        print(f"vxm {args.command}: {'terminated' if error.args else 'interrupted'}", file=sys.stderr)
        return 143 if error.args else 130


if __name__ == "__main__":
    sys.exit(main())
