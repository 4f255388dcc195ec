# SPDX-License-Identifier: MIT
"""What makes a site of pages that are also read in the repository: their links, and references out of the code."""

import dataclasses
import posixpath
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page

import prompt_cam_hf
from prompt_cam_hf.cli import app
from prompt_cam_hf.training.recipe import Recipe
from prompt_cam_hf.training.recipe_files import list_recipes

ROOT = Path(__file__).parents[2]
# Pages that lie outside of docs/, and where the site has them.
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "prompt_cam_hf/birds/tiny_vit/README.md": "files/tiny_vit.md",
}
# Inline links and images of Markdown, outside of code.
_LINK = re.compile(r"(?P<code>^```.*?^```|`[^`\n]*`)|\]\((?P<target>[^)\s]+)\)", re.MULTILINE | re.DOTALL)

# What stands in between is for those who read the page in the repository.
_GENERATED = re.compile(r"<!-- generated: ([a-z ]+) -->.*?<!-- end -->", re.DOTALL)


def on_startup(*, command: str, dirty: bool) -> None:
    """Lay the folders out as the package that they become, for mkdocstrings reads files and imports nothing.

    This is early: it looks for its paths before the other hooks run.
    """
    source = ROOT / "build" / "docs_source"
    shutil.rmtree(source, ignore_errors=True)
    for folder in ("prompt_cam_hf", "modeling", "training"):
        target = source / "prompt_cam_hf" / folder.removeprefix("prompt_cam_hf")
        shutil.copytree(ROOT / folder, target, ignore=shutil.ignore_patterns("__pycache__", "tiny_vit"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside of docs/."""
    for path, uri in OUTSIDE.items():
        files.append(File.generated(config, uri, content=(ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what is generated, and let links lead to the same things as in the repository."""
    markdown = _GENERATED.sub(lambda found: "\n".join(GENERATED[found[1]]()), markdown)
    if page.file.src_uri == "reference/python.md":
        _check_complete(markdown)
    sources = {uri: path for path, uri in OUTSIDE.items()}
    here = posixpath.dirname(sources.get(page.file.src_uri, f"docs/{page.file.src_uri}"))

    def lead(found: re.Match) -> str:
        target = found["target"]
        if target is None or re.match(r"[a-z]+:|#", target):
            return found[0]
        path, hash_sign, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(here, path))
        uri = OUTSIDE.get(path, path.removeprefix("docs/"))
        file = files.get_file_from_path(uri)
        if file is None or file.inclusion.is_excluded():
            if not (ROOT / path).is_file():
                return found[0]  # mkdocs reports it
            uri = f"files/{path}"
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, content=(ROOT / path).read_bytes()))
        return f"]({posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or '.')}{hash_sign}{anchor})"

    return _LINK.sub(lead, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Bring along the one script that the theme would fetch from another host, for pages opened as files."""
    here = posixpath.dirname(page.file.dest_uri) or "."
    return output.replace("https://unpkg.com/iframe-worker/shim", posixpath.relpath("site/iframe_worker.js", here))


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> Navigation:
    """Write llms.txt, the list of pages for language models (llmstxt.org), each with its first sentence."""
    lines = ["# prompt_cam_hf", "", f"> {config.site_description}"]
    for section in nav:
        pages = [page for page in section.children or () if page.is_page] if section.is_section else []
        lines += ["", f"## {section.title}", ""] if pages else []
        for page in pages:
            told = _first_sentence(page.file.content_string)
            lines.append(f"- [{page.title}]({page.file.dest_uri}): {told}")
    files.append(File.generated(config, "llms.txt", content="\n".join(lines) + "\n"))
    return nav


def _first_sentence(markdown: str) -> str:
    """Of the first paragraph, without what marks it up."""
    text = re.sub(r"^```.*?^```$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^(?:[#|!<]|:::).*$", "", text, flags=re.MULTILINE).strip()
    paragraph = " ".join(text.split("\n\n")[0].split())
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[*`]+", lambda found: found[1] or "", paragraph)
    return re.sub(":$", ".", re.split(r"(?<=[.?!]) ", plain)[0])


def on_post_template(output_content: str, template_name: str, config: MkDocsConfig) -> str:
    """The same for the page that says that there is no such page, which a server shows anywhere."""
    return output_content.replace("https://unpkg.com/iframe-worker/shim", "/site/iframe_worker.js")


def _check_complete(markdown: str) -> None:
    """Refuse a reference that lacks a name of the public door, or has one twice."""
    documented = sorted(re.findall(r"^::: prompt_cam_hf\.(\w+)$", markdown, re.MULTILINE))
    public = sorted(set(prompt_cam_hf.__all__) - {"__version__"})
    if documented != public:
        raise PluginError(f"reference/python.md must have each public name once: {sorted({*documented} ^ {*public})}")


class HouseStyle(griffe.Extension):
    """Lets mkdocstrings read what docstrings of this project say in another way than it knows."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Make `Example:` a section, `a, b:` two arguments, and `Args:` fields of a class without `__init__`."""
        if obj.docstring:
            renamed = {"Example:": "Examples:"}
            if obj.is_class and "__init__" not in obj.members:
                renamed["Args:"] = "Attributes:"
            lines = []
            for line in obj.docstring.value.split("\n"):
                names = re.match(r"    (\w+(?:, \w+)+)(: .*)", line)
                lines += (
                    [f"    {name}{names[2]}" for name in names[1].split(", ")] if names else [renamed.get(line, line)]
                )
            obj.docstring.value = "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def command_reference() -> Iterator[str]:
    """A section for each command: its help, and a table of what it takes."""
    group = typer.main.get_group(app)
    context = group.make_context("prompt-cam", ["train"])
    for name in group.list_commands(context):
        command = group.commands[name]
        with command.make_context(name, [], parent=context, resilient_parsing=True) as own:
            usage = " ".join(command.collect_usage_pieces(own))
            records = {parameter.name: parameter.get_help_record(own) for parameter in command.params}
        yield f"\n## {name}\n\n```text\nprompt-cam {name} {usage}\n```\n\n{command.help}\n"
        yield "| | |\n| --- | --- |"
        for parameter in command.params:
            record = records[parameter.name]
            if record is None:
                continue
            left, text = record
            yield f"| `{_cell(left).replace('&lt;', '<')}` | {_cell(text)} |"


def recipe_reference() -> Iterator[str]:
    """A row for each key of a recipe."""
    yield "| key | default | meaning |\n| --- | --- | --- |"
    for key in dataclasses.fields(Recipe):
        default = key.default if key.default_factory is dataclasses.MISSING else key.default_factory()
        value = str(default).lower() if isinstance(default, bool) else default
        text = "required" if default is dataclasses.MISSING else "empty" if default in (None, {}) else f"`{value}`"
        yield f"| `{key.name}` | {text} | {_cell(key.metadata['help'])} |"


def recipe_names() -> Iterator[str]:
    """A row for each recipe that comes with the package."""
    yield "| recipe | |\n| --- | --- |"
    for name, sentence in list_recipes().items():
        yield f"| `{name}` | {_cell(sentence)} |"


GENERATED = {"commands": command_reference, "recipe keys": recipe_reference, "recipes": recipe_names}
