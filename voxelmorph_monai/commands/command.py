"""What a command is, and the options that several commands share."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["NUM_SHOWN", "Command", "add_grid_arguments", "grid_of"]

NUM_SHOWN = 10  # of the scans or pairs of a list that failed


class Command(NamedTuple):
    """A command: one line of help, an example, what it takes, what it does (the exit code)."""

    help: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def add_grid_arguments(parser: argparse.ArgumentParser, *, fits: bool = False, planar: bool = False) -> None:
    """Add the size and spacing of the grid; it ``fits`` a fixed scan, or may be ``planar``."""
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
    group.add_argument("--spacing", type=float, metavar="MM", help="voxel size in mm (default: 1.0)")


def grid_of(args: argparse.Namespace) -> Any:
    """The grid that is asked for; None for the one that a registration takes by default."""
    from voxelmorph_monai.space.template import WorkingGrid

    given = {"size": args.size and tuple(args.size), "spacing": args.spacing}
    if args.size is None and hasattr(args, "space"):
        if args.spacing is None:
            return None
        if args.space == "fixed":
            raise ValueError("--spacing needs --size with --space fixed.")
    return WorkingGrid(**{key: value for key, value in given.items() if value is not None})
