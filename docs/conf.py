"""The site, built by ``.ci/docs``.

Its pages are those that one reads in the repository, README and bundles included; the reference is made here, from the
docstrings of all modules.
"""

import os
from pathlib import Path
from typing import Any

import voxelmorph_monai

os.environ.setdefault("VXM_KERNELS", "torch")  # nothing is computed, so nothing needs to be compiled
ROOT = Path(__file__).parents[1]

project = "voxelmorph_monai"
author = "The developers of voxelmorph_monai"
copyright = author
version = release = voxelmorph_monai.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.githubpages",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",  # formulas without a server of others
]
include_patterns = ["README.md", "docs/*.md", "docs/reference/*.md", "bundles/*/docs/README.md", ".github/*.md"]
exclude_patterns = [".github/PULL_REQUEST_TEMPLATE.md"]
root_doc = "docs/index"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # links to headings, as GitHub gives them

autodoc_member_order = "bysource"
autosummary_generate = False  # the reference below has all modules
autodoc_typehints = "signature"
autodoc_preserve_defaults = True  # PRESETS and paths of this machine would fill a page
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

suppress_warnings = ["myst.header"]  # the model zoo asks for these levels of headings in a bundle's README

html_theme = "furo"
html_title = f"voxelmorph_monai {version}"
html_show_sourcelink = False
html_static_path = ["static"]
html_css_files = ["site.css"]
html_additional_pages = {"index": "redirect.html"}  # the site's root leads to docs/index.html
templates_path = ["templates"]

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def _skip(app: Any, what: str, name: str, value: object, skip: bool, options: Any) -> bool | None:
    """Leave out what a named tuple says of each field, "Alias for field number 0": the class describes its fields."""
    return True if type(value).__name__ == "_tuplegetter" else None


def _accessible(app: Any, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Let keys scroll code and tables, and give the captions of the navigation a level."""
    for part, old, new in (
        ("body", "<pre>", '<pre tabindex="0">'),
        ("body", '<div class="table-wrapper', '<div tabindex="0" class="table-wrapper'),
        ("furo_navigation_tree", 'role="heading">', 'role="heading" aria-level="2">'),
    ):
        if part in context:
            context[part] = context[part].replace(old, new)


def setup(app: Any) -> None:
    """Register what Sphinx calls."""
    app.connect("autodoc-skip-member", _skip)
    app.connect("html-page-context", _accessible, priority=900)  # after the theme


# Page of the reference: title, what is on it, the modules and folders. Modules that no page names are on "monai".
REFERENCE = {
    "tensors": (
        "Displacement fields and affine maps",
        "Displacements are tensors, in voxels of their own grid ([Conventions](../conventions.md)); affine maps "
        "between scans are 4 x 4 matrices, in mm. All other modules build on these two.",
        ["blocks", "affines"],
    ),
    "learning": (
        "Networks, losses, metrics",
        "All work in 2-D and 3-D, on tensors `(B, C, *spatial)`.",
        ["networks", "vxmdense", "losses", "metrics", "refinement", "descent", "groupwise", "synthesis", "model_card"],
    ),
    "scans": (
        "Scans and their files",
        "Where scans lie, in mm, RAS, and how they are read and written.",
        ["space", "io"],
    ),
    "maps": (
        "Maps between scans",
        "The map that a registration finds, chains of transforms, and their files ([Transforms](../transforms.md)).",
        ["maps"],
    ),
    "monai": (
        "Training and evaluation",
        "Parts that bundles name in their configs, for MONAI's engines, and the networks for anatomy and atlases.",
        [],
    ),
    "apps": ("Commands as functions", "What `vxm` does: a module for each command.", ["apps"]),
    "machine": ("Speed and memory", "Compiled loops, and memory that is kept.", ["kernels", "loops", "memory"]),
}


def _write(path: Path, text: str) -> None:
    """Write a page if it is not what it was: else Sphinx would read it again."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _write_reference(folder: Path) -> None:
    """Write the pages of :data:`REFERENCE`, and one of all public names, into ``folder``."""
    package = ROOT / project
    modules = [".".join(path.relative_to(package).with_suffix("").parts) for path in sorted(package.rglob("*.py"))]
    modules = [name for name in modules if not name.startswith("label_app.") and not name.endswith("__init__")]
    modules.remove("cli")  # vxm --help is its reference
    named = {name: page for page, (_, _, names) in REFERENCE.items() for name in names}
    folder.mkdir(exist_ok=True)
    for page, (title, about, names) in REFERENCE.items():
        here = [name for name in modules if named.get(name.split(".")[0], "monai") == page]
        here.sort(key=lambda name: names.index(name.split(".")[0]) if names else 0)
        text = f"# {title}\n\n{about}\n"
        for name in here:
            text += f"\n## `{name}`\n\n```{{eval-rst}}\n.. automodule:: {project}.{name}\n   :members:\n```\n"
        _write(folder / f"{page}.md", text)
    public = [
        f"   ~{project}.{module}.{name}\n" for name, module in voxelmorph_monai._PUBLIC.items() if name != "PRESETS"
    ]
    about = (
        "What `import voxelmorph_monai as vxm` offers; each name leads to its description. `PRESETS` are the networks' "
    )
    about += "options by name ([Training](../training.md#presets))."
    text = f"# Names of `vxm`\n\n{about}\n\n```{{eval-rst}}\n.. autosummary::\n\n{''.join(public)}```\n"
    _write(folder / "names.md", text)


_write_reference(ROOT / "docs" / "reference")
