"""VoxelMorph on MONAI: learned deformable registration of medical images."""

__version__ = "0.1.0"
