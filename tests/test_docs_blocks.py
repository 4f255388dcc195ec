# SPDX-License-Identifier: MIT
"""Every code block of README.md and docs/ runs, or is checked for names and arguments for a reason given there."""

import json
import re

import pytest
import torch
from docs_blocks import PAGES, ROOT, all_blocks, check_line, check_python, read_blocks, run_page
from workplace import SIZES, fixture_made, fixture_workplace  # noqa: F401

from prompt_cam_hf import PromptCAMForImageClassification
from prompt_cam_hf.data.images import build_image_processor
from prompt_cam_hf.metrics.faithfulness import PRESETS

# Pages of more than about ten seconds.
SLOW = {"README.md", "docs/first_hour.md"}
# What a page says is there afterwards.
MADE = {
    "docs/first_hour.md": [
        "my_model/model.safetensors", "my_model/learning_curve.png", "my_model/confusion_test.png",
        "traits/bird.traits.png", "traits/bird.traits.json", "traits/bird.traits.csv", "both/bird.comparison.png",
        "without/bird.removal.png", "atlas/index.html", "report/index.html",
    ],
    "docs/traits/explain.md": ["traits/blue_jay.traits.png", "traits.png", "column.pdf"],
    "docs/official_checkpoints.md": ["promptcam-dino-cub/model.safetensors"],
}  # fmt: skip
TITLES = {page.relative_to(ROOT).as_posix(): page for page in PAGES if read_blocks(page)}


def taken_for_granted(title):
    """What a page uses and does not make."""
    side = SIZES["image_size"]
    pixel_values = torch.rand(2, 3, side, side)
    if title == "docs/transformers.md":
        return {"dataset": [{"pixel_values": pixels, "labels": 0} for pixels in pixel_values]}
    if title == "docs/metrics.md":
        return {"image_processor": build_image_processor(side)}
    if title == "docs/taxonomy.md":
        return {"pixel_values": pixel_values}
    if title == "docs/baselines.md":
        model = PromptCAMForImageClassification.from_pretrained("my_model")
        return {"model": model, "pixel_values": pixel_values, "classes": torch.tensor([0, 1])}
    return {}


@pytest.mark.parametrize("title", [pytest.param(t, marks=pytest.mark.slow if t in SLOW else ()) for t in TITLES])
def test_a_page_runs(title, workplace):
    # Images of 224 pixels would take minutes there.
    smaller = {"224": str(SIZES["image_size"])} if title == "docs/metrics.md" else {}
    run_page(TITLES[title], smaller, **taken_for_granted(title))
    assert not [path for path in MADE.get(title, []) if not (workplace / path).is_file()]
    if title == "docs/first_hour.md":
        results = json.loads((workplace / "my_model" / "results.json").read_text())
        assert results["test"]["top1"] > 0.8


def test_no_block_is_skipped():
    """A block that does not run has a reason, and a page without code has none that looks like it."""
    blocks = list(all_blocks())
    assert len(blocks) > 80
    assert {block.fate.split(":")[0].split(",")[0] for block in blocks} == {"run", "checked", "text"}
    assert sum(block.fate.startswith("run") for block in blocks) > 45
    for block in blocks:
        assert set(block.only) <= {words[1] for words in block.commands()} if block.only else True, block


@pytest.mark.parametrize(
    "source",
    [
        "from prompt_cam_hf import explian",
        "import prompt_cam_hf.explains",
        "from prompt_cam_hf import explain\nexplain('my_model')",
        "from prompt_cam_hf import explain\nexplain('my_model', 'bird.jpg', knid='evidence')",
        "from prompt_cam_hf import PromptCAMForImageClassification as Model\nModel.from_backbones('a')",
        "explain(",
    ],
)
def test_faults_of_python_are_found(source):
    with pytest.raises((ImportError, TypeError, AttributeError, SyntaxError)):
        check_python(source)


@pytest.mark.parametrize(
    "line",
    [
        "prompt-cam explian my_model bird.jpg --out x",
        "prompt-cam explain my_model bird.jpg --outt x",
        "prompt-cam explain my_model bird.jpg --kind colour --out x",
        "prompt-cam train photos --out my_model --num_epochs 3",
        "accelerate launch training/trains.py own_photos --data photos",
        "accelerate launch -m prompt_cam_hf.training.train own_photos --data photos --lerning_rate 1",
        "python benchmarks/bench_ranking.py --nothing",
        "python nowhere.py",
        "pip install .[apps]",
        "make everything",
        "prompt_cam demo",
    ],
)
def test_faults_of_commands_are_found(line):
    with pytest.raises((Exception, SystemExit)):
        check_line(line.split())


def test_what_the_commands_of_the_readme_make_is_not_committed():
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    made = [words[words.index("--out") + 1] for block in read_blocks(ROOT / "README.md") if block.language == "bash"
            for words in block.commands() if "--out" in words]  # fmt: skip
    assert len(made) > 5 and {f"/{name}/" for name in made} <= {*ignored}


def test_the_tables_of_metrics_name_every_preset():
    text = (ROOT / "docs" / "metrics.md").read_text()
    assert re.findall(r"^\| `([a-z-]+)` \|", text, flags=re.MULTILINE) == list(PRESETS)
