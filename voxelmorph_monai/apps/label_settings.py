"""Options of the app for MONAI Label, of the server and of its requests."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from voxelmorph_monai.apps.options import ALIGNMENTS, DEFAULTS, PRESET, SPACES, Options, check_choice
from voxelmorph_monai.apps.shipped import choose_device, shipped_weights
from voxelmorph_monai.networks import PRESETS
from voxelmorph_monai.space.template import WorkingGrid

__all__ = ["MOST", "Settings", "read_number"]

MOST = 9
"""Largest number of studies to label from."""

_LONGEST = 600.0  # longest refinement in seconds; clients of MONAI Label do not wait longer


def read_number(name: str, value: Any, least: float, most: float, kind: Callable[[Any], Any] = float) -> Any:
    """The number given for an option; raises ValueError unless it lies between ``least`` and ``most``."""
    try:
        number = kind(value)
        cut = isinstance(value, float) and number != value  # 2.7 is not a whole number
        if math.isfinite(number) and least <= number <= most and not cut:
            return number
    except (ValueError, TypeError, OverflowError):
        pass
    what = "a whole number" if kind is int else "a number"
    raise ValueError(f"{name} is '{value}'. Give {what} from {least:g} to {most:g}.")


def _first(default: str, known: Sequence[str]) -> list[str]:
    """Choices with the default first, because 3D Slicer preselects the first one."""
    return [default, *(each for each in known if each != default)]


class Settings(NamedTuple):
    """Options from ``--conf KEY VALUE`` of the server; a request can change those from ``space`` on.

    Attributes:
        weights: file of the network's weights, or ``none`` for no network; None for the default.
        preset: preset of the network.
        device: device to compute on.
        grid: grid of the displacement; None for the standard grid, or with ``space="fixed"`` a grid that fits the scan.
        space: space to align the scans in.
        alignment: alignment of the scans before the deformation.
        budget: time limit of the refinement in seconds; 0 for no refinement.
        num_studies: number of similar studies to take labels from.
    """

    weights: str | None
    preset: str
    device: str | None
    grid: WorkingGrid | None
    space: str = DEFAULTS.space
    alignment: str = DEFAULTS.alignment
    budget: float = DEFAULTS.budget
    num_studies: int = 1

    @classmethod
    def read(cls, conf: Mapping[str, str]) -> "Settings":
        """Read the options of the server.

        Raises:
            ValueError: an option is unknown or cannot be used.
        """
        known = {*cls._fields, "size", "spacing", "transform"} - {"grid"}  # transform: the former name of alignment
        unknown = conf.keys() - known - {"preload", "server_mode"}  # these two are MONAI Label's
        if unknown:
            raise ValueError(
                f"--conf has unknown options: {', '.join(sorted(unknown))}. Use {', '.join(sorted(known))}."
            )
        weights, device = conf.get("weights"), conf.get("device")
        if weights not in (None, "none") and not Path(weights).is_file():
            raise ValueError(f"weights '{weights}' do not exist. Name a file, or none.")
        preset = check_choice("preset", conf.get("preset", PRESET), list(PRESETS))
        if weights is None and preset != PRESET:
            raise ValueError(f"the bundled weights are for preset {PRESET}, not {preset}. Give other weights, or none.")
        choose_device(device)
        size = tuple(read_number("size", n, 8, 1024, int) for n in conf.get("size", "160,192,224").split(","))
        grid = WorkingGrid(size, read_number("spacing", conf.get("spacing", 1.0), 0.01, 100))
        return cls(
            weights=weights,
            preset=preset,
            device=device,
            grid=grid if conf.keys() & {"size", "spacing"} else None,
        ).asked(conf)

    def asked(self, request: Mapping[str, Any]) -> "Settings":
        """Settings for one request; empty fields of a client's form keep the settings of the server.

        Raises:
            ValueError: an option cannot be used.
        """
        given = {key: value for key, value in request.items() if value not in (None, "")}
        return self._replace(
            space=check_choice("space", given.get("space", self.space), SPACES),
            alignment=check_choice(
                "alignment", given.get("alignment", given.get("transform", self.alignment)), ALIGNMENTS
            ),
            budget=read_number("budget", given.get("budget", self.budget), 0, _LONGEST),
            num_studies=read_number("num_studies", given.get("num_studies", self.num_studies), 1, MOST, int),
        )

    def shown(self) -> dict[str, Any]:
        """Options that a client shows in its form for a request."""
        return {
            "space": _first(self.space, SPACES),
            "alignment": _first(self.alignment, ALIGNMENTS),
            "budget": self.budget,
        }

    def weights_in_use(self, trained: Path) -> str | None:
        """File of the weights for brains in MNI152; ``trained`` is the file of this server's own training, if any."""
        if self.weights is None:
            return str(trained if trained.is_file() else shipped_weights())
        return None if self.weights == "none" else self.weights

    def options(self, trained: Path) -> Options:
        """Options of a registration; for ``trained`` see :meth:`weights_in_use`."""
        unknown = self.weights is None and self.space != "mni152"  # the bundled weights are only for brains
        return Options(
            weights=None if unknown else self.weights_in_use(trained) or "none",
            preset=self.preset,
            device=self.device,
            budget=self.budget,
            space=self.space,
            alignment=self.alignment,
            grid=self.grid,
        )
