"""The command line ``vxm``.

The work is imported inside the functions that need it, here and in ``commands`` and nowhere else in the package:
importing torch takes seconds, which nobody should wait for ``vxm --help``.
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
"""By name, in the order in which the help lists them."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vxm", description="Learned deformable registration of medical images.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
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


def _check_home(argv: Sequence[str]) -> None:
    """Raise ValueError where the shell left a ``~``: a folder of that name would be made."""
    for word in argv:
        value = word.partition("=")[2] if word.startswith("--") else word
        if value.startswith("~"):
            raise ValueError(
                f"{word} is no path: the shell expands ~, but not in quotes or after =. Write the full path; for a "
                f"file or folder with that name write ./{value}."
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
            reason = f"{error.strerror}. Nothing half-written is left: make room, or write to another disk."
        print(f"vxm {args.command}: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"vxm {args.command}: {'terminated' if error.args else 'interrupted'}", file=sys.stderr)
        return 143 if error.args else 130


if __name__ == "__main__":
    sys.exit(main())
