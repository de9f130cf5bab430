"""When each part of a command begins, and how long it takes: ``python -m tests.benchmarks.timeline register ...``.

The words are those of ``vxm``. Functions are timed where they are called from, in whichever thread; a function within
another one is shown below it, indented. CPU seconds are those of its own thread, the rest is what it waited for: other
threads that work for it, other processes, the disk.
"""

import sys
import time
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from threading import local
from typing import Any, NamedTuple

TIMED = {
    "apps.register_files": ["_sha256", "register_scans", "write_result"],
    "apps.register": [
        *(
            "find_brains",
            "network_of",
            "align_to_mni152",
            "network_input",
            "_predict",
            "remove_folds",
            "invert",
            "refine",
        ),
        *("padded_field", "warp_scan"),
    ],
    "apps.result": [
        *("RegistrationResult.measures", "RegistrationResult.report", "correlation", "regularity", "resample"),
        "volume_change",
    ],
    "apps.apply": ["warp_to_grid"],
    "maps.spatial_map": ["SpatialMap.read", "SpatialMap.on_grid", "SpatialMap.save"],
    "networks": ["Registration.forward"],
    "report": ["save_displacement", "save_image", "save_registration_picture"],
    "space.scan": ["Frame.save", "Scan.read", "Scan.read_labels", "Scan.save"],
}
_BEGIN = time.perf_counter()
_LEAST = 0.02  # seconds of wall clock: what took less is not shown


class Line(NamedTuple):
    """One call."""

    start: float
    depth: int
    name: str
    cpu: float
    wall: float


def _timed(function: Callable[..., Any], name: str, lines: list[Line], at: local) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        depth = getattr(at, "depth", 0)
        at.depth = depth + 1
        start, cpu = time.perf_counter(), time.thread_time()
        try:
            return function(*args, **options)
        finally:
            at.depth = depth
            wall = time.perf_counter() - start
            lines.append(Line(start - _BEGIN, depth, name, time.thread_time() - cpu, wall))

    return call


def watch(command: str) -> list[Line]:
    """Import what a command needs, and have its functions add lines to a list whenever they are called."""
    lines: list[Line] = []
    at = local()
    import_module({"register": "voxelmorph_monai.apps.register_files"}.get(command, "voxelmorph_monai.apps.apply"))
    lines.append(Line(0.0, 0, "imports", time.process_time(), time.perf_counter() - _BEGIN))
    for module, names in TIMED.items():
        place = sys.modules.get(f"voxelmorph_monai.{module}")
        for name in names if place is not None else ():
            owner: Any = place
            *parts, last = name.split(".")
            for part in parts:
                owner = getattr(owner, part)
            found = owner.__dict__[last]
            if isinstance(found, classmethod):
                setattr(owner, last, classmethod(_timed(found.__func__, name, lines, at)))
            else:
                setattr(owner, last, _timed(found, name, lines, at))
    return lines


def main() -> int:
    """Run the command, then print its timeline."""
    from voxelmorph_monai.cli import main as vxm
    from voxelmorph_monai.memory import keep_freed_memory
    from voxelmorph_monai.threads import wait_without_spinning

    keep_freed_memory()
    wait_without_spinning()
    lines = watch(sys.argv[1])
    code = vxm(sys.argv[1:])
    for line in sorted(lines):
        if line.wall >= _LEAST:
            print(f"{line.start:8.2f} {'  ' * line.depth + line.name:44} {line.cpu:7.2f} CPU {line.wall:7.2f} wall")
    print(f"{time.perf_counter() - _BEGIN:8.2f} the end, {time.process_time():.2f} CPU seconds in all")
    return code


if __name__ == "__main__":
    sys.exit(main())
