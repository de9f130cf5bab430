"""The documentation keeps its word: its code runs, and what it names exists."""

import doctest
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from monai.bundle import ConfigParser
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS

from voxelmorph_monai import cli
from voxelmorph_monai.networks import PRESETS, VoxelMorph

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "bundles" / "brain_t1_registration"
README, BUNDLE_README = ROOT / "README.md", BUNDLE / "docs" / "README.md"
TRAINING = ROOT / "docs" / "training.md"
GUIDES = [ROOT / ".github" / f"{name}.md" for name in ("CODE_OF_CONDUCT", "CONTRIBUTING", "SECURITY")]
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), *GUIDES, BUNDLE_README]


def of_pages(*pages: Path) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=[str(page.relative_to(ROOT)) for page in pages])


every_page = of_pages(*PAGES)

# printed for every config that is parsed; what it asks is said in the README
pytestmark = pytest.mark.filterwarnings("ignore:parsing config_file.*")


class Block(NamedTuple):
    language: str
    line: int  # of the page, where the code starts, from 0
    code: str


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(found[1], text.count("\n", 0, found.start()) + 1, found[2])


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """Words of every command in the shell blocks of ``page``."""
    lines = [line for block in blocks(page) if block.language == "bash" for line in _joined(block.code).splitlines()]
    return [shlex.split(part, comments=True) for line in lines for part in line.split(" && ") if part.strip()]


def _joined(code: str) -> str:
    return code.replace("\\\n", " ")


def run_python(block: Block, page: Path, names: dict[str, object]) -> dict[str, object]:
    """Run the examples of ``block`` with the ``names`` of earlier ones; give the names after it."""
    test = doctest.DocTestParser().get_doctest(block.code, names, page.name, str(page), block.line)
    assert test.examples, f"{page.name}, line {block.line}: Python without >>> is not checked"
    report: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.append, clear_globs=False)
    assert not report, "".join(report)
    return test.globs


def run_shell(block: Block, folder: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    command = ["bash", "-euc", block.code]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"line {block.line}:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small images: a second thread would only be waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@every_page
def test_code_runs_and_prints_what_it_says(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(BUNDLE, tmp_path / BUNDLE.relative_to(ROOT), ignore=shutil.ignore_patterns("models"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks(page):
        if block.language == "python":
            names = run_python(block, page, names)
        elif block.language == "bash" and page.name == "tutorial.md":  # elsewhere commands need scans, and hours
            run_shell(block, tmp_path)
        elif block.language == "bash" and page.name == "transforms.md":  # in this process: starting one takes seconds
            for line in block.code.splitlines():
                assert cli.main(shlex.split(line)[1:]) == 0, line


def test_the_pages_hold_examples() -> None:
    languages = {page.name: [block.language for block in blocks(page)] for page in PAGES[:-1]}
    for name in ("README.md", "conventions.md", "transforms.md", "tutorial.md"):
        assert "python" in languages[name], name
    assert "bash" in languages["tutorial.md"]


@every_page
def test_links_and_pictures_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert targets or page.name == "changelog.md"
    for target in targets:
        name, _, anchor = target.partition("#")
        if not name.startswith(("http:", "https:")):
            path = (page.parent / name).resolve() if name else page
            assert path.is_file(), f"{page.name} names {target}"
            if anchor:
                assert anchor in _anchors(path), f"{page.name} names {target}"


def _anchors(page: Path) -> set[str]:
    """Anchors that GitHub gives the headings of ``page``."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_named_configs_exist(page: Path) -> None:
    for name in re.findall(r"configs/[\w.-]+\.(?:json|yaml|conf)", page.read_text(encoding="utf-8")):
        assert (BUNDLE / name).is_file(), f"{page.name} names {name}"


@every_page
def test_named_modules_exist(page: Path) -> None:
    for name in re.findall(r"voxelmorph_monai\.([a-zA-Z_.]*\w)", page.read_text(encoding="utf-8")):
        found: object = importlib.import_module("voxelmorph_monai")
        for part in name.split("."):
            try:
                found = importlib.import_module(f"{getattr(found, '__name__', '')}.{part}")
            except ImportError:
                assert hasattr(found, part), f"{page.name} names voxelmorph_monai.{name}"
                break  # a name in the module


def options(words: list[str]) -> dict[str, str]:
    return {word[2:]: words[i + 1] for i, word in enumerate(words) if word.startswith("--") and i + 1 < len(words)}


@of_pages(TRAINING, ROOT / "docs" / "tutorial.md", BUNDLE_README)
def test_bundle_commands_name_what_the_configs_hold(page: Path) -> None:
    """MONAI adds a misspelt option to the config without a word."""
    runs = [words for words in commands(page) if "monai.bundle" in words and "run" in words]
    assert runs
    for words in runs:
        given = options(words[words.index("run") :])
        listed = given.pop("config_file")
        files = re.findall(r"configs/[\w.]+", listed)
        parser = ConfigParser()
        parser.read_config([str(BUNDLE / file) for file in files])
        run_id = words[words.index("run") + 1]
        assert given.pop("tracking", "mlflow") == "mlflow"
        for name in [*given, *([] if run_id.startswith("--") else [run_id])]:
            assert name in parser, f"{shlex.join(words)}: there is no {name} in {files}"


@every_page
def test_named_options_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options in the text stand alone: of a config or an overlay, or of ``vxm``."""
    known: set[str] = set()
    for files in (["train.json", "evaluate.json"], ["inference.json"]):
        parser = ConfigParser()
        parser.read_config([str(BUNDLE / "configs" / file) for file in files])
        known |= set(parser.config)
    for overlay in (BUNDLE / "configs").glob("*.yaml"):
        known |= set(ConfigParser.load_config_file(overlay))
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
    known |= set(re.findall(r"--(\w+)", capsys.readouterr().out))
    known |= {"tracking", *DEFAULT_MLFLOW_SETTINGS["configs"]}
    known |= {"conf", "host", "studies"}  # of MONAI Label's server
    named = set(re.findall(r"`--(\w+)", prose(page)))
    assert named <= known, f"{page.name} names {sorted(named - known)}"


@every_page
def test_named_vxm_commands_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = set(re.findall(r"\bvxm ([a-z][\w-]*)", page.read_text(encoding="utf-8")))
    for name in named:
        with pytest.raises(SystemExit) as stop:
            cli.main([name, "--help"])
        assert stop.value.code == 0, f"{page.name} names vxm {name}"
        text = capsys.readouterr().out
        for words in commands(page):
            if words[:2] == ["vxm", name]:
                for option in (word for word in words if word.startswith("--")):
                    assert re.search(rf"{option}\b", text), f"{page.name}: vxm {name} has no {option}"


@of_pages(TRAINING, BUNDLE_README)
def test_presets_and_their_sizes_are_right(page: Path) -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert {name for name, _ in rows} == set(PRESETS)
    for name, number in rows:
        assert int(number.replace(",", "")) == sum(p.numel() for p in VoxelMorph(name).parameters()), name


# It fails, as it should, as long as a number has still to be measured.
@every_page
def test_no_number_is_left_to_measure(page: Path) -> None:
    left = [line for line in page.read_text(encoding="utf-8").splitlines() if "TODO" in line]
    assert not left, "\n".join(left)


@pytest.mark.parametrize("overlay", sorted((BUNDLE / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_say_what_was_measured(overlay: Path) -> None:
    """Hardware, time and Dice, or that they were not."""
    head = re.match(r"(#.*\n)*", overlay.read_text(encoding="utf-8"))
    assert head
    assert re.search(r"^# (M|Not m)easured: ", head[0], re.MULTILINE)
