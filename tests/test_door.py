# SPDX-License-Identifier: MIT
"""The public door: what `import prompt_cam_hf` gives, registers and costs."""

import ast
import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_backbone_config, tiny_model
from PIL import Image
from transformers import ImageClassificationPipeline, ViTForImageClassification, pipeline

import prompt_cam_hf
from prompt_cam_hf.data.images import build_image_processor

FUNCTIONS = {
    "atlas", "compare", "convert_official_checkpoint", "evaluate", "explain", "explain_path", "load_recipe", "publish",
    "publish_space", "rank_heads", "remove_trait", "reproduce", "train", "trait_maps", "write_space",
}  # fmt: skip
COMMANDS = (
    "train", "predict", "explain", "compare", "remove", "atlas", "taxonomy", "evaluate", "app", "demo", "prepare",
    "publish", "space", "convert", "reproduce", "study",
)  # fmt: skip
# What a command's help must not wait for.
HEAVY = {"torch", "transformers", "datasets", "matplotlib", "numpy", "PIL", "accelerate", "scipy"}


def run_python(code, *arguments, **options):
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, cwd="/", **options
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_every_name_is_what_it_says():
    for name in FUNCTIONS:
        function = getattr(prompt_cam_hf, name)
        assert inspect.isfunction(function) and function.__name__ == name
    classes = set(prompt_cam_hf.__all__) - FUNCTIONS - {"__version__"}
    assert classes and all(inspect.isclass(getattr(prompt_cam_hf, name)) for name in classes)
    assert set(prompt_cam_hf.__all__) <= set(dir(prompt_cam_hf))
    with pytest.raises(AttributeError, match="has no attribute 'explian'"):
        prompt_cam_hf.explian  # noqa: B018
    with pytest.raises(ImportError):
        exec("from prompt_cam_hf import explian")


def test_names_survive_pickling_reload_and_imports_of_modules():
    assert pickle.loads(pickle.dumps(prompt_cam_hf.explain)) is prompt_cam_hf.explain
    assert run_python(
        "import importlib, prompt_cam_hf, prompt_cam_hf.explanations.explain, prompt_cam_hf.class_atlas as module\n"
        "importlib.reload(prompt_cam_hf)\n"
        "from prompt_cam_hf import *\n"
        "print(explain is prompt_cam_hf.explanations.explain.explain, atlas is module.atlas)"
    ).split() == ["True", "True"]


def test_type_checkers_see_what_is_exported():
    """The table of lazy names, the imports for type checkers and `__all__` agree."""
    tree = ast.parse(Path(prompt_cam_hf.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == {name: f"prompt_cam_hf.{module}" for name, module in prompt_cam_hf._MODULES.items()}
    assert {*seen, "__version__"} == set(prompt_cam_hf.__all__)


def test_the_import_registers_the_model(model_folder):
    code = (
        "import sys, prompt_cam_hf; from transformers import AutoModelForImageClassification as Auto\n"
        "print(type(Auto.from_pretrained(sys.argv[1])).__module__)"
    )
    assert run_python(code, model_folder).split() == ["prompt_cam_hf.modeling.modeling_prompt_cam"]


@pytest.fixture
def bird(tmp_path):
    Image.new("RGB", (40, 30), (200, 30, 60)).save(tmp_path / "bird.png")
    return tmp_path / "bird.png"


_FOUR_WAYS = """
import sys
from transformers import pipeline
folder, image, *steps = sys.argv[1:]
for step in steps:
    if step == "import":
        import prompt_cam_hf
        continue
    try:
        pipe = pipeline("image-classification", model=folder, trust_remote_code=step == "trusted")
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
        print("refused")
        continue
    answer = pipe(image, trait_maps=True, top_k=1)[0]
    assert answer["trait_maps"].shape == (4, 4, 4) and len(answer["head_order"]) == 4
    print(type(pipe).__module__.split(".")[0], type(pipe.model).__module__.split(".")[0])
"""
HUB, OURS = "transformers_modules transformers_modules", "prompt_cam_hf prompt_cam_hf"


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (("untrusted", "trusted", "import", "untrusted", "trusted"), ["refused", HUB, OURS, OURS]),
        (("import", "trusted", "untrusted"), [OURS, OURS]),
        (("trusted", "untrusted", "trusted"), [HUB, "refused", HUB]),
    ],
    ids=["imported later", "imported first", "never imported"],
)
def test_trait_maps_imported_or_not_and_trusted_or_not(model_folder, bird, tmp_path, steps, expected):
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    printed = run_python(_FOUR_WAYS, model_folder, bird, *steps, env=environment)
    assert printed.splitlines() == expected


def test_other_models_are_answered_by_the_stock_pipeline(tmp_path, bird):
    ViTForImageClassification(tiny_backbone_config(num_labels=3)).save_pretrained(tmp_path / "vit")
    build_image_processor(32).save_pretrained(tmp_path / "vit")
    pipe = pipeline("image-classification", model=str(tmp_path / "vit"))
    assert type(pipe) is ImageClassificationPipeline
    stock = ImageClassificationPipeline(pipe.model, image_processor=pipe.image_processor, task=pipe.task)
    assert pipe(str(bird), top_k=2) == stock(str(bird), top_k=2)
    with pytest.raises(TypeError, match="trait_maps"):
        pipe(str(bird), trait_maps=True)
    pipe.save_pretrained(tmp_path / "saved")
    assert "prompt_cam" not in (tmp_path / "saved" / "config.json").read_text()


def test_a_loaded_model_gets_its_pipeline_too(bird):
    pipe = pipeline("image-classification", model=tiny_model(), image_processor=build_image_processor(32))
    assert type(pipe) is prompt_cam_hf.PromptCAMImageClassificationPipeline
    assert pipe(str(bird), trait_maps=True)[0]["trait_maps"].shape == (4, 4, 4)


_HELP = """
import sys
sys.argv = ["prompt-cam", *sys.argv[1:]]
try:
    from prompt_cam_hf.cli import app
    app()
except SystemExit as end:
    assert not end.code, end.code
print("imported:", *sorted(name for name in sys.modules if "." not in name))
"""


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), *((name, "--help") for name in COMMANDS)])
def test_help_waits_for_nothing(arguments):
    text, _, imported = run_python(_HELP, *arguments).rpartition("imported:")
    assert "prompt_cam_hf" in imported.split() and not HEAVY & set(imported.split())
    assert prompt_cam_hf.__version__ in text if arguments == ("--version",) else "Usage: prompt-cam" in text
    assert "bool" not in text


def test_help_of_the_module_waits_for_nothing():
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "prompt_cam_hf", "--help"], capture_output=True, text=True, cwd="/"
    )
    assert run.returncode == 0 and "Usage: prompt-cam" in run.stdout
    assert not HEAVY & {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}


def test_help_names_what_the_library_knows():
    from prompt_cam_hf.data.prepare import FACTS
    from prompt_cam_hf.evaluation.measure import METRIC_GROUPS
    from prompt_cam_hf.evaluation.subjects import MAPS
    from prompt_cam_hf.metrics.faithfulness import PRESETS

    evaluate = " ".join(run_python(_HELP, "evaluate", "--help").split())
    for names in (METRIC_GROUPS, MAPS, PRESETS):
        assert ", ".join(names) in evaluate
    assert ", ".join(FACTS) in " ".join(run_python(_HELP, "prepare", "--help").split())
