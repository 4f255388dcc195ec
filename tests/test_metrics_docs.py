# SPDX-License-Identifier: MIT
"""The Python of docs/metrics.md runs as it stands, from top to bottom, though on smaller images."""

import re
from pathlib import Path

from conftest import tiny_model
from PIL import Image

from prompt_cam_hf.data.images import build_image_processor
from prompt_cam_hf.metrics.faithfulness import PRESETS

PAGE = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()


def test_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model(backbone_fields={"image_size": 64, "patch_size": 16}).save_pretrained("my_model")
    folder, image = Path("CUB_200_2011"), "017.Cardinal/Cardinal_0001_17057.jpg"
    (folder / "images" / image).parent.mkdir(parents=True)
    (folder / "parts").mkdir()
    Image.new("RGB", (50, 40)).save(folder / "images" / image)
    for name, text in {
        "images.txt": f"1 {image}\n",
        "bounding_boxes.txt": "1 5.0 5.0 40.0 30.0\n",
        "parts/parts.txt": "2 beak\n5 crown\n",
        "parts/part_locs.txt": "1 2 10.0 10.0 1\n1 5 30.0 20.0 1\n",
    }.items():
        (folder / name).write_text(text)
    names = {"image_processor": build_image_processor(64)}
    snippets = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(snippets) > 8
    for snippet in snippets:
        exec(snippet.replace("224", "64"), names)
    assert names["change"].mass.shape == (1, 2)
    assert names["result"].similarity.shape == (4, 8)


def test_tables_name_every_preset():
    assert re.findall(r"^\| `([a-z-]+)` \|", PAGE, flags=re.MULTILINE) == list(PRESETS)
