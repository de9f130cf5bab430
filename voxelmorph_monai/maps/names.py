"""Parse names of transforms on the command line, and check output files."""

import re
from collections.abc import Sequence
from pathlib import Path

from voxelmorph_monai.io.atomic import require_new
from voxelmorph_monai.io.images import check_image_name

__all__ = ["check_image_output", "check_output", "parse_name"]


def parse_name(name: str | Path) -> tuple[Path, bool]:
    """Split the name of a transform into its path, and whether it stands for the inverse, ``[PATH,1]`` as in ANTs.

    >>> parse_name("[forward.h5,1]")[1], parse_name("forward.h5")[1]
    (True, False)
    """
    marked = re.fullmatch(r"\[(.+),\s*([01])\]", str(name))
    return Path(marked[1] if marked else name), bool(marked and marked[2] == "1")


def check_output(path: Path, overwrite: bool, inputs: Sequence[str | Path] = ()) -> None:
    """Raise FileExistsError if writing ``path`` would replace a file that must be kept."""
    given = [parse_name(each)[0] for each in inputs]
    if path.exists() and any(each.exists() and path.samefile(each) for each in given):
        raise FileExistsError(f"{path} is also an input; write to another file.")
    require_new(path, overwrite)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: its folder does not exist.")


def check_image_output(path: Path, overwrite: bool, inputs: Sequence[str | Path] = ()) -> None:
    """Check an output image like :func:`check_output`; also raises ValueError unless it ends in .nii or .nii.gz."""
    check_image_name(path)
    check_output(path, overwrite, inputs)
