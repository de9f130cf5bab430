"""What MONAI's engines and bundles lack to train and evaluate on pairs of images."""

import hashlib
import inspect
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import monai.bundle
import monai.utils
import numpy as np
import torch
from fire.parser import DefaultParseValue
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS
from monai.data import MetaTensor
from monai.inferers import Inferer
from torch import Tensor

__all__ = [
    "TimedInferer",
    "check_config",
    "fingerprint",
    "pair_paths",
    "prepare_both_orders",
    "prepare_pair",
]


def prepare_pair(
    batch: Mapping[str, Tensor], device: torch.device | str | None = None, non_blocking: bool = False, **kwargs: object
) -> tuple[Tensor, dict[str, Tensor]]:
    """Turn a batch of pairs into the network's input and the loss's target (``prepare_batch`` of MONAI's engines).

    Returns:
        ``moving`` and ``fixed`` as one tensor ``(B, 2C, *spatial)``, and a dict of ``moving``, ``fixed`` and, where the
        batch has them, ``moving_label`` and ``fixed_label``; all on ``device``, and plain tensors: a warped image does
        not lie on the moving image's grid, so its header must not travel with it.
    """
    keys = [k for k in ("moving", "fixed", "moving_label", "fixed_label") if k in batch]
    missing = {"moving", "fixed"} - set(keys)
    if missing:
        raise ValueError(f"batch must have 'moving' and 'fixed', got only {sorted(batch)}.")
    target = {
        k: torch.as_tensor(batch[k]).as_subclass(Tensor).to(device, non_blocking=non_blocking, **kwargs)  # type: ignore[call-overload]
        for k in keys
    }
    if target["moving"].shape != target["fixed"].shape:
        raise ValueError(
            f"moving and fixed must have the same shape, got {list(target['moving'].shape)} and "
            f"{list(target['fixed'].shape)}."
        )
    return torch.cat([target["moving"], target["fixed"]], dim=1), target


def prepare_both_orders(
    batch: Mapping[str, Tensor], device: torch.device | str | None = None, non_blocking: bool = False, **kwargs: object
) -> tuple[Tensor, dict[str, Tensor]]:
    """Do what :func:`prepare_pair` does for each pair and then, as a second half of the batch, for its other order."""
    pair, target = prepare_pair(batch, device, non_blocking, **kwargs)
    moving, fixed = pair.chunk(2, dim=1)
    both = {}
    for role, other in (("moving", "fixed"), ("fixed", "moving")):
        for end in ("", "_label"):
            if role + end in target:
                both[role + end] = torch.cat([target[role + end], target[other + end]])
    return torch.cat([pair, torch.cat([fixed, moving], dim=1)]), both


# Entries of a config that nothing in it refers to: MONAI, or who runs the bundle, asks for them by name.
_ENTRY_POINTS = {"imports", "initialize", "run", "finalize", "training", "evaluating"}


def check_config(argv: Sequence[str] | None = None) -> None:
    """Refuse an option or an entry of an overlay that nothing in the configs refers to: it is misspelt.

    MONAI adds an unknown one to the config without a word. It does not tell its expressions what the config is, so this
    reads the command line (``argv``, default: the process's); nothing is checked if that is not MONAI's ``run``.

    Raises:
        ValueError: naming the entries; or ``--tracking`` would lose the config.
    """
    program, *words = sys.argv if argv is None else argv
    if not program.endswith(str(Path("bundle", "__main__.py"))) or words[:1] != ["run"]:
        return
    options: dict[str, Any] = {}
    for i, word in enumerate(words):
        if re.match("--?[A-Za-z]", word):
            name, given, value = word.lstrip("-").partition("=")
            # as Fire has it, the command line of MONAI: one dash does, and stands for an underscore within
            options[name.replace("-", "_")] = value if given else words[i + 1] if i + 1 < len(words) else ""
    if "args_file" in options:
        options = {**monai.bundle.ConfigParser.load_config_file(options["args_file"]), **options}
    listed = options.pop("config_file", [])
    files = monai.utils.ensure_tuple(DefaultParseValue(listed) if isinstance(listed, str) else listed)
    config = monai.bundle.ConfigParser.load_config_files(files)
    known = _ENTRY_POINTS | set(inspect.signature(monai.bundle.run).parameters)
    if "tracking" in options:
        known |= set(DEFAULT_MLFLOW_SETTINGS["configs"])  # type: ignore[call-overload] # a dict
        folder = str(options.get("output_dir", config["output_dir"]))
        if not folder.startswith("$"):  # MONAI appends an expression to it, and looks for a file of that name
            raise ValueError(
                f"output_dir must be an expression for the config to be tracked, as \"$'out'\", got {folder}."
            )
    # An overlay may leave an entry of the first file without use.
    asked = set(config) - set(monai.bundle.ConfigParser.load_config_files(files[:1])) | set(options)
    text = json.dumps(config)
    unused = [
        name
        for name in sorted(asked - known)
        if re.fullmatch(r"\w+", name) and not re.search(rf"[@%]{name}\b", text)  # MONAI checks nested ones
    ]
    if unused:
        raise ValueError(f"options and entries of configs must be used somewhere, but these are not: {unused}.")


def _described(value: Any) -> str:
    """Text of an object with all that it holds, but for what each process has of its own."""
    if code := getattr(value, "__code__", None):
        value = [code.co_code, code.co_names, code.co_consts]
    elif isinstance(value, Tensor | np.ndarray):
        value = value.tolist()
    elif not isinstance(value, type | Enum) and getattr(value, "__dict__", None):
        return f"{type(value)}{_described(vars(value))}"
    if isinstance(value, Mapping):
        kept = {k: v for k, v in value.items() if not isinstance(v, np.random.RandomState | torch.device)}
        return "{" + ", ".join(f"{key!r}: {_described(item)}" for key, item in kept.items()) + "}"
    if isinstance(value, list | tuple | set | frozenset):
        items = [_described(item) for item in value]
        return "[" + ", ".join(items if isinstance(value, list | tuple) else sorted(items)) + "]"
    return re.sub(" at 0x[0-9a-fA-F]+", "", repr(value))


def fingerprint(value: object) -> str | None:
    """Class of a transform, or of whatever else makes batches, and a checksum of all its options; None of None.

    MONAI does not tell its expressions what the config is, so this goes by the object itself.

    >>> first, second, third = (monai.transforms.RandFlip(prob) for prob in (0.5, 0.5, 0.25))
    >>> fingerprint(first) == fingerprint(second), fingerprint(first) == fingerprint(third)
    (True, False)
    """
    if value is None:
        return None
    return f"{type(value).__name__}, sha256 {hashlib.sha256(_described(value).encode()).hexdigest()[:12]}"


class TimedInferer(Inferer):
    """Call the network, and add to its result how many ``seconds`` each pair took: ``(B,)``, float32."""

    def __call__(
        self, inputs: Tensor, network: Callable[..., dict[str, Tensor]], *args: object, **kwargs: object
    ) -> dict[str, Tensor]:
        """Give what ``network`` gives for ``inputs``, and ``seconds``."""
        start = time.perf_counter()
        found = network(inputs, *args, **kwargs)
        if inputs.is_cuda:
            torch.cuda.synchronize(inputs.device)
        seconds = (time.perf_counter() - start) / len(inputs)
        return found | {"seconds": torch.full((len(inputs),), seconds)}


def pair_paths(batch: Sequence[Mapping[str, MetaTensor]]) -> list[tuple[str, str]]:
    """Files that the moving and the fixed image of each pair of a decollated batch come from."""
    return [(str(p["moving"].meta["filename_or_obj"]), str(p["fixed"].meta["filename_or_obj"])) for p in batch]
