"""VoxelMorph on MONAI: learned deformable registration of medical images.

    >>> import voxelmorph_monai as vxm
    >>> vxm.Scan
    <class 'voxelmorph_monai.space.scan.Scan'>

The public names are imported when they are first used, so that ``vxm --help`` does not wait for torch, and
``voxelmorph_monai.blocks`` loads only torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Module of each public name; __init__.pyi lists the names for type checkers.
_PUBLIC = {
    "apply": "apps.apply",
    "Options": "apps.options",
    "prepare": "apps.prepare",
    "register": "apps.register",
    "RegistrationResult": "apps.result",
    "load_network": "apps.shipped",
    "compose": "blocks",
    "integrate": "blocks",
    "invert": "blocks",
    "jacobian_determinant": "blocks",
    "resize": "blocks",
    "warp": "blocks",
    "warp_labels": "blocks",
    "GradientLoss": "losses",
    "KLLoss": "losses",
    "LNCCLoss": "losses",
    "LabelDiceLoss": "losses",
    "MINDLoss": "losses",
    "MSELoss": "losses",
    "MutualInformationLoss": "losses",
    "RegistrationLoss": "losses",
    "read_chain": "maps.files",
    "SpatialMap": "maps.spatial_map",
    "dice": "metrics",
    "folding": "metrics",
    "hausdorff95": "metrics",
    "inverse_consistency": "metrics",
    "log_jacobian_sd": "metrics",
    "target_registration_error": "metrics",
    "PRESETS": "networks",
    "Registration": "networks",
    "VoxelMorph": "networks",
    "refine": "refinement",
    "Scan": "space.scan",
    "WorkingGrid": "space.template",
    "mni152": "space.template",
    "sample_scan": "space.template",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
