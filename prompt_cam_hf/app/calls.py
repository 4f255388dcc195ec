# SPDX-License-Identifier: MIT
"""The command line, and the lines of Python, that make again what the page shows."""

import shlex

import numpy as np

from prompt_cam_hf.app.session import AskedModel, Visit

_COMMANDS = {"explanation": "explain", "comparison": "compare", "removal": "remove", "path": "taxonomy"}
_FUNCTIONS = {**_COMMANDS, "removal": "remove_trait", "path": "explain_path"}


def write_command(model: AskedModel, visit: Visit, what: str) -> str:
    """The command line for one of `visit.results`; empty where there is none: other prompts, or a painted region."""
    question, region = visit.question, visit.region
    options = [] if what == "path" else ["--kind", question.kind]
    if what != "path" and question.prompts != model.prompts_in_use:
        return ""
    if what == "removal" and visit.removal is not None:
        if isinstance(region, np.ndarray):
            return ""
        place = ["--head", region] if isinstance(region, int) else ["--box", *(region or ())]
        label, method = visit.removal.before.classes[0].label, visit.removal.method
        options += ["--class", label, *map(str, place), "--method", method]
    elif what != "path":
        options += [part for label in _labels(visit, what) for part in ("--classes", label)]
        options += ["--method", question.method]
    return shlex.join(["prompt-cam", _COMMANDS[what], model.name, visit.name, *options, "--out", "results"])


def write_python(model: AskedModel, visit: Visit, what: str) -> str:
    """The lines of Python for one of `visit.results`."""
    question, function = visit.question, _FUNCTIONS[what]
    imports, lines, name = [f"from prompt_cam_hf import {function}"], [], repr(model.name)
    if what != "path" and question.prompts != model.prompts_in_use:
        imports.append("from prompt_cam_hf.loading import load_pipeline")
        lines = [f"model = load_pipeline({name})", f"model.model.set_prompts({question.prompts!r})"]
        name = "model"
    arguments = [name, repr(visit.name)]
    if what == "removal" and visit.removal is not None:
        region = repr(visit.region)
        if isinstance(visit.region, np.ndarray):
            imports = ["import numpy as np", "from PIL import Image", *imports]
            region = 'np.asarray(Image.open("region.png"))'
        label, method = visit.removal.before.classes[0].label, visit.removal.method
        arguments += [region, repr(label), f"method={method!r}", f"kind={question.kind!r}"]
    elif what != "path":
        arguments += [repr(_labels(visit, what)), f"kind={question.kind!r}", f"method={question.method!r}"]
    call = f"result = {function}({', '.join(arguments)})"
    return "\n".join([*imports, "", *lines, call, "print(result)"])


def _labels(visit: Visit, what: str) -> list[str]:
    asked = visit.comparison if what == "comparison" and visit.comparison is not None else visit.explanation
    return [traits.label for traits in asked.classes]
