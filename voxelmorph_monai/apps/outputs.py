"""Check the output folder of a registration."""

import os
from collections.abc import Iterable
from pathlib import Path

from voxelmorph_monai.io.atomic import require_replaceable

__all__ = ["check_output_folder"]

_LONGEST_NAME = 220  # bytes; file systems allow 255, and temporary names are longer


def check_output_folder(output: Path, inputs: Iterable[Path], names: Iterable[str], overwrite: bool | None) -> None:
    """Raise an error if a folder cannot be written, or writing it would damage other files.

    Args:
        output: absolute path of the folder.
        inputs: files and folders that the registration reads.
        names: names of the files to write into the folder.
        overwrite: whether to replace a folder with such files; None: never, and the command has no such option.
    """
    names, real = list(names), output.resolve()
    for path in inputs:
        if real == path.resolve() or real in path.resolve().parents:
            raise ValueError(f"the output {output} would replace the input {path}. Choose another output folder.")
        if path.is_dir() and path.resolve() in real.parents:
            raise ValueError(f"the output {output} lies within the input {path}. Choose another output folder.")
    for name in (output.name, *names):
        if len(os.fsencode(name)) > _LONGEST_NAME:
            raise ValueError(
                f"the name {name} has {len(os.fsencode(name))} bytes, but at most {_LONGEST_NAME} are supported. Give "
                "the output folder or the scans a shorter name."
            )
    try:
        str(output).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the path {str(output)!r} is not UTF-8, which ITK needs. Choose another folder.") from error
    require_replaceable(output, overwrite, "'vxm register'", names)
