# SPDX-License-Identifier: MIT
"""The code blocks of README.md and docs/: which of them run, which are checked without being run, and why.

    python tests/docs_blocks.py    # the list

A block runs, unless an HTML comment on the line before it gives a reason why it cannot:

    <!-- checked: needs CUB-200-2011 -->

Then its names are imported, its calls bound to signatures, and its commands parsed. The comment
`<!-- checked (train app): ... -->` is about the lines of a block that have these subcommands; the others run.
"""

import ast
import configparser
import dataclasses
import importlib
import inspect
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import typer
import yaml
from typer.testing import CliRunner

from prompt_cam_hf.cli import app
from prompt_cam_hf.training.recipe import Recipe, parse_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Without a language: trees of folders, lines of tables.
NO_CODE = {"", "text", "bibtex"}
# Other programs that a line may start with; what they do is theirs.
PROGRAMS = {"hf", "source", "pytest", "docker", "git"}

_BLOCK = re.compile(
    r"(?:^<!-- checked(?: \((?P<only>[a-z ]+)\))?: (?P<reason>[^\n]+) -->\n\n?)?"
    r"^```(?P<language>\w*)\n(?P<source>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block; `only` are the subcommands that `reason` is about, empty for the whole block."""

    page: Path
    line: int
    language: str
    source: str
    reason: str | None
    only: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def fate(self) -> str:
        """What is done with it."""
        if self.language in NO_CODE:
            return "text"
        if self.reason and not self.only:
            return f"checked: {self.reason}"
        if self.language == "yaml":
            return "checked: keys of a recipe"
        if self.language == "bash" and not any(line[0] == "prompt-cam" for line in self.commands()):
            return "checked: other programs"
        return "run" + (f", but {' '.join(self.only)} checked: {self.reason}" if self.reason else "")

    def commands(self) -> list[list[str]]:
        """The words of each line of a shell."""
        lines = self.source.replace("\\\n", " ").splitlines()
        return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def read_blocks(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    blocks = []
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("source"))
        only = tuple((found["only"] or "").split())
        blocks.append(Block(page, line, found["language"], found["source"], found["reason"], only))
    assert 2 * len(blocks) == len(re.findall("^```", text, re.MULTILINE)), f"{page}: a block is not understood"
    return blocks


def run_page(page: Path, replaced: dict[str, str], **names: Any) -> None:
    """Run and check the blocks of a page from top to bottom, in the working directory and one namespace.

    Texts in the blocks are `replaced`, and `names` are what the page takes for granted.
    """
    names["__name__"] = "__main__"
    for block in read_blocks(page):
        for old, new in replaced.items():
            block = dataclasses.replace(block, source=block.source.replace(old, new))
        try:
            _do(block, names)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{block} ({block.fate}): {error!r}\n{block.source}") from error


def _do(block: Block, names: dict[str, Any]) -> None:
    whole = bool(block.reason and not block.only)
    if block.language in NO_CODE:
        return
    if block.language == "python":
        source = "\n" * block.line + block.source
        if whole:
            check_python(source)
        else:
            exec(compile(source, str(block.page), "exec"), names)
    elif block.language == "yaml":
        unknown = set(yaml.safe_load(block.source)) - {key.name for key in dataclasses.fields(Recipe)}
        assert not unknown, unknown
    elif block.language == "bash":
        for words in block.commands():
            if words[0] == "prompt-cam" and not whole and words[1] not in block.only:
                run_command(words[1:])
            else:
                check_line(words)
    else:
        raise ValueError(f"no way to check the language {block.language}")


def run_command(arguments: list[str]) -> None:
    """Run `prompt-cam` as a new user would: what it writes to is not there yet, unless another command made it."""
    if arguments[0] == "train" and "--out" in arguments and "--resume_from_checkpoint" not in arguments:
        shutil.rmtree(arguments[arguments.index("--out") + 1], ignore_errors=True)
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 0, answer.output


def check_line(words: list[str]) -> None:
    """Check a line of a shell without running it."""
    program, *arguments = words
    arguments = [word for word in arguments if word != "..."]
    if program == "prompt-cam":
        check_command(arguments)
    elif program in ("accelerate", "uv") or (program, *arguments[:1]) == ("hf", "jobs"):
        script = next(i for i, word in enumerate(arguments) if word.endswith(".py") or word == "-m")
        check_program(arguments[script:])
    elif program.startswith("python") or program.endswith("/python"):
        check_program(arguments)
    elif program == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert set(arguments) <= targets, arguments
    elif program == "pip":
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        extras = set(re.findall(r"\w+", " ".join(re.findall(r"^\.\[(.*)\]$", "\n".join(arguments), re.MULTILINE))))
        assert extras <= set(setup["options.extras_require"]), extras
    else:
        assert program in PROGRAMS, f"what is {program}?"


def check_program(arguments: list[str]) -> None:
    """Check that a program of Python is there and takes these arguments."""
    name, *rest = arguments[1:] if arguments[0] == "-m" else arguments
    rest = ["own_photos" if word == "RECIPE.yaml" else word for word in rest]
    if name in ("prompt_cam_hf.training.train", "training/train.py"):
        parse_recipe([str(ROOT / word) if (ROOT / word).is_file() else word for word in rest])
    elif name == "prompt_cam_hf":
        check_command(rest)
    elif arguments[0] == "-m":
        assert find_spec(name), name
    else:
        # Of the repository, or made by a command before.
        source = next(path for path in (ROOT / name, Path(name)) if path.is_file()).read_text()
        keys = {f"--{key.name}" for key in dataclasses.fields(Recipe)}
        for option in re.findall(r"--[\w-]+", " ".join(rest)):
            assert option in source or option in keys, f"{name} has no option {option}"


def check_command(arguments: list[str]) -> None:
    """Parse the arguments of `prompt-cam` with its own definitions, and the keys of recipes, and do nothing else."""
    group = typer.main.get_command(app)
    with group.make_context("prompt-cam", list(arguments)) as context:
        name, command, rest = group.resolve_command(context, list(arguments))
        assert command is not None, name
        command.make_context(name, list(rest), parent=context).close()
    if name == "train":
        with patch("prompt_cam_hf.training.train.train"):
            answer = CliRunner().invoke(app, arguments)
        assert answer.exit_code == 0, answer.output


def check_python(source: str) -> None:
    """Import what the source imports, and bind the arguments of each call of an imported name to its signature."""
    names: dict[str, Any] = {}
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = importlib.import_module(alias.name)
                names[alias.asname or alias.name.partition(".")[0]] = (
                    module if alias.asname else importlib.import_module(alias.name.partition(".")[0])
                )
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = getattr(importlib.import_module(str(node.module)), alias.name)
    for node in ast.walk(tree):
        called = _find(node.func, names) if isinstance(node, ast.Call) else None
        if called is not None:
            assert not any(isinstance(argument, ast.Starred) for argument in node.args), ast.unparse(node)
            keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            try:
                signature = inspect.signature(called)
            except ValueError:  # written in C
                continue
            complete = len(keywords) == len(node.keywords)
            (signature.bind if complete else signature.bind_partial)(*node.args, **keywords)


def _find(node: ast.expr, names: dict[str, Any]) -> Any:
    """What an expression of imported names and their attributes stands for; None for any other."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    owner = _find(node.value, names) if isinstance(node, ast.Attribute) else None
    return None if owner is None else getattr(owner, node.attr)


def all_blocks() -> Iterator[Block]:
    """The blocks of all pages."""
    for page in PAGES:
        yield from read_blocks(page)


if __name__ == "__main__":
    for each in all_blocks():
        print(f"{each!s:40} {each.language or '-':7} {each.fate}")
