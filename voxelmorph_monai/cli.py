"""The command line ``vxm``.

The work is imported inside the functions that need it, here and nowhere else in the package: importing torch and ITK
takes seconds, which nobody should wait for ``vxm --help``.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["main"]


class _Command(NamedTuple):
    """A command: one line of help, an example, what it takes, what it does (the exit code)."""

    help: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _add_grid_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", nargs=3, type=int, default=[160, 192, 224], help="voxels along L-R, I-S, A-P")
    parser.add_argument("--spacing", type=float, default=1.0, metavar="MM", help="side of a voxel (%(default)s)")


def _add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", type=Path, help="folders of scans, or scans (NIfTI, MGZ)")
    parser.add_argument("output", type=Path, help="folder to write, new or of an earlier run")
    parser.add_argument(
        "--images", default="*.nii.gz", metavar="PATTERN", help="scans in a folder; * is the name (%(default)s)"
    )
    parser.add_argument("--labels", metavar="PATTERN", help="labels of the scan with that name (default: none)")
    _add_grid_arguments(parser)
    parser.add_argument("--split", type=Path, metavar="JSON", help="names of scans by section (default: drawn)")
    parser.add_argument("--validation", type=float, default=0.1, metavar="SHARE", help="drawn (%(default)s)")
    parser.add_argument("--test", type=float, default=0.1, metavar="SHARE", help="drawn (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (%(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (%(default)s)")


def _prepare(args: argparse.Namespace) -> int:
    from voxelmorph_monai.preparation import Grid, prepare

    options = {key: getattr(args, key) for key in ("images", "labels", "split", "validation", "test", "seed", "jobs")}
    prepared = prepare(args.inputs, args.output, grid=Grid(tuple(args.size), args.spacing), **options)
    for name, reason in sorted(prepared.errors.items()):
        print(f"vxm prepare: {name} failed: {reason}", file=sys.stderr)
    print(f"{prepared.datalist}\n{prepared.datalist.with_name('qc.png')}: look at it before you train")
    return 1 if prepared.errors else 0


def _add_register_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("moving", type=Path, help="scan to warp (NIfTI, MGZ)")
    parser.add_argument("fixed", type=Path, help="scan to warp it to")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write, new")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="of a network (default: none, affine only)")
    parser.add_argument("--preset", default="diffeomorphic", metavar="NAME", help="of the network (%(default)s)")
    parser.add_argument("--refine", action="store_true", help="go on from there by the two scans themselves")
    parser.add_argument("--budget", type=float, default=30.0, metavar="SECONDS", help="to refine in (%(default)s)")
    parser.add_argument(
        "--space",
        choices=("mni152", "fixed"),
        default="mni152",
        help="align both to MNI152 (skull-stripped brains), or moving to fixed (anything) (%(default)s)",
    )
    parser.add_argument(
        "--transform", choices=("affine", "rigid", "none"), default="affine", help="to align with (%(default)s)"
    )
    parser.add_argument("--moving-labels", type=Path, metavar="FILE", help="label map to warp too")
    parser.add_argument("--fixed-labels", type=Path, metavar="FILE", help="with moving labels: report the Dice")
    _add_grid_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier registration in DIR")


def _register(args: argparse.Namespace) -> int:
    from voxelmorph_monai.preparation import Grid
    from voxelmorph_monai.registration import register_files

    names = ("moving_labels", "fixed_labels", "weights", "preset", "space", "transform", "overwrite")
    options = {name: getattr(args, name) for name in names} | {"budget": args.budget if args.refine else None}
    summary = register_files(args.moving, args.fixed, args.output, grid=Grid(tuple(args.size), args.spacing), **options)
    if args.weights is None and not args.refine:
        print("no --weights: the registration is affine only")
    print(f"correlation {summary['similarity_before']:.3f} -> {summary['similarity_after']:.3f}")
    if summary["dice"]:
        print(f"mean Dice {summary['dice']['before']['mean']:.3f} -> {summary['dice']['after']['mean']:.3f}")
    print(f"{args.output}: look at report.png")
    return 0


def _add_quickstart_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="folder to write (%(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (%(default)s)")


def _quickstart(args: argparse.Namespace) -> int:
    from voxelmorph_monai.quickstart import quickstart

    quickstart(args.output, args.jobs)
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
        "vxm register moving.nii.gz fixed.nii.gz --output registered --weights model.pt",
        _add_register_arguments,
        _register,
    ),
    "quickstart": _Command(
        "register two brains that come with the project, from scratch: prepare, train, evaluate, register",
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``vxm`` with the given arguments (default: the process's); returns the exit code.

    0 success, 1 some of the work failed, 2 wrong input, 130 interrupted.
    """
    args = _parser().parse_args(argv)
    try:
        return _COMMANDS[args.command].run(args)
    except (ValueError, TypeError, OSError) as error:
        print(f"vxm {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"vxm {args.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
