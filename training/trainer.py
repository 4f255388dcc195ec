# SPDX-License-Identifier: MIT
"""What training a Prompt-CAM needs beyond transformers' Trainer.

Small checkpoints that are never half written, an order of images that no interruption and no number of processes
changes, and a log that can be read.
"""

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler
from transformers import (
    PreTrainedModel,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK, TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from prompt_cam_hf.files import write_atomically
from prompt_cam_hf.training.data import SetEpochCallback

# Written into a checkpoint as the last thing, and removed from it as the first: the digests of all other files.
_COMPLETE = "complete"

# Seconds between two lines of a progress bar that goes to a file.
_LOG_FILE_INTERVAL = 30.0


def on_main_process(function: Callable[[], Any]) -> Any:
    """Call a function in the main process, and return its result in all; a failure there ends all processes."""
    return broadcast_object_list([function() if PartialState().is_main_process else None])[0]


class EpochSampler(Sampler[int]):
    """Every image once an epoch, in an order that depends on the seed and the epoch alone.

    The last batch is filled up with the epoch's first images, so that all batches weigh the same and several
    processes can share each: `batch_size` counts the images of all processes.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int):
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Use the order of another epoch, from 0, from now on; Trainer calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Count the images, those that fill up the last batch included."""
        return math.ceil(self.num_samples / self.batch_size) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_samples)
        return iter(np.resize(order, len(self)).tolist())


class PromptCAMTrainer(Trainer):
    """Trainer whose checkpoints hold what is trained, and whose order of images is reproducible.

    It evaluates every `eval_every_epochs` epochs, and always after the last one. The backbone is trained at
    `backbone_learning_rate`, where that is above 0. From epoch `drop_rate_at_epoch` on, rates are a tenth, and else
    constant; None: as the arguments say.
    """

    model: PreTrainedModel

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        eval_every_epochs: int = 1,
        backbone_learning_rate: float = 0.0,
        drop_rate_at_epoch: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(model, args, **kwargs)
        self._backbone_learning_rate, self._drop_rate_at_epoch = backbone_learning_rate, drop_rate_at_epoch
        self.remove_callback(DEFAULT_PROGRESS_CALLBACK)
        self._report = _Report()
        for callback in (SetEpochCallback(), _EvaluateSomeEpochs(eval_every_epochs), _KeepCheckpoints(), self._report):
            self.add_callback(callback)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer` does; where it fails, the progress bar ends before anything is said of it.

        Args:
            *args: As for `Trainer`.
            **kwargs: As for `Trainer`.

        Returns:
            As for `Trainer`.
        """
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._report.training_bar is not None:
                self._report.training_bar.close()

    def get_train_dataloader(self) -> DataLoader:
        """Give the batches of training, as `Trainer` does."""
        return _with_own_generator(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Give the batches of validation, as `Trainer` does."""
        return _with_own_generator(super().get_eval_dataloader(eval_dataset))

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Name the parameters that decay: all that are trained, the head's bias too, as in the official recipe."""
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the optimiser, as `Trainer` does, with a rate of its own for a backbone that is trained."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self._backbone_learning_rate:
            backbone = {id(parameter) for parameter in cast(PreTrainedModel, self.model.backbone).parameters()}
            group = optimizer.param_groups[0]
            own = [parameter for parameter in group["params"] if id(parameter) in backbone]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in backbone]
            optimizer.add_param_group({**group, "params": own, "lr": self._backbone_learning_rate})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the schedule of rates, as `Trainer` does, or one that falls once."""
        if self._drop_rate_at_epoch is None:
            return super().create_scheduler(num_training_steps, optimizer)
        drop = self._drop_rate_at_epoch * num_training_steps // int(self.args.num_train_epochs)
        self.lr_scheduler = LambdaLR(cast(Any, optimizer or self.optimizer), lambda step: 0.1 if step >= drop else 1.0)
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return EpochSampler(len(dataset), batch_size, args.seed)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        # A later run may come here again, after one that was stopped before this checkpoint was complete.
        (folder / _COMPLETE).unlink(missing_ok=True)
        save_file(_trained_parameters(self.model), folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained_parameters(self.model if model is None else model, resume_from_checkpoint)


def _with_own_generator(loader: DataLoader) -> DataLoader:
    """Let starting workers draw no number from the generator of dropout.

    Workers that outlive an epoch are started once, but once more where a run is resumed.
    """
    getattr(loader, "base_dataloader", loader).generator = torch.Generator()
    return loader


def _trained_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def load_trained_parameters(model: nn.Module, checkpoint: str | os.PathLike) -> None:
    """Set what is trained to a checkpoint's values; the frozen backbone stays.

    Raises:
        ValueError: the checkpoint is of a model with other prompts.
    """
    saved, trained = load_file(Path(checkpoint) / SAFE_WEIGHTS_NAME), _trained_parameters(model)
    if _shapes(saved) != _shapes(trained):
        raise ValueError(f"{checkpoint} holds {_shapes(saved)}, but the model trains {_shapes(trained)}.")
    model.load_state_dict(saved, strict=False)


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def complete_checkpoints(folder: str | os.PathLike) -> list[Path]:
    """List the checkpoints that were written to the end and have not changed since, oldest first."""
    return [path for path in _checkpoints(folder) if _is_whole(path)]


def _is_whole(checkpoint: Path) -> bool:
    try:
        return json.loads((checkpoint / _COMPLETE).read_text()) == _digests(checkpoint)
    except (OSError, ValueError):
        return False


def _digests(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of each file of a checkpoint."""
    files = sorted(path for path in checkpoint.iterdir() if path.name != _COMPLETE)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def newest_checkpoint(folder: str | os.PathLike) -> Path | None:
    """The last complete checkpoint whose best epoch is in a complete checkpoint too, if there is one."""
    complete = {_step(path): path for path in complete_checkpoints(folder)}
    for path in reversed(complete.values()):
        state = TrainerState.load_from_json(str(path / TRAINER_STATE_NAME))
        if state.best_global_step is None or state.best_global_step in complete:
            return path
    return None


def remove_checkpoints_after(checkpoint: Path | None, folder: str | os.PathLike) -> None:
    """Remove what a run that is resumed at `checkpoint` (None: at nothing) will write again.

    These are unfinished checkpoints, and those after where it starts.
    """
    complete = complete_checkpoints(folder)
    for path in _checkpoints(folder):
        if path not in complete or checkpoint is None or _step(path) > _step(checkpoint):
            _remove(path)


def _checkpoints(folder: str | os.PathLike) -> list[Path]:
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _remove(checkpoint: Path) -> None:
    (checkpoint / _COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


class _EvaluateSomeEpochs(TrainerCallback):
    """Leaves out the evaluation of all epochs but every n-th and the last."""

    def __init__(self, every: int):
        self.every = every

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if round(state.epoch) % self.every and state.global_step < state.max_steps:
            control.should_evaluate = False


class _KeepCheckpoints(TrainerCallback):
    """Marks a checkpoint as complete when all processes have written theirs, and keeps the last and the best."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        if not args.should_save:
            return
        folder = Path(str(args.output_dir))
        checkpoint = folder / f"checkpoint-{state.global_step}"
        write_atomically(checkpoint / _COMPLETE, json.dumps(_digests(checkpoint), indent=1).encode())
        for checkpoint in _checkpoints(folder):
            if _step(checkpoint) not in (state.global_step, state.best_global_step):
                _remove(checkpoint)


class _Report(ProgressCallback):
    """Progress bars, and one line an epoch in place of Trainer's dictionaries."""

    loss = math.nan

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("Training")
            if not sys.stderr.isatty():
                self.training_bar.mininterval = _LOG_FILE_INTERVAL

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *rest: Any, **kwargs: Any
    ) -> None:
        if sys.stderr.isatty():
            super().on_prediction_step(args, state, control, *rest, **kwargs)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        self.loss = logs["loss"]
        if not math.isfinite(self.loss):
            raise FloatingPointError(
                f"The loss is {self.loss} after epoch {round(state.epoch)}: training has diverged. Lower the "
                f"learning_rate (now {args.learning_rate}), or use more warmup_epochs."
            )
        if not control.should_evaluate:
            self._write(args, state, "")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_evaluate(args, state, control, **kwargs)
        top1 = kwargs["metrics"]["eval_top1"]
        best = " (best so far)" if state.best_metric is None or top1 > state.best_metric else ""
        self._write(args, state, f"   validation top-1 {top1:6.1%}{best}")

    def _write(self, args: TrainingArguments, state: TrainerState, text: str) -> None:
        if state.is_world_process_zero:
            width = len(str(int(args.num_train_epochs)))
            line = f"epoch {round(state.epoch):{width}}/{int(args.num_train_epochs)}   loss {self.loss:.4f}{text}"
            if self.training_bar is None:
                print(line)
            else:
                self.training_bar.write(line)
