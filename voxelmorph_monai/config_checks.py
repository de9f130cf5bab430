"""Check the options of a bundle before a long run: an option that has no effect stops the run with the reason.

MONAI silently drops some options, changes the values of others, and adds misspelt ones to the config. An expression of
a config cannot refer to the whole config, so :func:`check_config`, called in an expression, finds the workflow in the
call stack.
"""

import ast
import hashlib
import inspect
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import Any

import monai.bundle
import numpy as np
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, ReferenceResolver
from torch import Tensor

__all__ = ["check_config", "checksum", "fingerprint", "written"]

Config = Mapping[str, Any]

# Entries that hold the path of a file or a folder; those added in the second line may be None.
_NEEDED_PATHS = {"bundle_root", "dataset_dir", "output_dir", "evaluation_dir", "maps_dir", "weights"}
_PATHS = _NEEDED_PATHS | {"moving", "fixed", "moving_label", "fixed_label", "image", "pretrained"}
# Options that are accepted even if the run does not use them: every bundle has these folders.
_ALWAYS = {"bundle_root", "dataset_dir", "output_dir"}
# Entries that may be in a config without being used: an overlay for a data set includes entries that only an evaluation
# reads, and MONAI's federated client adds the name of the run.
_WITHOUT_USE = {*_ALWAYS, "groups", "affine_dice", "run_name"}


def check_config() -> None:
    """Check the options and configs of the calling workflow; call it in an expression of the config.

    Outside of a :class:`monai.bundle.ConfigWorkflow` it does nothing. On the command line, a run that fails after this
    call prints the reason in its last line; MONAI's own errors only name the expression.

    Raises:
        ValueError: an option has no effect, MONAI dropped or changed it, a value cannot be used, or an id to run does
            not exist.
    """
    workflow, options = _caller()
    if workflow is None:
        return
    if _is_command_line():
        sys.excepthook = _explain
        _check_words(sys.argv[2:])
    config = {name: value for name, value in workflow.parser.get().items() if name != ConfigParser.meta_key}
    complete = _complete_configs(workflow.config_root_path)
    _check_ids(workflow, config)
    _check_options(workflow.parser, options)
    _check_values(config, complete)
    _check_use(workflow, config, complete, options)


# Find the workflow


def _caller() -> tuple[ConfigWorkflow | None, dict[str, Any]]:
    """Workflow in the call stack, and the options of ``monai.bundle.run``, including those that it drops.

    The options are empty for a ``ConfigWorkflow`` created in Python, which merges them into its files.
    """
    workflow = None
    keywords = {monai.bundle.create_workflow.__code__: "kwargs", monai.bundle.run.__code__: "override"}
    for frame, _ in traceback.walk_stack(None):
        here = frame.f_locals
        if workflow is None and isinstance(here.get("self"), ConfigWorkflow):
            workflow = here["self"]
        elif workflow is not None and frame.f_code in keywords:
            file = here["args_file"]
            given = dict(ConfigParser.load_config_file(file) if isinstance(file, str) else file or {})
            given |= here[keywords[frame.f_code]]
            own = {*inspect.signature(monai.bundle.run).parameters, "workflow_name", "workflow_type", "properties_path"}
            return workflow, {name: value for name, value in given.items() if name not in own}
    return workflow, {}


def _is_command_line() -> bool:
    """Whether this process is ``python -m monai.bundle``, started directly or by torchrun."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec is not None and spec.name == "monai.bundle.__main__"


def _explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a failure as usual, then repeat the actual reason in the last line (``sys.excepthook``)."""
    sys.__excepthook__(kind, error, trace)
    while isinstance(error, RuntimeError) and error.__cause__ is not None:  # MONAI wraps the actual error
        error = error.__cause__
    print(f"\n{type(error).__name__}: {error}", file=sys.stderr)


def _complete_configs(folder: Path) -> list[Config]:
    """Complete configs of the bundle: those with imports, which overlays do not have."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".yaml", ".yml")]
    written = [ConfigParser.load_config_file(path) for path in files if "imports" in path.read_text(encoding="utf-8")]
    return [config for config in written if "imports" in config]


# Possible mistakes


def _check_words(words: Iterable[str]) -> None:
    """Reject values that MONAI's command line (Fire) would cut: it parses them as Python, where # starts a comment."""
    for word in words:
        value = word.partition("=")[2] if word.startswith("-") else word
        if "#" in value:
            try:
                read = ast.dump(ast.parse(value, mode="eval"))
            except SyntaxError:
                continue  # Fire keeps what is not Python unchanged
            if "#" not in read:
                raise ValueError(f"MONAI's command line cuts {value!r} at the #. {_no_hash(value)}")


def _no_hash(value: str) -> str:
    expression = "$" + repr(value).replace("#", r"\x23").replace("::", r"\x3a\x3a")
    return f'Choose another name, or write it as an expression: "{expression}".'


def _check_ids(workflow: ConfigWorkflow, config: Config) -> None:
    before_and_after = {"initialize": workflow.init_id, "finalize": workflow.final_id}
    listed = {name for name, value in config.items() if _is_program(value)}
    known = sorted(listed - {"imports", *before_and_after, *before_and_after.values()})
    if workflow.run_id not in known:
        raise ValueError(f"'{workflow.run_id}' is not an id to run. Choose one of {', '.join(known)}.")
    for usual, name in before_and_after.items():
        if name not in {usual, *config}:
            raise ValueError(f"'{name}' is not in the config. Remove the option to use the default '{usual}'.")


def _is_program(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_expression(item) for item in value)


def _is_expression(value: object) -> bool:
    return isinstance(value, str) and value.startswith("$")


def _is_given_by_value(value: object) -> bool:
    """Whether an entry is a plain value, not an expression, a reference or a macro."""
    return not (isinstance(value, str) and value.startswith(("$", "@", "%")))


def _check_options(parser: ConfigParser, options: Config) -> None:
    for name in [*options, *parser.get()]:
        if name.startswith("+"):
            raise ValueError(
                f"{name} cannot be an option: + extends an entry only in a config file. Put it into an overlay."
            )
    for name, value in options.items():
        if value is None and parser.get(name) is not None:
            raise ValueError(f"{name} is None, which MONAI ignores. Write --{name} '$None'.")


def _check_values(config: Config, complete: Iterable[Config]) -> None:
    for id, value in _leaves(config):
        if isinstance(value, str) and "::" in value and _is_given_by_value(value):
            raise ValueError(
                f"{id} is {value!r}, because MONAI replaces # by :: in values. {_no_hash(value.replace('::', '#'))}"
            )
    for name in sorted(_PATHS & set(config)):
        _check_path(name, config[name])
    artifacts = config.get("save_execute_config")
    if isinstance(artifacts, str) and artifacts.endswith(".json'") and not _is_expression(artifacts):
        raise ValueError(
            f"output_dir is {config['output_dir']!r}. To track a run, MONAI needs it as an expression: "
            f"--output_dir \"$'{config['output_dir']}'\"."
        )
    for written in complete:
        for name in set(written) & set(config):
            if _is_given_by_value(config[name]):
                _check_kind(name, config[name], written[name])


def _leaves(value: object, id: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _leaves(item, f"{id}#{key}" if id else str(key))
    else:
        yield id, value


def _check_path(name: str, value: object) -> None:
    if isinstance(value, str):
        if not value:
            raise ValueError(f"{name} is empty. Is a shell variable unset?")
        if value.startswith("~"):
            raise ValueError(
                f"{name} is {value!r}. The shell expands ~, but not in quotes or after =. Write the full path; for a "
                f"file or folder with that name write ./{value}."
            )
    elif value is True:
        raise ValueError(f"--{name} has no value. Give a path after it.")
    elif isinstance(value, bool | int | float | list | tuple | dict):
        raise ValueError(
            f"{name} is {value!r}, not a path: MONAI's command line parses numbers, commas and brackets as Python. Put "
            f"./ in front of the name, as in --{name} ./20241130."
        )
    elif value is not None or name in _NEEDED_PATHS:
        raise ValueError(f"{name} is {value!r}. Give a path as text.")


def _check_kind(name: str, value: object, usual: object) -> None:
    """Reject a ``value`` of another type than the ``usual`` one: "false" would be true, and YAML reads 1e-4 as text."""
    kinds = {bool: (bool, "True or False"), int: (Integral, "a whole number"), float: (Real, "a number")}
    if type(usual) in kinds:
        kind, meaning = kinds[type(usual)]
        if not isinstance(value, kind) or (type(value) is bool) != (type(usual) is bool):
            raise ValueError(f"{name} is {value!r}. It takes {meaning}.")


def _check_use(workflow: ConfigWorkflow, config: Config, complete: Iterable[Config], options: Config) -> None:
    ids = {workflow.init_id, workflow.run_id, workflow.final_id}
    referred = set().union(*(_references(value) for value in config.values()))
    programs = {name for name, value in config.items() if _is_program(value)}
    unused = [
        id
        for id, value in _unused(config, referred)
        if id not in ids | programs | _WITHOUT_USE and not any(_is_usual(id, value, written) for written in complete)
    ]
    reached, waiting = {"imports", *ids}, list(ids)
    while waiting:
        new = _references(workflow.parser.get(waiting.pop())) - reached
        reached |= new
        waiting += new
    for option in options:
        id = ReferenceResolver.normalize_id(option)
        if not any(id == other or _within(id, other) or _within(other, id) for other in reached):
            unused += [id] if option not in _ALWAYS else []
    if unused:
        names = ", ".join(sorted({id.replace("::", "#") for id in unused}))
        raise ValueError(f"'{workflow.run_id}' does not use {names}. Check the spelling, or remove the option.")


def _within(id: str, other: str) -> bool:
    return id.startswith(f"{other}::")


def _is_usual(id: str, value: object, written: Config) -> bool:
    """Whether an entry is unchanged from a complete config; it is unused because an overlay replaced its user."""
    if isinstance(value, str):
        return value == ReferenceResolver.normalize_id(str(written.get(id)))  # the form in which MONAI stores it
    return id in written and (isinstance(value, Mapping) or value == written[id])


def _references(value: object) -> set[str]:
    """Ids that ``value`` refers to, except in ``settings``, where a handler only records them."""
    if isinstance(value, str):
        return set(ReferenceResolver.match_refs_pattern(value))
    if isinstance(value, Mapping):
        return set().union(*(_references(item) for key, item in value.items() if key != "settings"))
    return set().union(*map(_references, value)) if isinstance(value, list | tuple) else set()


def _unused(entries: Config, referred: set[str], section: str = "") -> Iterator[tuple[str, object]]:
    """Ids and values of the ``entries`` that nothing refers to; of a section that is partly used, its unused parts."""
    for name, value in entries.items():
        id = section + name
        if id in referred:
            continue
        if not any(_within(other, id) for other in referred):
            yield id, value
        elif isinstance(value, Mapping) and "_target_" not in value:
            yield from _unused(value, referred, f"{id}::")


def _described(value: Any) -> str:
    """Text that describes an object with all its contents, except what differs between processes."""
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
    """Class of a transform (or another object that makes batches) and a checksum of its options; None for None.

    joblib.hash cannot do this: it does not hash lambdas, and equal transforms differ in their random generators.

    >>> first, second, third = (monai.transforms.RandFlip(prob) for prob in (0.5, 0.5, 0.25))
    >>> fingerprint(first) == fingerprint(second), fingerprint(first) == fingerprint(third)
    (True, False)
    """
    if value is None:
        return None
    return f"{type(value).__name__}, sha256 {hashlib.sha256(_described(value).encode()).hexdigest()[:12]}"


def checksum(path: str | None) -> str | None:
    """Checksum of the content of a file, as text; None for None."""
    return None if path is None else f"sha256 {hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]}"


def written(name: str) -> str:
    """Text of the entry ``name`` in the calling workflow's config; call it in an expression of the config."""
    workflow, _ = _caller()
    if workflow is None:
        raise RuntimeError(f"no workflow holds {name}. Call written() in an expression of a config.")
    return _described(workflow.parser.get(name))
