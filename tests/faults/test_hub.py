# SPDX-License-Identifier: MIT
"""A Hub that fails, lies, trickles or says nothing: no command waits longer than a minute in all."""

import contextlib
import json

import pytest
import transformers.utils.hub
from hub_server import WRITER, serve
from huggingface_hub import constants

from faults.processes import prompt_cam, start

KIND = "Hub"
REPO = "org/birds"
# What a user may have to wait for a Hub that does not answer.
LONGEST = 60.0

# (what fails, how)
HANG = {"seconds": 1000.0}
BUSY = {"status": 429, "headers": {"Retry-After": "3600"}}
SICK = {"status": 500}
FAULTS = {
    "info: 500": ("GET /api/models", SICK),
    "info: 429": ("GET /api/models", BUSY),
    "info: hangs": ("GET /api/models", HANG),
    "info: trickles": ("GET /api/models", {"slow": True}),
    "info: no JSON": ("GET /api/models", {"content": b"<html></html>"}),
    "head: 500": ("HEAD .*/resolve/", SICK),
    "head: 429": ("HEAD .*/resolve/", BUSY),
    "head: hangs": ("HEAD .*/resolve/", HANG),
    "config: 500": ("GET .*/config.json", SICK),
    "config: 429": ("GET .*/config.json", BUSY),
    "config: hangs": ("GET .*/config.json", HANG),
    "config: trickles": ("GET .*/config.json", {"slow": True}),
    "config: breaks off": ("GET .*/config.json", {}),
    "config: too short": ("GET .*/config.json", {"content": b"{}"}),
    "config: a web page": ("GET .*/config.json", {"content": b"<html>log in</html>" * 100}),
    "weights: 500": ("GET /cdn", SICK),
    "weights: 429": ("GET /cdn", BUSY),
    "weights: hang": ("GET /cdn", HANG),
    "weights: trickle": ("GET /cdn", {"slow": True}),
    "weights: break off": ("GET /cdn", {}),
    "weights: too short": ("GET /cdn", {"content": b"short"}),
    "weights: too long": ("GET /cdn", {"content": bytes(1 << 20)}),
    "weights: one 500": ("GET /cdn", SICK | {"times": 1}),
    "everything hangs": (".", HANG),
    "everything: 429": (".", BUSY),
}  # fmt: skip
# Of a client that uses Xet for large files.
XET_FAULTS = {
    "xet: no parts": ("never", {}),
    "xet: 500": ("GET /xet/", SICK),
    "xet: 429": ("GET /xet/", BUSY),
    "xet: hangs": ("GET /xet/", HANG),
    "xet: trickles": ("GET /xet/", {"slow": True, "content": b"{}" * 1000}),
}
HARMLESS = {"nothing": ("never", {}), "one break": ("GET /cdn", {"times": 1})}


def predict_from(url: str, home: str, xet: bool, *arguments: str) -> None:
    """`prompt-cam predict`, with a Hub at `url`; the client has read its settings already."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
    settings = {
        "HUGGINGFACE_CO_URL_TEMPLATE": template, "ENDPOINT": url, "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": not xet, "HF_HUB_CACHE": f"{home}/hub", "HF_TOKEN_PATH": f"{home}/token",
    }  # fmt: skip
    for name, value in settings.items():
        setattr(constants, name, value)
    transformers.utils.hub._hf_api = None
    prompt_cam("predict", REPO, *arguments)


@pytest.fixture(scope="module", name="ended")
def fixture_ended(world, tmp_path_factory):
    """How the command ended with each fault: all of them at once, for most of the time is spent waiting."""
    files = {path.name: path.read_bytes() for path in world.model.iterdir()}
    photo = world.photos / "test" / "red" / "0.png"
    with contextlib.ExitStack() as stack:
        running = {}
        for name, (pattern, fault) in (FAULTS | XET_FAULTS | HARMLESS).items():
            hub = stack.enter_context(serve())
            hub.add(REPO, files)
            hub.fail(pattern, **({"times": 10**6} | fault))
            home = tmp_path_factory.mktemp("home")
            running[name] = start(
                predict_from, hub.url, str(home), name in XET_FAULTS, str(photo), "--format", "json",
                environment={"HF_TOKEN": WRITER},
            )  # fmt: skip
        yield {name: process.wait(LONGEST) for name, process in running.items()}


@pytest.mark.parametrize("name", FAULTS | XET_FAULTS)
def test_a_failing_hub_is_not_waited_for(ended, refused, name):
    ran = ended[name]
    assert ran.code is not None, f"still waiting after {LONGEST:.0f} s\n{ran}"
    if ran.code == 0:
        assert {row["label"] for row in json.loads(ran.out)[0]["predictions"]} <= {"blue", "green", "red"}
        return
    assert ran.refused_well(), ran
    refused()


@pytest.mark.parametrize("name", HARMLESS)
def test_a_small_fault_is_overcome(ended, name):
    assert ended[name].code == 0, ended[name]


def test_what_is_waited_for_is_said(ended):
    """Whoever waits a while is told for what."""
    said = ended["everything hangs"].err
    assert REPO in said, said


def test_xet_is_used_where_it_is_tested(ended):
    for name in XET_FAULTS:
        assert "The download of org/birds broke off" in ended[name].err, ended[name]
