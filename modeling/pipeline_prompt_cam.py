# SPDX-License-Identifier: MIT
"""The image-classification pipeline, with the traits behind each answer."""

from typing import Any, cast

from transformers import ImageClassificationPipeline
from transformers.utils import ModelOutput

from .ranking_prompt_cam import ScoringModel, rank_heads_greedily

_DEFAULT_TOP_K = 5  # of transformers' own pipeline


class PromptCAMImageClassificationPipeline(ImageClassificationPipeline):
    """Image classification that can also say where it looked.

    Called without `trait_maps`, it is transformers' own pipeline. With `trait_maps=True`, each of the `top_k` answers
    also holds `trait_maps`, a float32 array (heads, rows, cols) of the class prompt's attention to each patch (softmax
    weights, not renormalised), and `head_order`, the heads from the most to the least important for this class
    (greedy blurring, paper section 3).
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._prepared = cast(ScoringModel, self.model).prepared()

    def _sanitize_parameters(  # type: ignore[override]
        self, trait_maps: bool | None = None, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if trait_maps is not None:
            top_k = postprocess.get("top_k", _DEFAULT_TOP_K) if trait_maps else 0
            forward = {**forward, "num_trait_classes": min(top_k, len(self._class_names))}
        return preprocess, forward, postprocess

    @property
    def _class_names(self) -> dict[int, str]:
        return cast(dict[int, str], self.model.config.id2label)

    def _forward(  # type: ignore[override]
        self, model_inputs: dict[str, Any], num_trait_classes: int = 0
    ) -> ModelOutput:
        model = cast(ScoringModel, self.model)
        with self._prepared:
            if not num_trait_classes:
                return super()._forward(model_inputs)
            state = model.last_layer_state(**model_inputs)
        logits = model.last_layer_logits(state)
        classes = logits.topk(num_trait_classes, dim=-1).indices
        return ModelOutput(
            logits=logits,
            trait_classes=classes,
            trait_maps=model.trait_maps(state, classes),
            head_order=rank_heads_greedily(model, state, classes).order,
        )

    def postprocess(  # type: ignore[override]
        self, model_outputs: ModelOutput, **kwargs: Any
    ) -> list[dict[str, Any]]:
        """Labels and scores, best first, as transformers' own pipeline gives them; and the traits, if asked for."""
        answers = super().postprocess(model_outputs, **kwargs)
        if "trait_maps" not in model_outputs:
            return answers
        rows = {self._class_names[c]: i for i, c in enumerate(model_outputs["trait_classes"][0].tolist())}
        for answer in answers:
            row = rows[answer["label"]]
            answer["trait_maps"] = model_outputs["trait_maps"][0, row].numpy()
            answer["head_order"] = model_outputs["head_order"][0, row].tolist()
        return answers


__all__ = ["PromptCAMImageClassificationPipeline"]
