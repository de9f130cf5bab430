"""The command line ``vxm``.

This module and ``commands`` import what does the work only inside the functions that use it: importing torch takes
seconds, and ``vxm --help`` should answer at once.
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
"""All commands by name, in the order of the help."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vxm", description="Learned deformable registration of medical images.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.help,
            description=textwrap.fill(f"{command.help[0].upper()}{command.help[1:]}.", 80),
            epilog=f"example:\n  {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,  # does not wrap the example
        )
        command.add_arguments(sub)
    return parser


def _leave(codes: Sequence[int]) -> None:
    """End the process at once with the first of ``codes``, if there is one.

    This skips the 0.8 s that Python needs to unload torch. It also prevents a crash of HDF5, which fails while closing
    a file that a full disk has cut short.
    """
    if codes:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(codes[0])


def _terminate(*_: object) -> None:
    """Treat SIGTERM like Ctrl+C, so that incomplete files are removed."""
    raise KeyboardInterrupt("SIGTERM")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``vxm`` and return its exit code.

    The exit code is 0 for success, 1 if some of the work failed, 2 for wrong input, 130 if interrupted and 143 if
    terminated.

    Args:
        argv: arguments after ``vxm`` (default: those of this process).
    """
    if argv is not None:
        return _run(argv)
    from voxelmorph_monai.memory import keep_freed_memory
    from voxelmorph_monai.threads import wait_without_spinning

    codes: list[int] = []
    atexit.register(_leave, codes)  # registered first, so called after the exit functions of libraries
    keep_freed_memory()
    wait_without_spinning()
    signal.signal(signal.SIGTERM, _terminate)
    codes.append(_run(sys.argv[1:]))
    return codes[0]


def _check_home(argv: Sequence[str]) -> None:
    """Raise ValueError if an argument still starts with ``~``, which would create a folder of that name."""
    for word in argv:
        value = word.partition("=")[2] if word.startswith("--") else word
        if value.startswith("~"):
            raise ValueError(
                f"the ~ in {word} does not stand for your home folder: the shell does not expand it in quotes or after "
                f"=. Write the full path, or ./{value} if the name really starts with ~."
            )


def _run(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    try:
        _check_home(argv)
        return COMMANDS[args.command].run(args)
    except (ValueError, TypeError, OSError, MemoryError, RuntimeError) as error:
        from voxelmorph_monai.memory import is_out_of_memory

        short = is_out_of_memory(error)
        if isinstance(error, RuntimeError) and not short:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        if short:
            reason = f"out of memory. Close other programs, or use a coarser grid or fewer jobs. ({reason})"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = f"{error.strerror}. Incomplete files were removed. Free some space, or write to another disk."
        print(f"vxm {args.command}: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"vxm {args.command}: {'terminated' if error.args else 'interrupted'}", file=sys.stderr)
        return 143 if error.args else 130


if __name__ == "__main__":
    sys.exit(main())
