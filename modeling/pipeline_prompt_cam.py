# SPDX-License-Identifier: MIT
"""How does an image become labels with scores, and the traits behind them?"""

from typing import Any

from transformers import ImageClassificationPipeline
from transformers.utils import ModelOutput

from .ranking_prompt_cam import rank_heads_greedily

_DEFAULT_TOP_K = 5  # of transformers' own pipeline


class PromptCAMImageClassificationPipeline(ImageClassificationPipeline):
    """Image classification that can also say where it looked.

    Called without `trait_maps`, it is transformers' own pipeline. With `trait_maps=True`, each of the `top_k` answers
    also holds `trait_maps`, a float32 array (heads, rows, cols) of the class prompt's attention to each patch (softmax
    weights, not renormalised), and `head_order`, the heads from the most to the least important for this class
    (greedy blurring, paper section 3).
    """

    def _sanitize_parameters(
        self, trait_maps: bool | None = None, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        if trait_maps is not None:
            top_k = postprocess.get("top_k", _DEFAULT_TOP_K) if trait_maps else 0
            forward = {**forward, "num_trait_classes": min(top_k, len(self.model.config.id2label))}
        return preprocess, forward, postprocess

    def _forward(self, model_inputs: dict[str, Any], num_trait_classes: int = 0) -> ModelOutput:
        if not num_trait_classes:
            return super()._forward(model_inputs)
        state = self.model.last_layer_state(**model_inputs)
        logits = self.model.last_layer_logits(state)
        classes = logits.topk(num_trait_classes, dim=-1).indices
        return ModelOutput(
            logits=logits,
            trait_classes=classes,
            trait_maps=self.model.trait_maps(state, classes),
            head_order=rank_heads_greedily(self.model, state, classes).order,
        )

    def postprocess(self, model_outputs: ModelOutput, **kwargs: Any) -> list[dict[str, Any]]:
        """Labels and scores, best first, as transformers' own pipeline gives them; and the traits, if asked for."""
        answers = super().postprocess(model_outputs, **kwargs)
        if "trait_maps" not in model_outputs:
            return answers
        rows = {self.model.config.id2label[c]: i for i, c in enumerate(model_outputs["trait_classes"][0].tolist())}
        for answer in answers:
            row = rows[answer["label"]]
            answer["trait_maps"] = model_outputs["trait_maps"][0, row].numpy()
            answer["head_order"] = model_outputs["head_order"][0, row].tolist()
        return answers


__all__ = ["PromptCAMImageClassificationPipeline"]
