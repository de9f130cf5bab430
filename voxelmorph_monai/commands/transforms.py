"""The commands ``apply``, ``compose``, ``invert``, ``convert`` and ``jacobian``."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from voxelmorph_monai.commands.command import Command

__all__ = ["COMMANDS"]

_ORDER = """\
transform files:
  .h5 .tfm .txt .mat  transforms of vxm, ITK, 3D Slicer and ANTs (GenericAffine)
  .nii .nii.gz        displacement fields of ANTs (Warp), SPM (y_) and NiftyReg
                      (-def, -disp)
  .lta                linear transforms of FreeSurfer
  '[FILE,1]'          the inverse of the transform in FILE
Several transforms are listed as for ANTs: a point of the fixed image passes
through the first one first."""


def _file(text: str) -> Path:
    """Path of an output file, or prefix of several; rejects a final slash, which Path would drop."""
    if text.endswith(("/", os.sep)):
        raise argparse.ArgumentTypeError(f"'{text}' is a folder. Give the name of a file, or the prefix of its name")
    return Path(text)


def _add_transforms(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("transforms", nargs="+", metavar="TRANSFORM", help="one or more transform files, see below")
    parser.epilog = f"{_ORDER}\n\n{parser.epilog}"


def _add_saving_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--to",
        choices=("itk", "1007", "1006", "ants", "lta", "fsl"),
        help="output format: itk, ants, fsl, lta (FreeSurfer; linear transforms only), or the NIfTI intent code of a "
        "displacement field, 1007 (LPS) or 1006 (RAS) (default: by the file name, 1007 for .nii and .nii.gz)",
    )
    parser.add_argument(
        "--reference", type=Path, metavar="FILE", help="fixed image, on whose grid a displacement field is written"
    )
    parser.add_argument("--moving", type=Path, metavar="FILE", help="moving image, required for fsl and lta")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def _saving(args: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    """Frames of both images (None if not given), and arguments of ``save_chain``, after a check of the output file."""
    from voxelmorph_monai.maps.files import check_target
    from voxelmorph_monai.space.scan import Frame

    images = args.reference, args.moving
    inputs = [*args.transforms, *filter(None, images)]
    check_target(args.output, args.to, args.overwrite, inputs)
    frames = [None if path is None else Frame.read(path) for path in images]
    grid, moving_grid = (frame and frame.grid for frame in frames)
    how = {"form": args.to, "overwrite": args.overwrite, "inputs": inputs}
    return frames, {**how, "grid": grid, "moving_grid": moving_grid}


def _report(residual: float) -> None:
    if residual:
        print(f"inverted numerically, with an error of at most {residual:.2g} mm")


def _interpolation(text: str) -> str:
    """Name of an interpolation; ``label``, the old name of ``linear`` for label maps, is still accepted."""
    if text != "label":
        return text
    print("vxm apply: --interpolation label is now called linear", file=sys.stderr)
    return "linear"


def _add_apply_arguments(parser: argparse.ArgumentParser) -> None:
    _add_transforms(parser)
    group = parser.add_argument_group("input (exactly one of these)")
    what = group.add_mutually_exclusive_group(required=True)
    what.add_argument("--image", type=Path, metavar="FILE", help="moving image, or 4-D NIfTI series")
    what.add_argument("--labels", type=Path, metavar="FILE", help="label map of the moving image")
    what.add_argument(
        "--vectors",
        type=Path,
        metavar="FILE",
        help="moving image with a vector of three numbers per voxel; the vectors are rotated as well",
    )
    what.add_argument("--points", type=Path, metavar="FILE", help="points to map (.csv, .fcsv, .mrk.json)")
    what.add_argument(
        "--surface", type=Path, metavar="FILE", help="surface to map (GIFTI, FreeSurfer, .vtk, .vtp, .stl, .ply)"
    )
    what.add_argument("--streamlines", type=Path, metavar="FILE", help="streamlines to map (.trk, .tck, .trx)")
    group.add_argument(
        "--series", type=int, metavar="N", help="number of the DICOM series to use if the input holds several"
    )
    group = parser.add_argument_group("images and labels")
    group.add_argument(
        "--reference",
        type=Path,
        metavar="FILE",
        help="fixed image, whose grid the output gets; for a surface or streamlines, the image that they are mapped to",
    )
    group.add_argument(
        "--bvec", type=Path, metavar="FILE", help="file of diffusion gradients (.bvec of FSL), rotated like the series"
    )
    group.add_argument(
        "--reference-series",
        type=int,
        metavar="N",
        help="number of the DICOM series to use if the reference holds several",
    )
    group.add_argument(
        "--interpolation",
        type=_interpolation,
        choices=("linear", "nearest", "bspline", "lanczos"),
        help="interpolation method: any of these for images (default: linear); nearest or linear for labels, where "
        "linear takes the label with the largest interpolated weight (default: nearest)",
    )
    group = parser.add_argument_group("points, surfaces and streamlines")
    group.add_argument(
        "--points-of",
        choices=("fixed", "moving"),
        help="image that the points, surface or streamlines belong to; those of the fixed image are mapped to the "
        "moving image by the transform, those of the moving image to the fixed image by its inverse",
    )
    group.add_argument(
        "--coordinates",
        choices=("RAS", "LPS", "tkr"),
        help="coordinate system, required if a CSV file, surface or vector image does not state it; tkr is the surface "
        "RAS of FreeSurfer",
    )
    group.add_argument("--volume", type=Path, metavar="FILE", help="image that the FreeSurfer surface was made from")
    group = parser.add_argument_group("output")
    group.add_argument("--output", type=Path, required=True, metavar="FILE", help="file to write")
    group.add_argument("--overwrite", action="store_true", help="replace an existing output")


def _apply(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.apply import apply_to_image, apply_to_points
    from voxelmorph_monai.apps.apply_series import is_series

    if args.surface is not None or args.streamlines is not None:
        return _apply_to_shape(args)
    if args.vectors is not None or (args.image is not None and is_series(args.image)):
        return _apply_to_series(args)
    if args.bvec is not None:
        raise ValueError("--bvec is given without a series. Give a 4-D NIfTI file as --image, or leave out --bvec.")
    if args.volume is not None or args.coordinates == "tkr":
        raise ValueError("--volume and --coordinates tkr apply only to surfaces.")
    if args.points is None and (args.reference is None or args.points_of or args.coordinates):
        raise ValueError("an image or label map needs --reference, and takes no --points-of or --coordinates.")
    if args.points is not None and (args.points_of is None or args.reference or args.interpolation):
        raise ValueError("points need --points-of (fixed or moving), and take no --reference or --interpolation.")
    series = {"series": args.series, "reference_series": args.reference_series}
    if args.points is not None and any(number is not None for number in series.values()):
        raise ValueError("--series and --reference-series choose images; they cannot be combined with --points.")
    options: dict[str, Any] = {"overwrite": args.overwrite}
    if args.points is not None:
        residual = apply_to_points(
            args.transforms,
            args.points,
            args.output,
            drawn_in=args.points_of,
            coordinates=args.coordinates,
            **options,
        )
    else:
        kind, path = ("image", args.image) if args.image else ("labels", args.labels)
        options |= {"kind": kind, "interpolation": args.interpolation, **series}
        residual = apply_to_image(args.transforms, path, args.reference, args.output, **options)
    _report(residual)
    return 0


def _apply_to_series(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.apply_series import apply_to_series, apply_to_vectors

    if args.reference is None or args.points_of or args.volume or args.series is not None:
        raise ValueError("a series or vectors need --reference, and take no --points-of, --volume or --series.")
    options = {"interpolation": args.interpolation or "linear", "overwrite": args.overwrite}
    if args.vectors is not None:
        if args.bvec is not None or args.reference_series is not None:
            raise ValueError("vectors take neither --bvec nor --reference-series.")
        options |= {"coordinates": args.coordinates}
        residual = apply_to_vectors(args.transforms, args.vectors, args.reference, args.output, **options)
    else:
        options |= {"bvec": args.bvec, "reference_series": args.reference_series, "progress": True}
        residual = apply_to_series(args.transforms, args.image, args.reference, args.output, **options)
    _report(residual)
    return 0


def _apply_to_shape(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.apply_shapes import apply_to_streamlines, apply_to_surface

    if args.points_of is None or args.interpolation or args.series is not None or args.reference_series is not None:
        raise ValueError("surfaces and streamlines need --points-of, and take neither --interpolation nor a series.")
    options = {"made_from": args.points_of, "reference": args.reference, "overwrite": args.overwrite}
    if args.surface is not None:
        options |= {"coordinates": args.coordinates, "volume": args.volume}
        residual = apply_to_surface(args.transforms, args.surface, args.output, **options)
    else:
        if args.coordinates or args.volume:
            raise ValueError("streamlines are in scanner RAS: --coordinates and --volume apply only to surfaces.")
        residual = apply_to_streamlines(args.transforms, args.streamlines, args.output, **options)
    _report(residual)
    return 0


def _add_compose_arguments(parser: argparse.ArgumentParser) -> None:
    _add_transforms(parser)
    parser.add_argument("--output", type=_file, required=True, metavar="FILE", help="transform file to write")
    _add_saving_arguments(parser)


def _compose(args: argparse.Namespace) -> int:
    from voxelmorph_monai.maps.files import open_chain, save_chain

    frames, saving = _saving(args)
    found = open_chain(args.transforms, *frames)
    save_chain(args.output, found.transform, spatial_dims=found.spatial_dims, **saving)
    _report(found.residual)
    return 0


def _invert(args: argparse.Namespace) -> int:
    from voxelmorph_monai.maps.files import open_chain, save_chain

    frames, saving = _saving(args)
    found = open_chain(args.transforms, *frames).inverse()
    save_chain(args.output, found.transform, spatial_dims=found.spatial_dims, **saving)
    _report(found.residual)
    return 0


def _add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="INPUT", help="transform file, see below")
    parser.epilog = f"{_ORDER}\n\n{parser.epilog}"
    parser.add_argument(
        "output", type=_file, metavar="OUTPUT", help="file to write; with --to ants, prefix of two files"
    )
    parser.add_argument(
        "--from",
        dest="origin",
        choices=("fsl",),
        help="program that wrote INPUT, only needed for FSL: then give FSL's -in image as --moving and its -ref image "
        "as --reference (default: recognised by the file)",
    )
    _add_saving_arguments(parser)


def _convert(args: argparse.Namespace) -> int:
    from voxelmorph_monai.maps.files import read_fsl_transform, save_chain

    args.transforms = [args.input]
    if args.origin is None:
        return _compose(args)
    if args.reference is None or args.moving is None:
        raise ValueError("an FSL transform can be read only with its two images: give --reference and --moving.")
    _, saving = _saving(args)
    save_chain(args.output, read_fsl_transform(args.input, saving["grid"], saving["moving_grid"]), **saving)
    return 0


def _add_jacobian_arguments(parser: argparse.ArgumentParser) -> None:
    _add_transforms(parser)
    parser.add_argument(
        "--reference", type=Path, required=True, metavar="FILE", help="fixed image, whose grid the output gets"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="image to write")
    parser.add_argument("--log", action="store_true", help="write the natural logarithm of the determinant")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def _jacobian(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.apply import jacobian_file

    jacobian_file(args.transforms, args.reference, args.output, logarithm=args.log, overwrite=args.overwrite)
    return 0


COMMANDS = {
    "apply": Command(
        "apply transforms (of vxm, ITK, ANTs, 3D Slicer or FreeSurfer) to an image, labels, points, a surface or "
        "streamlines",
        "vxm apply registered/forward.h5 --image moving.nii.gz --reference fixed.nii.gz --output warped.nii.gz",
        _add_apply_arguments,
        _apply,
    ),
    "compose": Command(
        "combine several transforms into one",
        "vxm compose 1Warp.nii.gz 0GenericAffine.mat --output both.h5",
        _add_compose_arguments,
        _compose,
    ),
    "invert": Command(
        "invert a transform: exactly if it is linear, numerically if it is a displacement field",
        "vxm invert displacement.nii.gz --output inverse.h5",
        _add_compose_arguments,
        _invert,
    ),
    "convert": Command(
        "convert a transform to the format of ITK, ANTs, FSL or FreeSurfer, or to a NIfTI displacement field",
        "vxm convert forward.h5 displacement.nii.gz --reference fixed.nii.gz",
        _add_convert_arguments,
        _convert,
    ),
    "jacobian": Command(
        "write the Jacobian determinant of a transform: the change of volume at each voxel of the fixed image",
        "vxm jacobian forward.h5 --reference fixed.nii.gz --output jacobian.nii.gz",
        _add_jacobian_arguments,
        _jacobian,
    ),
}
