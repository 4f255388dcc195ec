# SPDX-License-Identifier: MIT
"""What a release and the public continuous integration rest on: versions agree, and what workflows run is there."""

import configparser
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from prompt_cam_hf import __version__

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([\w-]+)(?: [\w-]+)*:", (ROOT / "Makefile").read_text(), re.MULTILINE))


def setup():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def jobs():
    return [
        pytest.param(job, id=f"{path.stem}-{name}")
        for path in WORKFLOWS
        for name, job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].items()
    ]


def test_versions_and_dates_agree():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    unreleased, newest, *_ = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", changelog, re.MULTILINE)
    assert unreleased == ("Unreleased", "") and newest[0] == __version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["date-released"]) == newest


@pytest.mark.parametrize("job", jobs())
def test_what_workflows_run_is_there(job):
    lines = " ".join(step.get("run", "") for step in job["steps"])
    for choice in job.get("strategy", {}).get("matrix", {}).get("transformers", [""]):
        asked = set(re.findall(r"make ([\w-]+)", lines.replace("${{ matrix.transformers }}", choice)))
        assert asked <= TARGETS, asked - TARGETS
    for path in re.findall(r"\btests/[\w/.]+", lines):
        assert (ROOT / path).exists(), path
    assert job["timeout-minutes"] and job["steps"]
    used = {step["uses"].partition("@")[0]: step for step in job["steps"] if "uses" in step}
    for step in used.values():  # by commit: a tag can be moved to other code
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", step["uses"]), step["uses"]
    # A token that may write stays in jobs that run nothing of the repository.
    if "permissions" in job:
        assert "actions/checkout" not in used
    elif "actions/checkout" in used:
        assert used["actions/checkout"]["with"]["persist-credentials"] is False


def test_the_script_of_training_names_what_it_needs():
    """PEP 723: the block that uv reads, by the expression of that text."""
    tomllib = pytest.importorskip("tomllib")
    script = (ROOT / "training" / "train.py").read_text(encoding="utf-8")
    (block,) = re.findall(r"^# /// script$\n((?:^#(?:| .*)$\n)+?)^# ///$", script, re.MULTILINE)
    needed = tomllib.loads("".join(line.removeprefix("#").removeprefix(" ") for line in block.splitlines(True)))
    assert needed == {
        "requires-python": setup()["options"]["python_requires"],
        "dependencies": [setup()["metadata"]["name"]],
    }


def test_every_python_that_is_promised_is_tested():
    (matrix,) = (job.values[0]["strategy"]["matrix"] for job in jobs() if job.id == "ci-test")
    classified = re.findall(r"Python :: (3\.\d+)", setup()["metadata"]["classifiers"])
    assert matrix["python"] == classified
    assert setup()["options"]["python_requires"] == f">={classified[0]}"
    for job in jobs():
        for step in job.values[0]["steps"]:
            version = step.get("with", {}).get("python-version", "${{ matrix.python }}")
            assert version in [*classified, "${{ matrix.python }}"], (job.id, version)


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-oldest.txt"])
def test_each_python_has_one_version_of_everything_required(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    lowest = {
        canonicalize_name(wanted.name): wanted.specifier
        for wanted in map(Requirement, setup()["options"]["install_requires"].split("\n")[1:])
    }
    for version in re.findall(r"Python :: (3\.\d+)", setup()["metadata"]["classifiers"]):
        environment = {"python_version": version}
        here = [pin for pin in pins if pin.marker is None or pin.marker.evaluate(environment)]
        pinned = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in here}
        assert len(pinned) == len(here), version
        for package, specifier in lowest.items():
            assert specifier.contains(pinned[package]), (version, package)
        if "oldest" in name:  # what setup.cfg allows is what is tried
            assert f"{lowest['transformers']}.0" == f">={pinned['transformers']}"


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda path: path.stem
)
def test_issue_forms(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert form["name"] and form["description"] and form["labels"]
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids) and any(field.get("validations", {}).get("required") for field in form["body"])


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_all_that_is_in_the_repository_is_in_the_sdist():
    """What lies at the top is named in MANIFEST.in, or setuptools takes it by itself."""
    manifest = (ROOT / "MANIFEST.in").read_text(encoding="utf-8").split()
    packages = {"prompt_cam_hf", "modeling", "training", "model_cards"}
    by_itself = {"README.md", "LICENSE", "setup.cfg", "pyproject.toml", "MANIFEST.in"}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tops = {path.partition("/")[0] for path in listed.splitlines()}
    assert tops - packages - by_itself - {name.partition("/")[0] for name in manifest} == {".gitignore"}
