"""Commands for data sets, weights, bundles and evaluations."""

import argparse
import sys
from pathlib import Path

from voxelmorph_monai.commands.command import Command, add_grid_arguments, grid_of

__all__ = ["COMMANDS"]


def _add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("input and output")
    group.add_argument(
        "inputs", nargs="+", type=Path, metavar="INPUT", help="folders of scans, or scan files (NIfTI, MGZ)"
    )
    group.add_argument(
        "output", type=Path, metavar="OUTPUT", help="new folder, or the folder of an interrupted run to continue"
    )
    group.add_argument(
        "--images",
        default="*.nii.gz",
        metavar="PATTERN",
        help="pattern for the file names of the scans in a folder; * stands for the name of the scan (default: "
        "%(default)s)",
    )
    group.add_argument(
        "--labels",
        metavar="PATTERN",
        help="pattern for the file names of the label maps; * stands for the name of the scan (default: no labels)",
    )
    group.add_argument(
        "--maps",
        action="store_true",
        help="paint images from label maps (with the label numbers of FreeSurfer) instead of reading scans",
    )
    add_grid_arguments(parser)
    group = parser.add_argument_group("split")
    group.add_argument(
        "--split",
        type=Path,
        metavar="JSON",
        help="file with the names of the scans in each section (default: random split)",
    )
    group.add_argument(
        "--validation",
        type=float,
        default=0.1,
        metavar="FRACTION",
        help="fraction of the scans for validation (default: %(default)s)",
    )
    group.add_argument(
        "--test",
        type=float,
        default=0.1,
        metavar="FRACTION",
        help="fraction of the scans for testing (default: %(default)s)",
    )
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random seed of the split (default: %(default)s)"
    )
    group = parser.add_argument_group("computation")
    group.add_argument(
        "--jobs", type=int, metavar="N", help="number of processes (default: as many as processors and memory allow)"
    )


def _prepare(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.prepare import prepare

    options = {
        key: getattr(args, key) for key in ("images", "labels", "maps", "split", "validation", "test", "seed", "jobs")
    }
    prepared = prepare(args.inputs, args.output, grid=grid_of(args), **options)
    for name, reason in sorted(prepared.errors.items()):
        print(f"vxm prepare: {name} failed: {reason}", file=sys.stderr)
    print(f"{prepared.datalist}\n{prepared.datalist.with_name('index.html')}: look at it before you train")
    return 1 if prepared.errors else 0


def _add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folders of evaluations; the first is the reference"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder for tables and plots")
    parser.add_argument(
        "--published",
        choices=("ixi", "lpba40", "oasis"),
        help="data set whose published results to print (default: none)",
    )
    parser.add_argument(
        "--common",
        action="store_true",
        help="compare only the pairs and structures that all runs have in common",
    )


def _compare(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.compare import compare_runs, published

    tables = published(args.published) if args.published else []
    found = compare_runs(args.runs, args.output, common=args.common)
    print(found.measures.to_string(float_format=lambda value: f"{value:.4g}", na_rep=""))
    print("difference: mean difference from the first run; low, high: its 95 % confidence interval (Student's t);")
    print("p: Wilcoxon's signed rank test; p_holm: p corrected for multiple tests (Holm)")
    print(found.note or "", end="\n" if found.note else "")
    for table in tables:
        print(
            f"\n{table.title}\nsource: {table.source}\nmeasured by others, perhaps on other scans; hence no statistics"
        )
        for method, numbers in table.methods.items():
            print(f"  {method:<18}" + ", ".join(f"{measure} {value}" for measure, value in numbers.items()))
    print(f"{args.output}: measures.csv, structures.csv, and a box plot of each measure of structures")
    return 0


def _add_quickstart_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, default=Path("quickstart"), metavar="DIR", help="new folder (default: %(default)s)"
    )


def _quickstart(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.quickstart import quickstart

    quickstart(args.output)
    return 0


def _add_datalist_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "layout",
        choices=("ixi", "oasis", "learn2reg", "lpba40", "folder", "csv"),
        metavar="LAYOUT",
        help="layout of the data set: ixi, oasis (neurite-OASIS), learn2reg, lpba40, folder (with images/ and labels/) "
        "or csv",
    )
    parser.add_argument(
        "source", type=Path, metavar="SOURCE", help="folder of the data set; for csv: table of scans or pairs"
    )
    parser.add_argument(
        "output", type=Path, metavar="OUTPUT", help="folder for datalist.json, the dataset_dir of the training bundle"
    )
    parser.add_argument(
        "--folds",
        type=int,
        metavar="N",
        help="number of folds for cross-validation (default: the published split, else 5)",
    )
    parser.add_argument(
        "--fold", type=int, default=0, metavar="K", help="fold to use as the test set, from 0 (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random seed of the split (default: %(default)s)"
    )


def _datalist(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.datalists import write_datalist

    options = {"folds": args.folds, "fold": args.fold, "seed": args.seed}
    print(write_datalist(args.layout, args.source, args.output, **options))
    return 0


def _add_label_app_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", type=Path, metavar="DIR", help="new folder for the app")


def _label_app(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.label_propagation import copy_label_app

    copy_label_app(args.output)
    print(f"monailabel start_server --app {args.output} --studies STUDIES --host 127.0.0.1")
    return 0


def _add_import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="Keras file of the authors (.h5), or PyTorch checkpoint of VxmDense (.pt)",
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="new weights file (.pt)")
    parser.add_argument("--xy", action="store_true", help="axis order x, y, as in the files of the authors' models/xy/")


def _import_weights(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.import_weights import import_weights

    preset = import_weights(args.source, args.output, xy=args.xy)
    print(f"{args.output}: weights of preset {preset}, for intensities in [0, 1]")
    return 0


def _add_pack_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of the bundle")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder for the zip file; other bundles may be in it"
    )
    parser.add_argument(
        "--url", default="", help="address at which DIR will be published, for model_info.json (default: none)"
    )


def _pack_bundle(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.pack_bundle import pack_bundle

    packed = pack_bundle(args.bundle, args.output, args.url)
    if packed.left_out:
        print(f"left out, as they are not part of a bundle: {', '.join(packed.left_out)}")
    print(f"{packed.archive}: {len(packed.files)} files, listed in {args.output / 'model_info.json'}")
    return 0


def _add_atlas_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "scans",
        nargs="*",
        type=Path,
        metavar="IMAGE LABELS",
        help="skull-stripped T1 scan and label map of each atlas, in turn (default: MNI152 and its tissues)",
    )
    parser.add_argument(
        "--names", type=Path, metavar="CSV", help="table of the label names, with the columns number and name"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder for the bundle")
    parser.add_argument(
        "--license",
        type=Path,
        metavar="FILE",
        help="text file with the licence of the scans and labels (default: none)",
    )


def _make_atlas_bundle(args: argparse.Namespace) -> int:
    from voxelmorph_monai.apps.atlas_bundle import make_atlas_bundle

    if len(args.scans) % 2:
        raise ValueError(f"each atlas needs a scan and a label map, but {len(args.scans)} files were given.")
    atlases = list(zip(args.scans[::2], args.scans[1::2], strict=True))
    bundle = make_atlas_bundle(atlases, args.output, names=args.names, licence=args.license)
    print(f"{bundle}: read docs/README.md")
    return 0


COMMANDS = {
    "prepare": Command(
        "align T1 scans to MNI152 for training, on one grid and with intensities from 0 to 1",
        "vxm prepare scans/ prepared/ --images '*_t1.nii.gz' --labels '*_labels.nii.gz'",
        _add_prepare_arguments,
        _prepare,
    ),
    "compare": Command(
        "compare evaluations of the same pairs, with paired statistics and published results",
        "vxm compare training_a training_b --output comparison --published ixi",
        _add_compare_arguments,
        _compare,
    ),
    "datalist": Command(
        "write datalist.json for a training data set: IXI, OASIS, Learn2Reg, LPBA40, a folder or a table",
        "vxm datalist oasis neurite-oasis/ oasis/",
        _add_datalist_arguments,
        _datalist,
    ),
    "label-app": Command(
        "copy the MONAI Label app, which offers registration and labels in 3D Slicer and OHIF",
        "vxm label-app voxelmorph",
        _add_label_app_arguments,
        _label_app,
    ),
    "make-atlas-bundle": Command(
        "make a MONAI bundle that segments skull-stripped T1 scans with labelled atlases",
        "vxm make-atlas-bundle a.nii.gz a_labels.nii.gz --names labels.csv --output bundles/my_atlas_segmentation",
        _add_atlas_arguments,
        _make_atlas_bundle,
    ),
    "import-weights": Command(
        "import weights of the VoxelMorph authors: Keras files (CVPR 2018, MICCAI 2018), PyTorch's VxmDense",
        "vxm import-weights cvpr2018_vm2_cc.h5 vm2.pt",
        _add_import_arguments,
        _import_weights,
    ),
    "pack-bundle": Command(
        "pack a bundle as the zip file that MONAI downloads, and list it in model_info.json",
        "vxm pack-bundle bundles/brain_t1_registration --output release --url https://host/releases/download/v1",
        _add_pack_arguments,
        _pack_bundle,
    ),
    "quickstart": Command(
        "register two sample brains that are included",
        "vxm quickstart --output quickstart",
        _add_quickstart_arguments,
        _quickstart,
    ),
}
