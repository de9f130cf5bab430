"""The command line ``vxm``.

Here and in ``commands``, functions import the modules that do the work only when they are called: importing torch takes
seconds, and ``vxm --help`` should answer at once. The rest of the package imports at the top of its files.
"""

import argparse
import atexit
import errno
import os
import signal
import sys
import textwrap
from collections.abc import Sequence

from voxelmorph_monai.commands import groups, registration, training, transforms

__all__ = ["COMMANDS", "main"]

COMMANDS = {**registration.COMMANDS, **transforms.COMMANDS, **groups.COMMANDS, **training.COMMANDS}
"""Commands by name, in the order of the help."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vxm", description="Learned deformable registration of medical images.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.help,
            description=textwrap.fill(f"{command.help[0].upper()}{command.help[1:]}.", 80),
            epilog=f"example:\n  {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,  # a wrapped example could not be copied
        )
        command.add_arguments(sub)
    return parser


def _leave(codes: Sequence[int]) -> None:
    """End the process at once with the first of ``codes``, if there is one.

    A normal exit takes 0.8 s, in which torch and its memory are released. After a disk has filled up, it would also
    crash, when HDF5 closes an incomplete file.
    """
    if codes:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(codes[0])


def _terminate(*_: object) -> None:
    """Turn SIGTERM into an exception, so that incomplete files are removed as after Ctrl-C."""
    raise KeyboardInterrupt("SIGTERM")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``vxm`` and return its exit code.

    Args:
        argv: arguments without the name of the program (default: those of the process).

    Returns:
        0 for success, 1 if some of the work failed, 2 for wrong input, 130 if interrupted, 143 if terminated.
    """
    if argv is not None:
        return _run(argv)
    from voxelmorph_monai.memory import keep_freed_memory
    from voxelmorph_monai.threads import wait_without_spinning

    codes: list[int] = []
    atexit.register(_leave, codes)  # first, so that it runs after the functions that libraries register
    keep_freed_memory()
    wait_without_spinning()
    signal.signal(signal.SIGTERM, _terminate)
    codes.append(_run(sys.argv[1:]))
    return codes[0]


def _check_home(argv: Sequence[str]) -> None:
    """Raise ValueError for a ``~`` that the shell has not expanded: it would become a folder with that name."""
    for word in argv:
        value = word.partition("=")[2] if word.startswith("--") else word
        if value.startswith("~"):
            raise ValueError(
                f"{word} starts with ~, which the shell does not expand in quotes or after =. Write the full path, or "
                f"./{value} for a file or folder with that name."
            )


def _run(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    try:
        _check_home(argv)
        return COMMANDS[args.command].run(args)
    except (ValueError, TypeError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error).__name__ != "OutOfMemoryError":  # torch's, of a GPU
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = f"{error.strerror}. Free some space, or write to another disk. Incomplete files were removed."
        print(f"vxm {args.command}: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"vxm {args.command}: {'terminated' if error.args else 'interrupted'}", file=sys.stderr)
        return 143 if error.args else 130


if __name__ == "__main__":
    sys.exit(main())
