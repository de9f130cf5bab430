r"""Read the vertices of surface files in scanner RAS, and write the same file with other vertices.

================  ==========================================================================================
GIFTI             ``.gii``, ``.surf.gii``: scanner RAS, or tkr RAS if you say so
FreeSurfer        no extension, or ``.white``, ``.pial``, ``.inflated``, ...: tkr RAS, unless "real RAS" is set
meshes            ``.vtk``, ``.vtp``, ``.stl``, ``.ply``: as stated by the comment ``SPACE=``, LPS without one
================  ==========================================================================================

The origin of FreeSurfer's tkr RAS is the centre of the conformed volume, and its axes follow those of the volume. A
surface in tkr RAS therefore belongs to one volume, which the footer of the file describes. There is no rule for meshes;
3D Slicer and ITK write LPS.
"""

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine
from nibabel.freesurfer.io import read_geometry, write_geometry
from nibabel.gifti.gifti import GiftiCoordSystem
from nibabel.gifti.util import gifti_encoding_codes
from numpy.typing import NDArray

from voxelmorph_monai.affines import LIA, Affine, ImageGrid, ras_to_lps, spacing
from voxelmorph_monai.io.atomic import atomic
from voxelmorph_monai.io.formats import reading

__all__ = ["FRAMES", "SurfaceFile", "read_surface", "save_surface", "tkr_affine"]

FRAMES = ("RAS", "LPS", "tkr")
"""Coordinate systems of vertices: scanner RAS, scanner LPS, or FreeSurfer's tkr RAS."""
_MESHES = (".vtk", ".vtp", ".stl", ".ply")
_TRIANGLES, _POINTS = "NIFTI_INTENT_TRIANGLE", "NIFTI_INTENT_POINTSET"
_VOLUME = ("VolGeom", "SurfaceCenter")  # prefixes of GIFTI metadata about the volume of the old vertices
_INTEGERS = {"u1": np.uint8, "i1": np.int32, "i2": np.int32, "u2": np.int32, "i8": np.int32, "u4": np.int32}

_Points = NDArray[np.float64]


class SurfaceFile(NamedTuple):
    """A surface, and a function that writes the same file with other vertices.

    Attributes:
        points: vertices ``(N, 3)`` in scanner RAS, mm, converted from the coordinate system of the file.
        frame: coordinate system of the file, one of ``FRAMES``.
        note: an assumption to show to the user, or empty.
        write: ``write(path, points, grid, flip)`` writes the file with other vertices (scanner RAS, mm) for the volume
            of ``grid``; ``flip`` reverses the order of the vertices in each triangle.
    """

    points: _Points
    frame: str
    note: str
    write: Callable[[Path, _Points, ImageGrid | None, bool], None]


def tkr_affine(grid: ImageGrid) -> Affine:
    """4 x 4 map from FreeSurfer's tkr RAS of a volume to scanner RAS (mm).

    The origin of tkr RAS is the centre of the volume, and its axes are those of a conformed volume.
    """
    tkr = np.eye(4)
    tkr[:3, :3] = LIA * spacing(grid.affine)
    tkr[:3, 3] = -tkr[:3, :3] @ (np.array(grid.size) / 2)
    return grid.affine @ np.linalg.inv(tkr)


def _handedness(matrix: NDArray[np.floating[Any]]) -> bool:
    return bool(np.linalg.det(matrix[:3, :3]) < 0)


def _frame_matrix(frame: str, grid: ImageGrid | None, path: Path) -> Affine:
    """4 x 4 map from a coordinate system to scanner RAS (mm)."""
    if frame == "tkr":
        if grid is None:
            raise ValueError(
                f"{path} is in FreeSurfer's tkr RAS, but does not describe its volume. Give the image that the surface "
                "was made from (--volume)."
            )
        return tkr_affine(grid)
    return ras_to_lps(3) if frame == "LPS" else np.eye(4)


def _footer_matrix(info: dict[str, Any]) -> Affine:
    """4 x 4 map from tkr RAS to scanner RAS (mm), from the footer of a FreeSurfer surface."""
    matrix = np.eye(4)
    axes = np.stack([np.asarray(info[key], dtype=np.float64) for key in ("xras", "yras", "zras")], axis=1)
    matrix[:3, :3], matrix[:3, 3] = axes @ np.linalg.inv(LIA), info["cras"]
    return matrix


def _footer(info: dict[str, Any], grid: ImageGrid) -> dict[str, Any]:
    """Footer of a FreeSurfer surface for the volume of ``grid``."""
    sides = spacing(grid.affine)
    axes = (grid.affine[:3, :3] / sides).T
    centre = grid.affine[:3, :3] @ (np.array(grid.size) / 2) + grid.affine[:3, 3]
    return {
        **info,
        "head": np.array([2, 0, 20], np.int32),
        "valid": "1  # volume info valid",
        "filename": info.get("filename", "unknown"),
        "volume": np.array(grid.size),
        "voxelsize": sides,
        **dict(zip(("xras", "yras", "zras"), axes, strict=True)),
        "cras": centre,
    }


def _footer_start(content: bytes, num_vertices: int, num_triangles: int) -> int:
    """Offset of the footer of a FreeSurfer surface, after a magic number, two lines, both counts and both tables."""
    return content.index(b"\n\n", 3) + 2 + 8 + 12 * (num_vertices + num_triangles)


def _read_footer(footer: bytes) -> tuple[bool, dict[str, Any]]:
    """Read whether vertices are in scanner RAS ("real RAS", unknown to nibabel), and the data about the volume."""
    real = footer[:4] == (2).to_bytes(4, "big") and footer[4:8] != bytes(4)
    pairs = (line.split("=", 1) for line in footer.decode("latin-1").splitlines() if "=" in line)
    said = {key.strip()[-9:].split("\x14")[-1]: value.strip() for key, value in pairs}  # byte 20 precedes the first key
    info: dict[str, Any] = {key: said[key] for key in ("valid", "filename") if key in said}
    numbers = ("volume", "voxelsize", "xras", "yras", "zras", "cras")
    info |= {key: np.array(said[key].split(), dtype=np.float64) for key in numbers if key in said}
    return real, info


def _read_freesurfer(path: Path, frame: str | None, volume: ImageGrid | None) -> SurfaceFile:
    with reading(path):
        vertices, triangles, stamp = read_geometry(str(path), read_stamp=True)
        content = path.read_bytes()
        real, info = _read_footer(content[_footer_start(content, len(vertices), len(triangles)) :])
    said = "RAS" if real else "tkr"
    if frame not in (None, said):
        raise ValueError(f"{path} states that it is in {said}, which contradicts --coordinates {frame}.")
    if real:
        matrix = np.eye(4)
    elif info.get("valid", "").startswith("1") and "cras" in info and volume is None:
        matrix = _footer_matrix(info)
    else:
        matrix = _frame_matrix("tkr", volume, path)

    def write(target: Path, points: _Points, grid: ImageGrid | None, flip: bool) -> None:
        if grid is None:
            raise ValueError(
                f"FreeSurfer surfaces store an image's grid. Give the image that {path} is mapped to (--reference)."
            )
        out = np.eye(4) if real else tkr_affine(grid)
        turned = flip != (_handedness(matrix) != _handedness(out))
        write_geometry(
            str(target),
            apply_affine(np.linalg.inv(out), points),
            triangles[:, ::-1] if turned else triangles,
            create_stamp=stamp.rstrip("\n"),
            volume_info=_footer(info, grid),
        )
        if real:
            with target.open("r+b") as file:
                file.seek(_footer_start(file.read(), len(points), len(triangles)) + 4)
                file.write((1).to_bytes(4, "big"))

    return SurfaceFile(apply_affine(matrix, vertices), said, "", write)


def _gifti_type(array: NDArray[Any]) -> NDArray[Any]:
    """Convert an array to a type that every GIFTI reader accepts: uint8, int32 or float32."""
    kind = array.dtype.newbyteorder("=").str[1:]
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    wanted: Any = _INTEGERS.get(kind, np.int32)
    if array.size and (array.max() > np.iinfo(wanted).max or array.min() < np.iinfo(wanted).min):
        raise ValueError(f"an array of {array.dtype} cannot be written as GIFTI: its numbers go up to {array.max()}.")
    return array.astype(wanted)


def _read_gifti(path: Path, frame: str | None, volume: ImageGrid | None) -> SurfaceFile:
    with reading(path):
        image: Any = nib.load(path)
        arrays = image.get_arrays_from_intent(_POINTS)
    if len(arrays) != 1:
        raise ValueError(f"{path} holds {len(arrays)} sets of vertices, but a surface has one.")
    vertices, meta = arrays[0], dict(arrays[0].meta)
    centre = [float(meta.get(f"VolGeomC_{axis}", 0) or 0) for axis in "RAS"]
    # nibabel keeps only the last data space, so all are taken from the text
    spaces = set(re.findall(rb"<DataSpace>\s*(?:<!\[CDATA\[)?\s*(\w+)", path.read_bytes()))
    if frame is None and spaces <= {b"NIFTI_XFORM_UNKNOWN", b"0"} and any(centre):
        raise ValueError(
            f"{path} does not say whether its vertices are in scanner RAS or in FreeSurfer's tkr RAS: it has no data "
            f"space, but a volume with its centre at {centre} (VolGeomC). Pass --coordinates RAS or tkr."
        )
    said = frame or "RAS"
    if said == "tkr" and volume is None:
        matrix = np.eye(4)
        axes = [[float(meta.get(f"VolGeom{a}_{b}", np.nan)) for b in "RAS"] for a in "XYZ"]
        if not np.isfinite(axes).all():
            raise ValueError(
                f"{path} does not describe the volume of its tkr RAS. Give the image that the surface was made from "
                "(--volume)."
            )
        matrix[:3, :3], matrix[:3, 3] = np.array(axes).T @ np.linalg.inv(LIA), centre
    else:
        matrix = _frame_matrix(said, volume, path)

    def write(target: Path, points: _Points, grid: ImageGrid | None, flip: bool) -> None:
        """Write the vertices in scanner RAS, whatever the coordinate system of the input."""
        turned = flip != _handedness(matrix)
        for array in image.darrays:
            data = points if array is vertices else array.data
            name = nib.nifti1.intent_codes.niistring[array.intent]
            array.data = _gifti_type(data[:, ::-1] if name == _TRIANGLES and turned else data)
            array.datatype = nib.nifti1.data_type_codes.code[array.data.dtype.type]
            array.encoding = gifti_encoding_codes.code["GIFTI_ENCODING_B64GZ"]
            array.ext_fname, array.ext_offset, array.ind_ord = "", 0, 1
        vertices.coordsys = GiftiCoordSystem("NIFTI_XFORM_SCANNER_ANAT", "NIFTI_XFORM_SCANNER_ANAT", np.eye(4))
        for key in [key for key in vertices.meta if key.startswith(_VOLUME)]:
            del vertices.meta[key]
        nib.save(image, target)

    return SurfaceFile(apply_affine(matrix, vertices.data), said, "", write)


def _vtk(module: str, path: Path) -> Any:
    try:
        return importlib.import_module(f"vtkmodules.{module}")  # optional, and slow to import
    except ImportError as error:
        raise ValueError(f"{path} needs VTK: pip install 'voxelmorph_monai[surfaces]'.") from error


_VTK_CLASSES = {  # module, reader, writer
    ".vtk": ("vtkIOLegacy", "vtkPolyDataReader", "vtkPolyDataWriter"),
    ".vtp": ("vtkIOXML", "vtkXMLPolyDataReader", "vtkXMLPolyDataWriter"),
    ".stl": ("vtkIOGeometry", "vtkSTLReader", "vtkSTLWriter"),
    ".ply": ("vtkIOPLY", "vtkPLYReader", "vtkPLYWriter"),
}


def _comment(reader: Any, mesh: Any, ending: str) -> str:
    """Comment or header of a mesh file, where its coordinate system may be stated."""
    if ending == ".vtp":
        array = mesh.GetFieldData().GetAbstractArray("SPACE")
        return f"SPACE={array.GetValue(0)}" if array is not None and array.GetNumberOfValues() else ""
    if ending == ".ply":
        comments = reader.GetComments()
        return "\n".join(comments.GetValue(i) for i in range(comments.GetNumberOfValues()))
    return str(reader.GetHeader() or "")


def _declare(writer: Any, mesh: Any, ending: str, comment: str, frame: str) -> None:
    """State the coordinate system in the comment of a mesh file, and keep the rest of the comment."""
    said = re.sub(r"SPACE=\w+", "", comment).strip() if ending != ".vtp" else ""
    if ending == ".vtp":
        array = _vtk("vtkCommonCore", Path(ending)).vtkStringArray()
        array.SetName("SPACE")
        array.InsertNextValue(frame)
        mesh.GetFieldData().AddArray(array)
    elif ending == ".ply":
        for line in [*filter(None, said.split("\n")), f"SPACE={frame}"]:
            if "VTK generated" not in line:  # the writer adds this line itself
                writer.AddComment(line)
    else:
        writer.SetHeader(f"{said[:60]} SPACE={frame}".strip())


def _read_mesh(path: Path, frame: str | None, volume: ImageGrid | None) -> SurfaceFile:
    ending = path.suffix.lower()
    module, reads, writes = _VTK_CLASSES[ending]
    classes = _vtk(module, path)
    numpy_support = _vtk("util.numpy_support", path)
    reader = getattr(classes, reads)()
    problems: list[str] = []
    reader.AddObserver("ErrorEvent", lambda *_: problems.append("VTK cannot read it"))
    reader.SetFileName(str(path))
    reader.Update()
    mesh = reader.GetOutput()
    if problems or not mesh.GetNumberOfPoints():
        raise ValueError(
            f"{path} is damaged, or not a mesh with vertices: {problems[0] if problems else 'it is empty'}."
        )
    comment = _comment(reader, mesh, ending)
    found = re.search(r"SPACE=(RAS|LPS)", comment)
    if found and frame not in (None, found[1]):
        raise ValueError(f"{path} states that it is in {found[1]}, which contradicts --coordinates {frame}.")
    said = found[1] if found else frame or "LPS"
    note = "" if found or frame else f"{path} names no coordinate system: LPS is assumed, as in 3D Slicer and ITK"
    matrix = _frame_matrix(said, volume, path)

    def write(target: Path, points: _Points, grid: ImageGrid | None, flip: bool) -> None:
        out = _frame_matrix(said, grid, path) if said == "tkr" else matrix
        places = apply_affine(np.linalg.inv(out), points).astype(np.float32)
        mesh.GetPoints().SetData(numpy_support.numpy_to_vtk(places, deep=True))
        for data in (mesh.GetPointData(), mesh.GetCellData()):
            if data.GetNormals() is not None:
                data.RemoveArray(data.GetNormals().GetName())  # normals of the old shape
        if flip != (_handedness(matrix) != _handedness(out)):
            for cell in range(mesh.GetPolys().GetNumberOfCells()):
                mesh.GetPolys().ReverseCellAtId(cell)
        writer = getattr(classes, writes)()
        failed: list[bool] = []
        writer.AddObserver("ErrorEvent", lambda *_: failed.append(True))
        if ending != ".vtp":
            writer.SetFileTypeToBinary()
        _declare(writer, mesh, ending, comment, said)
        writer.SetFileName(str(target))
        writer.SetInputData(mesh)
        if not writer.Write() or failed:
            raise OSError(f"{target} cannot be written: is the disk full?")

    return SurfaceFile(apply_affine(matrix, numpy_support.vtk_to_numpy(mesh.GetPoints().GetData())), said, note, write)


def read_surface(path: str | Path, frame: str | None = None, volume: ImageGrid | None = None) -> SurfaceFile:
    """Read a surface: GIFTI, VTK, STL or PLY by its extension, and FreeSurfer's format for any other extension.

    Args:
        path: file to read.
        frame: one of ``FRAMES``, for a file that does not state its coordinate system.
        volume: grid of the image that a surface in tkr RAS was made from, for a file that does not describe it.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a complete surface with finite vertices, or its coordinate system is unknown.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    if frame not in (None, *FRAMES):
        raise ValueError(f"'{frame}' is not a coordinate system. Choose one of {', '.join(FRAMES)}.")
    ending = path.suffix.lower()
    read = _read_gifti if ending == ".gii" else _read_mesh if ending in _MESHES else _read_freesurfer
    surface = read(path, frame, volume)
    if not np.isfinite(surface.points).all():
        raise ValueError(f"{path} has {int((~np.isfinite(surface.points)).any(1).sum())} vertices of NaN or infinity.")
    return surface


def save_surface(
    path: str | Path, source: SurfaceFile, points: NDArray[np.floating[Any]], grid: ImageGrid | None, mirrored: bool
) -> None:
    """Write the file ``source`` with other vertices, completely or not at all.

    Args:
        path: file to write.
        source: result of :func:`read_surface`.
        points: vertices ``(N, 3)`` in scanner RAS, mm.
        grid: grid of the image in whose space the vertices lie, which FreeSurfer files store.
        mirrored: whether the map is a reflection, so that the triangles must be turned over.
    """
    with atomic(path) as temporary:
        source.write(temporary, np.asarray(points, dtype=np.float64), grid, mirrored)
