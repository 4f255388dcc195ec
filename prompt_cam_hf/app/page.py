# SPDX-License-Identifier: MIT
"""The page: which panels there are, and what each does when a visitor touches it. It computes nothing itself."""

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import gradio as gr
from PIL import Image

from prompt_cam_hf.app import fragments
from prompt_cam_hf.app.calls import write_command, write_python
from prompt_cam_hf.app.examples import Examples
from prompt_cam_hf.app.session import AskedModel, Question, Visit, look, read_region, save_result
from prompt_cam_hf.data.images import ImageSource, UnreadableImageError
from prompt_cam_hf.explanations.figures import Scale
from prompt_cam_hf.explanations.maps import MapKind
from prompt_cam_hf.explanations.removal import Region, RemovalMethod
from prompt_cam_hf.messages import tell_error

_HERE = Path(__file__).parent
_FILE_SIZE = "64mb"
# Images of so many visitors are kept; the one who came first is forgotten first.
_VISITORS = 100
# Uploads and files that were taken along are removed when they are so old, looked for as often, in seconds.
_CLEAN_EVERY, _CLEAN_AGE = 300, 3600
_SHOWN_BY_BROWSERS = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".avif"}
_LARGEST_SHOWN = 1024
_SUBDUED = ("body_text_color_subdued", "block_info_text_color", "block_title_text_color", "block_label_text_color")
_ENDINGS = ["png", "pdf", "svg", "json", "csv", "region"]
_NO_IMAGE = "Pick an image first."
_CHOOSE = """element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  element.querySelectorAll("[aria-pressed]").forEach((other) => other.setAttribute("aria-pressed", other === button));
  trigger("select", { ...button.dataset });
});"""


class _Page(gr.Blocks):
    """Blocks whose `launch` has the page's own settings where others are not given."""

    def launch(self, *arguments: Any, **options: Any) -> Any:
        """Serve the page; arguments as in Gradio."""
        own: dict[str, Any] = {
            "css": (_HERE / "page.css").read_text(encoding="utf-8"),
            "theme": _theme(),
            "footer_links": [],
            "run_history": False,
            "ssr_mode": False,
            "max_file_size": _FILE_SIZE,
            "state_session_capacity": _VISITORS,
        }
        return super().launch(*arguments, **(own | options))


def _theme() -> gr.themes.Base:
    """Gradio's own with the fonts of the visitor's system, and with text that stands out enough to be read."""
    theme = gr.themes.Default(
        primary_hue="blue",
        font=("ui-sans-serif", "system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    )
    grey = {f"{name}{dark}": f"*neutral_{300 if dark else 600}" for name in _SUBDUED for dark in ("", "_dark")}
    return theme.set(**grey, **{f"button_primary_background_fill{dark}": "*primary_700" for dark in ("", "_dark")})


def _told(function: Callable) -> Callable:
    """Show an error as one sentence on the page."""

    @wraps(function)
    def run(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            words = fragments.escape(tell_error(error))
            raise gr.Error(words, duration=None, title="That did not work", print_exception=False) from error

    return run


def _path_of(payload: Any) -> Any:
    """What Gradio hands on of an upload: where it lies, and what the visitor calls it; opening it is up to us."""
    return None if payload is None else (payload.path, Path(payload.orig_name or "image").name)


# The scale of colours, and opacity and threshold of the large map.
_Style = tuple[Scale, float, float]


def build_page(model: AskedModel, examples: Examples) -> gr.Blocks:
    """Lay out the page; see `prompt_cam_hf.app.build_app`."""
    with _Page(
        title="Prompt-CAM", analytics_enabled=False, delete_cache=(_CLEAN_EVERY, _CLEAN_AGE), fill_width=True
    ) as page:
        _Panels(page, model, examples).connect()
    return page


# fmt: off
class _Panels:
    """The panels, and what each does when it is touched."""

    def __init__(self, page: gr.Blocks, model: AskedModel, examples: Examples):
        self.page, self.model, self.examples = page, model, examples
        self.visit, self.painted = gr.State(), gr.State([])
        classes = model.classes(model.prompts_in_use)
        gr.HTML(fragments.show_model(model.name, len(classes), model.num_heads))
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                self._lay_out_pick()
                gr.Markdown("## 2. Answer\nWhat the model sees in the image, and how sure it is.")
                self.answer = gr.HTML(_NO_IMAGE, elem_id="answer")
            with gr.Column(scale=3, min_width=320):
                self._lay_out_ask(_choices(classes))
        gr.Markdown("## 4. Look\nThe map of the head that was clicked, over the image.")
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                self.large = gr.HTML(_NO_IMAGE, elem_id="large")
            with gr.Column(scale=2, min_width=320):
                self._lay_out_look(_choices(classes))
        gr.Markdown(
            "## 5. Try\nTake a trait away: box or paint it, or take the region where the chosen head looks. As a "
            "control, a region of the same shape elsewhere is removed as well."
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                self._lay_out_try()
            with gr.Column(scale=3, min_width=320):
                self.removed = gr.HTML(fragments.show_removal(None), elem_id="removed")
        gr.Markdown("## 6. Take along\nThe figure, the numbers, and the calls that make them again.")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                self.what = gr.Radio(["explanation"], value="explanation", label="Result", elem_id="what")
                self.ending = gr.Radio(
                    _ENDINGS, value="png", label="As", info="region: the removed region as a mask", elem_id="ending"
                )
                self.make = gr.Button("Make the file", elem_id="make")
                self.file = gr.File(label="File", interactive=False, elem_id="file")
            with gr.Column(scale=3, min_width=320):
                self.command = gr.Code(
                    label="Command line", interactive=False, wrap_lines=True, elem_id="command"
                )
                self.python = gr.Code(
                    label="Python", interactive=False, wrap_lines=True, elem_id="python"
                )
                self.link = gr.HTML(elem_id="link")

    def _lay_out_pick(self) -> None:
        gr.Markdown("## 1. Pick\nUpload an image, drop it, paste it, take one with the camera, or choose one below.")
        self.picker = gr.Image(
            label="Image", type="filepath", sources=["upload", "clipboard", "webcam"], height=320,
            buttons=["fullscreen"], elem_id="picker",
        )
        # Gradio would open the file itself, and say less about one that cannot be read.
        self.picker.preprocess = _path_of  # type: ignore[method-assign]
        self.folder = gr.Dropdown(
            [("one of each class", ""), *((name, name) for name in self.examples.classes)], value="",
            label="Examples", visible=bool(self.examples.classes), elem_id="folder",
        )
        self.gallery = gr.HTML(
            fragments.show_examples(self.examples.shown()), js_on_load=_CHOOSE, visible=bool(self.examples.files),
            elem_id="examples",
        )

    def _lay_out_ask(self, choices: list[tuple[str, int]]) -> None:
        gr.Markdown(
            "## 3. Ask\nWhere does each head look for a class? Choose classes, or none for the predicted one. The "
            "most important head comes first."
        )
        self.asked = gr.Dropdown(choices, multiselect=True, label="Classes (type to search)", elem_id="asked")
        with gr.Row():
            self.kind = gr.Radio(
                list(get_args(MapKind)), value="attention", label="Maps show", elem_id="kind",
                info="where a prompt looks, or how much what it finds moves the score",
            )
            self.method = gr.Radio(
                self.model.methods, value="greedy", label="Ranking of heads", elem_id="method",
                info="how the importance of a head is measured",
            )
            self.scale = gr.Radio(
                [("own for each map", "map"), ("own for each head", "head"), ("one for all", "figure")], value="map",
                label="Colour scale", info="on one for all, weak heads stay dark", elem_id="scale",
            )
            self.prompts = gr.Dropdown(
                self.model.prompt_sets, value=self.model.prompts_in_use, label="Prompt set",
                visible=len(self.model.prompt_sets) > 1, elem_id="prompts",
            )
        self.heads = gr.HTML(_NO_IMAGE, js_on_load=_CHOOSE, elem_id="heads")

    def _lay_out_look(self, choices: list[tuple[str, int]]) -> None:
        self.opacity = gr.Slider(0, 1, 1, step=0.05, label="Opacity of the map", elem_id="opacity")
        self.threshold = gr.Slider(
            0, 1, 0, step=0.05, label="Threshold", info="share of the scale; what is below is left out",
            elem_id="threshold",
        )
        self.beside = gr.Dropdown(
            [("none", -1), *choices], value=-1, label="Second class beside it", elem_id="beside",
            info="what both share, and what tells them apart",
        )
        self.kept = gr.Slider(
            0, self.model.num_heads, self.model.num_heads, step=1, label="Keep the first n heads", elem_id="kept",
            info="of the class looked at; the attention of its other heads is made uniform",
        )
        self.kept_scores = gr.HTML(elem_id="kept-scores")

    def _lay_out_try(self) -> None:
        javascript = (_HERE / "page.js").read_text(encoding="utf-8")
        self.canvas = gr.HTML(_NO_IMAGE, js_on_load=javascript, elem_id="canvas")
        self.filling = gr.Radio(
            list(get_args(RemovalMethod)), value="inpaint", label="Fill the region by", elem_id="filling"
        )
        with gr.Row():
            self.remove_painted = gr.Button("Remove what is painted", variant="primary", elem_id="remove-painted")
            self.remove_head = gr.Button("Remove the head's region", elem_id="remove-head")
# fmt: on

    def connect(self) -> None:
        """Say what follows from what."""
        style = [self.scale, self.opacity, self.threshold]
        settings = [self.asked, self.kind, self.method, self.prompts, *style]
        looked = [self.visit, self.large, self.beside, self.kept, self.kept_scores]
        taken = [self.what, self.command, self.python]
        answered = [self.answer, self.heads, *looked, *taken, self.link]
        everything = [*answered, self.canvas, self.removed, self.painted, self.file]
        self._on(self.picker.input, self.pick, [self.picker, *settings], [*everything, self.picker])
        self._on(self.picker.clear, self.forget, [], everything)
        self._on(self.gallery.select, self.pick_example, settings, [*everything, self.picker])
        self._on(self.folder.input, self.list_examples, [self.folder], [self.gallery])
        restored = [self.asked, self.kind, self.method, self.prompts, self.beside]
        self._on(self.page.load, self.restore, [], restored)
        for setting in (self.asked, self.kind, self.method):
            self._on(setting.input, self.ask, [self.visit, *settings], answered)
        self._on(self.prompts.input, self.change_prompts, [self.visit, *settings], [*answered, self.asked])
        self._on(self.heads.select, self.look, [self.visit, *style], [*looked, *taken])
        self._on(self.scale.input, self.rescale, [self.visit, *style], [self.heads, self.large])
        for slider in (self.opacity, self.threshold):
            self._on(slider.change, self.redraw, [self.visit, *style], [self.large])
        self._on(self.beside.input, self.compare, [self.visit, self.beside, *style], [self.visit, self.large, *taken])
        self._on(self.kept.input, self.keep, [self.visit, self.kept], [self.kept_scores])
        self.canvas.input(_shapes_of, None, self.painted, queue=False, api_visibility="private")
        tried = [self.visit, self.removed, *taken]
        self._on(self.remove_painted.click, self.remove_painting, [self.visit, self.painted, self.filling], tried)
        self._on(self.remove_head.click, self.remove_head_region, [self.visit, self.filling], tried)
        self._on(self.what.input, self.take_along, [self.visit, self.what], taken)
        self._on(self.make.click, self.make_file, [self.visit, self.what, self.ending], [self.file])

    @staticmethod
    def _on(event: Callable, function: Callable, inputs: list, outputs: list) -> None:
        """One at a time, for a network uses all cores by itself; others wait in the queue."""
        event(
            _told(function), inputs, outputs, concurrency_id="model", concurrency_limit=1, api_visibility="private",
            trigger_mode="always_last",
        )  # fmt: skip

    def pick(self, upload: tuple[str, str] | None, *settings: Any) -> dict:
        """Open and explain an upload."""
        if upload is None:
            return self.forget()
        path, name = upload
        try:
            answered = self._open({"path": name, "bytes": Path(path).read_bytes()}, name, settings)
        except (UnreadableImageError, OSError) as error:
            words = fragments.show_refusal(tell_error(error))
            return {**self.forget(), self.answer: words, self.picker: None}
        shown = Path(name).suffix.lower() in _SHOWN_BY_BROWSERS
        return answered if shown else {**answered, self.picker: _preview(answered[self.visit])}

    def pick_example(self, event: gr.EventData, *settings: Any) -> dict:
        """Open and explain an example."""
        file = self.examples.files[int(event._data["example"])]
        answered = self._open(file, file.name, settings)
        return {**answered, self.picker: _preview(answered[self.visit])}

    def _open(self, source: ImageSource, name: str, settings: tuple) -> dict:
        question, style = self._question(*settings)
        visit = self.model.ask(self.model.open(source), name, question)
        return {
            **self._answered(visit, style),
            self.canvas: fragments.show_canvas(visit),
            self.removed: fragments.show_removal(None),
            self.painted: [],
            self.file: None,
        }

    def forget(self) -> dict:
        """Forget the image."""
        empty = dict.fromkeys((self.answer, self.heads, self.large, self.canvas), _NO_IMAGE)
        nothing = dict.fromkeys((self.kept_scores, self.link, self.command, self.python), "")
        return {
            **empty,
            **nothing,
            self.visit: None,
            self.removed: fragments.show_removal(None),
            self.painted: [],
            self.file: None,
        }

    def restore(self, request: gr.Request) -> dict:
        """Set what the link to the page asks."""
        question = self.model.read_query(dict(request.query_params))
        choices = _choices(self.model.classes(question.prompts))
        return {
            self.asked: gr.Dropdown(choices, value=list(question.classes)),
            self.kind: question.kind,
            self.method: question.method,
            self.prompts: question.prompts,
            self.beside: gr.Dropdown([("none", -1), *choices], value=-1),
        }

    def list_examples(self, folder: str) -> str:
        """The examples of a class, or one of each."""
        return fragments.show_examples(self.examples.shown(folder or None))

    def _question(
        self, numbers: list[int], kind: Any, method: Any, prompts: str, *style: Any
    ) -> tuple[Question, _Style]:
        return Question(prompts, tuple(numbers or ()), kind, method), style

    def _answered(self, visit: Visit, style: _Style) -> dict:
        query = fragments.escape(self.model.write_query(visit.question))
        return {
            self.answer: fragments.show_answer(visit),
            self.heads: fragments.show_heads(visit, style[0]),
            self.link: f'<p><a href="?{query}">Link that asks the same of any image</a></p>',
            **self._looked(visit, style),
            **self._taken(visit, "explanation"),
        }

    def _looked(self, visit: Visit, style: _Style) -> dict:
        return {
            self.visit: visit,
            self.large: fragments.show_large(visit, *style),
            self.beside: -1 if visit.comparison is None else visit.comparison.classes[1].number,
            self.kept: self.model.num_heads,
            self.kept_scores: fragments.show_kept(visit, self.model.num_heads),
        }

    def _taken(self, visit: Visit, what: str) -> dict:
        command = write_command(self.model, visit, what)
        return {
            self.what: gr.Radio(list(visit.results), value=what),
            self.command: gr.Code(command, visible=bool(command)),
            self.python: write_python(self.model, visit, what),
        }

    def ask(self, visit: Visit | None, *settings: Any) -> dict:
        """Ask something else about the same image."""
        question, style = self._question(*settings)
        if visit is None:
            return {self.answer: _NO_IMAGE}
        return self._answered(self.model.ask(visit.explanation.image, visit.name, question, visit), style)

    def change_prompts(self, visit: Visit | None, *settings: Any) -> dict:
        """Ask another prompt set; it has classes of its own."""
        question, style = self._question(*settings)
        choices = _choices(self.model.classes(question.prompts))
        updates: dict = {}
        if visit is not None:
            answered = self.model.ask(visit.explanation.image, visit.name, replace(question, classes=()), visit)
            updates = self._answered(answered, style)
        beside = gr.Dropdown([("none", -1), *choices], value=-1)
        return {**updates, self.asked: gr.Dropdown(choices, value=[]), self.beside: beside}

    def look(self, event: gr.EventData, visit: Visit | None, *style: Any) -> dict:
        """Look at a head, or at all."""
        head = event._data["head"]
        visit = look(_present(visit), int(event._data["place"]), int(head) if head else None)
        what = "comparison" if visit.comparison is not None else "explanation"
        return {**self._looked(visit, style), **self._taken(visit, what)}

    def redraw(self, visit: Visit | None, *style: Any) -> dict:
        """Draw the large map in another opacity or from another threshold."""
        return {self.large: _NO_IMAGE if visit is None else fragments.show_large(visit, *style)}

    def rescale(self, visit: Visit | None, *style: Any) -> dict:
        """Draw all maps on another scale."""
        if visit is None:
            return {self.large: _NO_IMAGE}
        return {self.heads: fragments.show_heads(visit, style[0]), self.large: fragments.show_large(visit, *style)}

    def compare(self, visit: Visit | None, other: int, *style: Any) -> dict:
        """Put another class beside the one that is looked at."""
        visit = self.model.compare(_present(visit), None if other < 0 else other)
        what = "comparison" if visit.comparison is not None else "explanation"
        return {self.visit: visit, self.large: fragments.show_large(visit, *style), **self._taken(visit, what)}

    def keep(self, visit: Visit | None, count: int) -> dict:
        """Keep the first heads only."""
        return {self.kept_scores: fragments.show_kept(_present(visit), int(count))}

    def remove_painting(self, visit: Visit | None, shapes: list[dict], method: RemovalMethod) -> dict:
        """Remove what is painted."""
        visit = _present(visit)
        return self._remove(visit, read_region(visit.explanation.image.size, shapes), method)

    def remove_head_region(self, visit: Visit | None, method: RemovalMethod) -> dict:
        """Remove the region where the head that is looked at looks."""
        visit = _present(visit)
        if visit.head is None:
            raise ValueError("All heads combined have no region of their own; click one head first.")
        return self._remove(visit, visit.head, method)

    def _remove(self, visit: Visit, region: Region, method: RemovalMethod) -> dict:
        visit = self.model.remove(visit, region, method)
        return {
            self.visit: visit,
            self.removed: fragments.show_removal(visit.removal),
            **self._taken(visit, "removal"),
        }

    def take_along(self, visit: Visit | None, what: str) -> dict:
        """Show the calls that make a result."""
        return self._taken(_present(visit), what)

    def make_file(self, visit: Visit | None, what: str, ending: str) -> dict:
        """Write a result as a file, into Gradio's folder of those that are cleaned up."""
        with TemporaryDirectory() as folder:
            path = save_result(_present(visit), what, ending, Path(folder))
            return {self.file: self.file.move_resource_to_block_cache(path)}


def _preview(visit: Visit) -> Image.Image:
    """The image as every browser can show it."""
    image = visit.explanation.image.copy()
    image.thumbnail((_LARGEST_SHOWN, _LARGEST_SHOWN))
    return image


def _present(visit: Visit | None) -> Visit:
    if visit is None:
        raise ValueError(_NO_IMAGE)
    return visit


def _shapes_of(event: gr.EventData) -> list[dict]:
    return event._data["shapes"]


def _choices(classes: dict[int, str]) -> list[tuple[str, int]]:
    return [(label, number) for number, label in classes.items()]
