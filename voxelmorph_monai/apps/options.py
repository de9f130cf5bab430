"""Options of a registration and their defaults, for Python, the command line, cohorts and the MONAI Label app.

No heavy library is imported here, so that the command line can show the defaults quickly.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from voxelmorph_monai.networks import Registration
    from voxelmorph_monai.space.template import WorkingGrid

__all__ = [
    "ALIGNMENTS",
    "BRAIN_EXTRACTIONS",
    "DEFAULTS",
    "PRESET",
    "SAME_PERSON",
    "SIMILARITIES",
    "SMOOTHNESS",
    "SPACES",
    "Options",
    "check_choice",
]

SPACES = ("mni152", "fixed")
"""Spaces in which scans can be aligned."""

ALIGNMENTS = ("affine", "rigid", "none")
"""Alignments of the scans before the deformation."""

BRAIN_EXTRACTIONS = ("auto", "off")
"""Find the brain in whole heads, or use scans as they are."""

SIMILARITIES = ("lncc", "mi", "mind")
"""Similarity measures of the refinement."""

SMOOTHNESS = {"low": 0.25, "default": 0.5, "high": 3.0}
"""Smoothness of the displacement in mm, by name (see ``refinement.refine``)."""

SAME_PERSON = 200.0
"""Smoothness in mm between scans of one person."""

PRESET = "wide"
"""Preset of the bundled weights."""


def check_choice(name: str, value: object, known: Sequence[str]) -> str:
    """The value of an option; raises ValueError unless it is one of the known ones."""
    if value not in known:
        raise ValueError(f"{name} is '{value}'. Choose one of {', '.join(known)}.")
    return str(value)


def _check_type(name: str, value: object, fits: bool, expected: str) -> None:
    if not fits:
        raise TypeError(f"{name} is a {type(value).__name__}. Give {expected}.")


def _is(value: object, kind: str) -> bool:
    """Whether a value is an instance of a class, given by name because importing the class would take seconds."""
    return any(each.__name__ == kind for each in type(value).__mro__)


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


@dataclass(frozen=True, repr=False)
class Options:
    """How to register two scans.

    Attributes:
        weights: file of trained weights, a network, or ``"none"`` (default: the bundled weights; no network with
            ``space="fixed"`` or ``same_person``).
        preset: preset of the network (default: the preset of the weights).
        device: device to compute on (default: a GPU if there is one).
        refine: improve the displacement by optimising it for these two scans, after the network or instead of it.
        budget: time limit of the refinement in seconds; infinity continues until nothing improves.
        steps: number of refinement steps at each resolution, without a time limit; every run gives the same result.
        similarity: similarity measure to optimise: ``"lncc"`` for scans of the same contrast, ``"mi"`` or ``"mind"``
            for different contrasts, such as T1 and T2.
        smoothness: smoothness of the refined displacement, ``"low"``, ``"default"``, ``"high"``, or a length in mm,
            which has the same effect on every grid.
        symmetric: treat both scans alike, so that exchanging them gives the inverse map; takes twice the time.
        same_person: settings for two scans of one person: rigid alignment, no network unless you give weights, and,
            unless you give a smoothness, a very smooth displacement that shows only real changes.
        space: ``"mni152"`` aligns both scans, brains or whole heads, to that template; ``"fixed"`` aligns the moving
            scan, of any body part, to the fixed scan.
        alignment: ``"affine"``, ``"rigid"``, or ``"none"`` if the headers already align the scans.
        brain_extraction: ``"auto"`` finds the brain in whole heads, with ``space="mni152"`` and without a mask;
            ``"off"`` uses scans as they are.
        grid: size and spacing of the grid of the displacement (default: the standard grid; with ``space="fixed"`` a
            grid that fits the fixed scan).
    """

    weights: "str | Path | Registration | None" = None
    preset: str | None = None
    device: str | None = None
    refine: bool = True
    budget: float = 8.0
    steps: int | None = None
    similarity: str = "lncc"
    smoothness: float | str = "default"
    symmetric: bool = False
    same_person: bool = False
    space: str = "mni152"
    alignment: str = "affine"
    brain_extraction: str = "auto"
    grid: "WorkingGrid | None" = None

    def __post_init__(self) -> None:
        """Raise TypeError for a value of the wrong type, and ValueError for a value that is not allowed."""
        weights = self.weights is None or isinstance(self.weights, str | Path) or _is(self.weights, "Registration")
        _check_type("weights", self.weights, weights, 'a path, "none", or a Registration (vxm.load_network gives one)')
        _check_type("preset", self.preset, isinstance(self.preset, str | None), 'a name, for example "vm1"')
        _check_type("device", self.device, isinstance(self.device, str | None), 'a name, for example "cuda"')
        _check_type("refine", self.refine, isinstance(self.refine, bool), "True or False")
        _check_type("budget", self.budget, _is_number(self.budget, Real), "a number of seconds")
        steps = self.steps is None or _is_number(self.steps, Integral)
        _check_type("steps", self.steps, steps, "a whole number, or None")
        grid = self.grid is None or _is(self.grid, "WorkingGrid")
        _check_type("grid", self.grid, grid, "a WorkingGrid, for example vxm.WorkingGrid((160, 192, 224), 1.0)")
        check_choice("space", self.space, SPACES)
        check_choice("alignment", self.alignment, ALIGNMENTS)
        check_choice("brain_extraction", self.brain_extraction, BRAIN_EXTRACTIONS)
        check_choice("similarity", self.similarity, SIMILARITIES)
        _check_type("symmetric", self.symmetric, isinstance(self.symmetric, bool), "True or False")
        _check_type("same_person", self.same_person, isinstance(self.same_person, bool), "True or False")
        if _is_number(self.smoothness, Real):
            if not 0 <= float(self.smoothness) < math.inf:
                raise ValueError(f"smoothness is {self.smoothness}. Give 0 mm or more.")
        else:
            _check_type("smoothness", self.smoothness, isinstance(self.smoothness, str), "a name or a number of mm")
            check_choice("smoothness", self.smoothness, tuple(SMOOTHNESS))
        if self.symmetric and self.space != "mni152":
            raise ValueError(
                "symmetric cannot be combined with space fixed, whose grid favours the fixed scan. Use space mni152."
            )
        if self.same_person and self.alignment == "none":
            raise ValueError("same_person aligns the scans rigidly. Leave out alignment none.")
        if not self.budget >= 0:
            raise ValueError(f"budget is {self.budget}. Give 0 seconds or more.")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps is {self.steps}. Give 1 or more.")

    def __repr__(self) -> str:
        """Show only the options that differ from their defaults."""
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        if _is(self.weights, "Registration"):
            given["weights"] = "a Registration"
        changed = [f"{each.name}={given[each.name]!r}" for each in fields(self) if given[each.name] != each.default]
        return f"Options({', '.join(changed)})"

    @property
    def refines(self) -> bool:
        """Whether the displacement is refined."""
        return self.refine and (self.budget > 0 or self.steps is not None)

    @property
    def smoothness_mm(self) -> float:
        """Smoothness of the refinement in mm."""
        if self.same_person and self.smoothness == "default":
            return SAME_PERSON
        return SMOOTHNESS[self.smoothness] if isinstance(self.smoothness, str) else float(self.smoothness)

    def words(self) -> list[str]:
        """Arguments of ``vxm register`` for the options that are not defaults; ``WEIGHTS`` stands for a file."""
        words: list[str] = []
        if self.weights is not None:
            words += ["--weights", "none" if str(self.weights) == "none" else "WEIGHTS"]
        for name in ("preset", "space", "alignment", "brain_extraction", "similarity", "smoothness"):
            if getattr(self, name) != getattr(DEFAULTS, name):
                words += [f"--{name.replace('_', '-')}", str(getattr(self, name))]
        words += [f"--{name.replace('_', '-')}" for name in ("symmetric", "same_person") if getattr(self, name)]
        if not self.refines:
            words.append("--no-refine")
        elif self.steps is not None:
            words += ["--steps", str(self.steps)]
        elif self.budget != DEFAULTS.budget:
            words += ["--budget", f"{float(self.budget):g}"]
        if self.grid is not None:
            words += ["--size", *map(str, self.grid.size), "--spacing", f"{float(self.grid.spacing):g}"]
        return words

    def record(self) -> dict[str, Any]:
        """Options for a summary, as JSON values."""
        budget = float(self.budget) if self.budget < math.inf else "inf"  # JSON has no infinity
        steps = None if self.steps is None else int(self.steps)
        return {
            "space": self.space,
            "alignment": self.alignment,
            "brain_extraction": self.brain_extraction,
            "budget": budget if self.refine else 0.0,
            "steps": steps if self.refine else None,
            "similarity": self.similarity,
            "smoothness": self.smoothness_mm,
            "symmetric": self.symmetric,
            "same_person": self.same_person,
            "command": " ".join(["vxm register MOVING FIXED --output DIR", *self.words()]),
        }


DEFAULTS = Options()
