# What `import voxelmorph_monai` offers, for type checkers: tests/test_public.py compares it with __init__.py.
from voxelmorph_monai.apps.apply import apply as apply
from voxelmorph_monai.apps.options import Options as Options
from voxelmorph_monai.apps.prepare import prepare as prepare
from voxelmorph_monai.apps.register import register as register
from voxelmorph_monai.apps.result import RegistrationResult as RegistrationResult
from voxelmorph_monai.apps.shipped import load_network as load_network
from voxelmorph_monai.blocks import (
    compose as compose,
)
from voxelmorph_monai.blocks import (
    integrate as integrate,
)
from voxelmorph_monai.blocks import (
    invert as invert,
)
from voxelmorph_monai.blocks import (
    jacobian_determinant as jacobian_determinant,
)
from voxelmorph_monai.blocks import (
    resize as resize,
)
from voxelmorph_monai.blocks import (
    warp as warp,
)
from voxelmorph_monai.blocks import (
    warp_labels as warp_labels,
)
from voxelmorph_monai.losses import (
    GradientLoss as GradientLoss,
)
from voxelmorph_monai.losses import (
    KLLoss as KLLoss,
)
from voxelmorph_monai.losses import (
    LabelDiceLoss as LabelDiceLoss,
)
from voxelmorph_monai.losses import (
    LNCCLoss as LNCCLoss,
)
from voxelmorph_monai.losses import (
    MINDLoss as MINDLoss,
)
from voxelmorph_monai.losses import (
    MSELoss as MSELoss,
)
from voxelmorph_monai.losses import (
    MutualInformationLoss as MutualInformationLoss,
)
from voxelmorph_monai.losses import (
    RegistrationLoss as RegistrationLoss,
)
from voxelmorph_monai.maps.files import read_chain as read_chain
from voxelmorph_monai.maps.spatial_map import SpatialMap as SpatialMap
from voxelmorph_monai.metrics import (
    dice as dice,
)
from voxelmorph_monai.metrics import (
    folding as folding,
)
from voxelmorph_monai.metrics import (
    hausdorff95 as hausdorff95,
)
from voxelmorph_monai.metrics import (
    inverse_consistency as inverse_consistency,
)
from voxelmorph_monai.metrics import (
    log_jacobian_sd as log_jacobian_sd,
)
from voxelmorph_monai.metrics import (
    target_registration_error as target_registration_error,
)
from voxelmorph_monai.networks import PRESETS as PRESETS
from voxelmorph_monai.networks import Registration as Registration
from voxelmorph_monai.networks import VoxelMorph as VoxelMorph
from voxelmorph_monai.refinement import refine as refine
from voxelmorph_monai.space.scan import Scan as Scan
from voxelmorph_monai.space.template import WorkingGrid as WorkingGrid
from voxelmorph_monai.space.template import mni152 as mni152
from voxelmorph_monai.space.template import sample_scan as sample_scan

__version__: str
