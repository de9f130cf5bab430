"""The class of a command, and options that several commands share."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["NUM_SHOWN", "Command", "add_grid_arguments", "grid_of"]

NUM_SHOWN = 10  # failed scans or pairs to print; tables list all of them


class Command(NamedTuple):
    """One command of ``vxm``.

    Attributes:
        help: what the command does, in one line.
        example: command line to show below the help.
        add_arguments: adds the arguments of the command to a parser.
        run: runs the command with the parsed arguments and returns the exit code.
    """

    help: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def add_grid_arguments(parser: argparse.ArgumentParser, *, fits: bool = False, planar: bool = False) -> None:
    """Add ``--size`` and ``--spacing`` of the working grid.

    Args:
        parser: parser of the command.
        fits: whether the help mentions ``--space fixed``, where the default grid fits the fixed scan.
        planar: whether the help mentions the grids of slices.
    """
    group = parser.add_argument_group("working grid")
    fixed = "; with --space fixed: a grid that fits the fixed scan" if fits else ""
    slices = ", or two numbers for slices" if planar else ""
    group.add_argument(
        "--size",
        nargs="+",
        type=int,
        metavar="N",
        help="grid size in voxels, in the order left-right, superior-inferior, posterior-anterior"
        f"{slices} (default: 160 192 224{fixed})",
    )
    group.add_argument("--spacing", type=float, metavar="MM", help="voxel size of the grid in mm (default: 1.0)")


def grid_of(args: argparse.Namespace) -> Any:
    """Return the working grid of ``--size`` and ``--spacing``; None leaves the choice to the registration."""
    from voxelmorph_monai.space.template import WorkingGrid

    given = {"size": args.size and tuple(args.size), "spacing": args.spacing}
    if args.size is None and hasattr(args, "space"):
        if args.spacing is None:
            return None
        if args.space == "fixed":
            raise ValueError("with --space fixed, --spacing needs --size: give both, or neither.")
    return WorkingGrid(**{key: value for key, value in given.items() if value is not None})
