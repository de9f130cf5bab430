"""The commands ``longitudinal``, ``template`` and ``segment``."""

import argparse
import sys
from pathlib import Path

from voxelmorph_monai.apps.options import SIMILARITIES
from voxelmorph_monai.commands.command import NUM_SHOWN, Command

__all__ = ["COMMANDS"]


def _add_refinement_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--steps",
        type=int,
        default=20,
        metavar="N",
        help="number of refinement steps at each resolution (default: %(default)s)",
    )
    group.add_argument(
        "--similarity",
        choices=SIMILARITIES,
        default="lncc",
        help="similarity measure to optimise: lncc for scans of the same contrast, mi or mind for different contrasts "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--spacing", type=float, metavar="MM", help="voxel size of the results in mm (default: that of the finest scan)"
    )


def _add_longitudinal_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("input and output")
    group.add_argument(
        "visits", nargs="+", type=Path, metavar="VISIT", help="two or more scans of one person, in chronological order"
    )
    what = group.add_mutually_exclusive_group()
    what.add_argument("--labels", nargs="+", type=Path, metavar="FILE", help="label maps, one per visit")
    what.add_argument(
        "--anatomy", action="store_true", help="segment the visits, as vxm segment does, instead of reading label maps"
    )
    group.add_argument(
        "--exclude", nargs="+", type=Path, metavar="FILE", help="masks of regions to ignore (lesions), one per visit"
    )
    group.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder for tables and maps")
    group.add_argument("--overwrite", action="store_true", help="replace earlier results in DIR")
    group = parser.add_argument_group("computation")
    _add_refinement_arguments(group)
    group.add_argument(
        "--device", metavar="NAME", help="device for --anatomy: cpu or cuda (default: a GPU if there is one)"
    )


def _longitudinal(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.longitudinal import longitudinal_files

    names = ("labels", "anatomy", "device", "steps", "similarity", "spacing", "overwrite")
    options = {name: getattr(args, name) for name in names}
    for row in longitudinal_files(args.visits, args.output, excluded=args.exclude, progress=True, **options):
        changes = [f"{value} %" for name, value in row.items() if name.startswith("change")]
        print(f"{row['structure']}: {row['ml_1']} ml, then {', '.join(changes)}")
    print(f"{args.output}: structures.csv, and maps of the local change")
    return 0


def _add_template_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("input and output")
    group.add_argument(
        "list", type=Path, metavar="CSV", help="table of scans, with the column image and, optionally, labels"
    )
    group.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="new folder, or the folder of an interrupted run to continue",
    )
    group = parser.add_argument_group("computation")
    group.add_argument(
        "--start",
        choices=("scans", "mni152"),
        default="scans",
        help="what the scans are first aligned to: one of them, or MNI152 (default: %(default)s)",
    )
    group.add_argument(
        "--rounds", type=int, default=4, metavar="N", help="number of rounds of registration (default: %(default)s)"
    )
    _add_refinement_arguments(group)
    group.add_argument(
        "--jobs", type=int, metavar="N", help="number of processes (default: as many as processors and memory allow)"
    )
    group.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="address of a Dask cluster to run on, for example tcp://host:8786 (default: this machine)",
    )


def _template(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.template_building import build_template

    names = ("start", "rounds", "steps", "similarity", "spacing", "jobs", "scheduler")
    print(build_template(args.list, args.output, **{name: getattr(args, name) for name in names}))
    return 0


def _add_segment_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "scans",
        nargs="*",
        type=Path,
        metavar="SCAN",
        help="one or more head scans (NIfTI, MGZ, NRRD, MetaImage, DICOM file or folder), or a folder of scans",
    )
    parser.add_argument(
        "--list",
        type=Path,
        metavar="CSV",
        help="table of scans to segment instead of SCAN, with the column scan and, optionally, name",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="PATH",
        help="new folder for labels, brain mask, brain, volumes and colours, or a NIfTI file for labels only; for "
        "several scans: folder with such a folder for each scan and a table of all volumes (repeat the command to "
        "continue after an interruption)",
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="weights of the network (default: the bundled weights)"
    )
    parser.add_argument("--device", metavar="NAME", help="device: cpu, cuda or cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def _segment(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.segment import by_name, read_list, segment_file, segment_files

    how = {name: getattr(args, name) for name in ("weights", "device", "overwrite")}
    if bool(args.scans) == (args.list is not None):
        raise ValueError("give either scans or --list.")
    scans = by_name(args.scans) if args.list is None else read_list(args.list)
    if args.list is None and list(scans.values()) == args.scans and len(scans) == 1:
        segment_file(args.scans[0], args.output, **how)
        return 0
    done = segment_files(scans, args.output, **how)
    for name, reason in list(done.errors.items())[:NUM_SHOWN]:
        print(f"vxm segment: {name} failed: {reason}", file=sys.stderr)
    good = len(scans) - len(done.errors)
    print(f"{good} of {len(scans)} scans are segmented, {done.num_skipped} of them by an earlier call")
    print(f"{done.table}: volumes of all structures")
    return 1 if done.errors else 0


COMMANDS = {
    "longitudinal": Command(
        "measure volume changes between scans of one person, treating all visits alike",
        "vxm longitudinal baseline.nii.gz year1.nii.gz --output change --anatomy",
        _add_longitudinal_arguments,
        _longitudinal,
    ),
    "template": Command(
        "build a template from a group of scans: their mean shape and mean intensity",
        "vxm template scans.csv --output template",
        _add_template_arguments,
        _template,
    ),
    "segment": Command(
        "segment head scans of any contrast into 29 structures and a brain mask",
        "vxm segment scan.nii.gz --output segmentation",
        _add_segment_arguments,
        _segment,
    ),
}
