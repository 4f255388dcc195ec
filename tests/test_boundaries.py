# SPDX-License-Identifier: MIT
"""What imports what, and that the project says what it holds."""

import ast
import configparser
import graphlib
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import prompt_cam_hf

ROOT = Path(__file__).parents[1]
# Who stands higher may import who stands lower, and not the other way. The command line lies in prompt_cam_hf/, but
# stands on top of all: a command may start a training run, and nothing may import a command.
RANKS = {"modeling": 0, "prompt_cam_hf": 1, "training": 2, "cli": 3}
FOLDERS = ("modeling", "prompt_cam_hf", "training")
# What transformers itself cannot do without.
MODELING_MAY_IMPORT = {"torch", "transformers", "huggingface_hub", "safetensors"} | set(sys.stdlib_module_names)


def imports(path: Path) -> list[tuple[int, str]]:
    """(number of leading dots, module or name in a module) of every import in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
            if not node.level:
                found += [(0, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def rank(parts: Sequence[str]) -> int:
    """How high a module stands, from its place in the repository or from the parts of its name in an import."""
    # The command, started as a module; and the public door, which leads into every room.
    if tuple(parts) in (("prompt_cam_hf", "__main__"), ("prompt_cam_hf", "__init__")):
        return RANKS["cli"]
    inside = len(parts) > 1 and parts[0] == "prompt_cam_hf" and parts[1] in RANKS
    return RANKS[parts[1] if inside else parts[0]]


@pytest.mark.parametrize("path", sorted((ROOT / "modeling").glob("*.py")), ids=lambda path: path.name)
def test_modeling_travels_alone(path):
    for level, module in imports(path):
        if level:
            # transformers copies what `from .file import Name` names, and nothing else.
            assert level == 1 and module and (path.parent / f"{module}.py").is_file(), f"from {'.' * level}{module}"
        else:
            assert module.split(".")[0] in MODELING_MAY_IMPORT, module


@pytest.mark.parametrize(
    "path",
    sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_imports_go_one_way(path):
    """modeling <- prompt_cam_hf <- training <- cli, and never a second copy of modeling from the repository root."""
    own_parts = path.relative_to(ROOT).with_suffix("").parts
    for level, module in imports(path):
        parts = (*own_parts[:-level], *module.split(".")) if level else tuple(module.split("."))
        if parts[0] not in FOLDERS:
            continue
        assert level or parts[0] == "prompt_cam_hf", f"import {module} would make a second set of classes"
        assert rank(parts) <= rank(own_parts), f"{path.name} imports {module}"


def test_nothing_imports_in_a_circle():
    """Imports inside functions and those for type checking only are counted as any other."""
    files = {}
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        # modeling/ and training/ are installed inside the package, under which name they are imported.
        files[parts if parts[0] == "prompt_cam_hf" else ("prompt_cam_hf", *parts)] = path
    modules = {".".join(parts).removesuffix(".__init__") for parts in files}
    graph = {}
    for parts, path in files.items():
        imported = graph.setdefault(".".join(parts).removesuffix(".__init__"), set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                package = ".".join(filter(None, [*(parts[: -node.level] if node.level else ()), node.module]))
                names = [f"{package}.{alias.name}" for alias in node.names]
                imported.update(name if name in modules else package for name in names)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_every_public_name_is_documented():
    names = [
        module.name
        for module in pkgutil.walk_packages(prompt_cam_hf.__path__, "prompt_cam_hf.")
        if not module.name.rpartition(".")[2].startswith("_")
    ]
    names += [f"prompt_cam_hf.modeling.{path.stem}" for path in (ROOT / "modeling").glob("*_*_*.py")]
    for name in ["prompt_cam_hf", *names]:
        module = importlib.import_module(name)
        assert module.__doc__, name
        for public, thing in vars(module).items():
            defined_here = getattr(thing, "__module__", "") == name and not public.startswith("_")
            shown = defined_here or public in getattr(module, "__all__", [])
            if shown and (inspect.isclass(thing) or inspect.isroutine(thing)):
                assert thing.__doc__, f"{name}.{public}"


def test_every_name_of_the_door_is_in_the_documentation():
    text = " ".join(path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))))
    for name in set(prompt_cam_hf.__all__) - {"__version__"}:
        assert re.search(rf"\b{name}\(|`{name}`|from prompt_cam_hf import .*\b{name}\b", text), name


def test_setup_cfg_lists_every_package():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    found = {
        str(path.parent.relative_to(ROOT)).replace("/", ".")
        for folder in [*FOLDERS, "model_cards"]
        for path in (ROOT / folder).rglob("__init__.py")
    }
    found = {name if name.startswith("prompt_cam_hf") else f"prompt_cam_hf.{name}" for name in found}
    assert listed == found


# How many models transformers knows for the type, before the import, after it, and after a second one.
_REGISTRATIONS = """
import importlib
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING as models

def registered():
    return [model for config, model in models._extra_content.items() if config.model_type == "prompt_cam"]

counts = [len(registered())]
import prompt_cam_hf
counts.append(len(registered()))
importlib.reload(prompt_cam_hf)
counts.append(len(registered()))
assert registered() == [prompt_cam_hf.PromptCAMForImageClassification]
print(*counts)
"""


@pytest.mark.slow
@pytest.mark.long
def test_importing_twice_registers_once():
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", _REGISTRATIONS], cwd="/", capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "0 1 1"
