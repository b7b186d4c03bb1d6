"""Supervised fine-tuning with TRL's SFTTrainer.

TRL provides the loss and the training loop. grpo provides the order of the rows, the micro-batches,
the learning-rate schedule, the checkpoints, the metrics and the stop condition.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import Dataset
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import AutoConfig, PrinterCallback, Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

from grpo.config import SftConfig
from grpo.learning import lora, packing
from grpo.learning.deepspeed_setup import (
    MAX_SKIPPED_UPDATES,
    HeapReuse,
    NormLimit,
    deepspeed_config,
    free_deepspeed_engine,
    init_deepspeed,
    learning_rate,
    skipped_updates_error,
)
from grpo.learning.text_batches import MicroBatchSampler
from grpo.run import ranks

# TRL's names of metrics, and grpo's.
METRICS = {
    "loss": "loss",
    "grad_norm": "policy/grad_norm",
    "entropy": "policy/entropy",
    "mean_token_accuracy": "policy/token_accuracy",
}
# Those that are means over a micro-batch's trained tokens.
MEANS_OVER_TOKENS = ("entropy", "mean_token_accuracy")
IGNORED_LABEL = -100  # of tokens that are not trained on


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedInputs:
    """The model and the data of supervised training.

    Attributes:
        model_dir: The directory of the initial model.
        tokenizer: Its tokenizer.
        rows: The sequences, in the order of training, `sft.batch_size` per update:
            `{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}`.
    """

    model_dir: Path
    tokenizer: Any
    rows: Iterable[dict[str, list[int]]]


class SupervisedCallbacks(Protocol):
    """The functions that SupervisedTrainer calls after an update."""

    def on_update(self, row: dict[str, Any]) -> None:
        """Receives the metrics of an update."""

    def save(self, update: int, write: Callable[[Path], None]) -> None:
        """Saves a checkpoint; `write(directory)` writes the trainer's files."""

    def should_stop(self) -> bool:
        """Returns whether to save a checkpoint now and end the training."""


class SupervisedTrainer(SFTTrainer):
    """TRL's trainer with grpo's data order, learning rates, checkpoints and metrics.

    Attributes:
        attention: The name of the model's attention.
        micro_batches: The rows of each micro-batch.
    """

    def __init__(
        self,
        config: SftConfig,
        inputs: SupervisedInputs,
        callbacks: SupervisedCallbacks,
        *,
        output_dir: Path,
    ) -> None:
        """Loads the model and sets up TRL's trainer.

        Args:
            config: The config of the run.
            inputs: The model and the data.
            callbacks: The functions to call after an update.
            output_dir: TRL's output directory. TRL writes no checkpoints there, because
                `callbacks.save` chooses their directories.
        """
        init_deepspeed()
        self._heap = HeapReuse()
        self._config = config
        self._callbacks = callbacks
        self._update_started_at = time.monotonic()
        self._norm_limit: NormLimit | None = None  # set in the first training step
        self._num_consecutive_skips = 0
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = getattr(torch, config.model.dtype)
        rows = list(inputs.rows)
        self._row_tokens = [_num_trained_tokens(row) for row in rows]
        model_config = AutoConfig.from_pretrained(inputs.model_dir)
        has_kernel = packing.supports_varlen_kernel(model_config, dtype, device)
        self.micro_batches = MicroBatchSampler(
            [len(row["input_ids"]) for row in rows],
            rows_per_update=config.sft.batch_size,
            max_tokens=config.learner.micro_batch_tokens,
            # Without the kernel, the attention pads the rows of a packed micro-batch.
            padded=not (config.model.is_packed and has_kernel),
            num_ranks=ranks.world_size(),
        )
        # Under ZeRO-3, the arguments have to exist before the model is loaded: transformers then
        # splits the weights across ranks while it loads them.
        arguments = _training_arguments(config, self.micro_batches.num_per_update, output_dir)
        attention = (
            packing.CONCATENATED_ATTENTION if config.model.is_packed else config.model.attention
        )
        model = lora.load_policy(config, inputs.model_dir, attention)
        self.attention = packing.describe_attention(model.config, dtype, device)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=inputs.tokenizer,
        )
        self.remove_callback(PrinterCallback)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains, and then ends transformers' ZeRO-3 mode.

        In this mode, transformers splits every model that the process creates across the ranks.
        """
        try:
            return super().train(*args, **kwargs)
        finally:
            unset_hf_deepspeed_config()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields `(name, tensor)` for every weight: complete, tied weights once, adapters merged.

        All ranks must iterate together. With ZeRO-3, rank 0 alone gets the weights.
        """
        model: Any = self.model
        adapted_layers = lora.adapted_layers(model)
        # The state dict contains tied weights twice, `named_parameters` once.
        names = {name for name, _ in model.named_parameters()}
        names.update(name for name, _ in model.named_buffers())
        state = self.accelerator.get_state_dict(self.deepspeed) or {}
        for name, tensor in state.items():
            if name not in names or "lora_" in name:
                continue
            # peft moves the weight of an adapted layer into `base_layer`.
            hub_name = name.replace(".base_layer.", ".")
            if hub_name in adapted_layers:
                tensor = lora.merged_weight(tensor, adapted_layers[hub_name])
            yield hub_name, tensor

    def close(self) -> None:
        """Makes the memory of the trainer collectable. It cannot be used afterwards."""
        if self.deepspeed is not None:
            free_deepspeed_engine(self.deepspeed)

    def save_adapter(self, directory: Path) -> None:
        """Writes the model's LoRA adapter."""
        lora.save_adapter(self.model, directory)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Returns a scheduler with the rates of `learning_rate`, in place of transformers' own."""
        settings = self._config.learner

        def relative_rate(update: int) -> float:
            return learning_rate(settings, update, self._config.sft.updates) / settings.lr

        if optimizer is None:
            optimizer = self.optimizer
        self.lr_scheduler = LambdaLR(optimizer, relative_rate)
        return self.lr_scheduler

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Runs TRL's training step on a micro-batch and returns its loss."""
        if self._norm_limit is None:
            # DeepSpeed creates its optimizer after the constructor has returned.
            deepspeed_engine: Any = self.deepspeed
            self._norm_limit = NormLimit(
                deepspeed_engine.optimizer, self._config.learner.skip_grad_norm
            )
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[no-untyped-call]
        return loss

    def get_train_dataloader(self) -> Any:
        """Returns the rank's micro-batches, in place of transformers' batches of a fixed size."""
        loader: Any = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=self.micro_batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Reports an update's metrics, and saves a checkpoint if one is due.

        The Trainer calls it after each update.
        """
        if "loss" not in logs:
            return  # the Trainer's summary at the end
        update = self.state.global_step
        self._average_over_tokens(update)
        super().log(logs, start_time)
        self._heap.after_update()
        self._callbacks.on_update(self._metrics_row(update, logs))
        if self._callbacks.should_stop() or self._is_checkpoint_due(update):
            self._callbacks.save(update, self._write_checkpoint)
            # A signal may have arrived since the first check.
            if self._callbacks.should_stop():
                self.control.should_training_stop = True
        self._update_started_at = time.monotonic()

    def _average_over_tokens(self, update: int) -> None:
        """Replaces TRL's metrics of an update's micro-batches by one mean over all trained tokens.

        TRL itself would average over the micro-batches, which differ in their number of tokens.
        """
        num_tokens = []  # of the micro-batches that all ranks computed at the same time
        for micro_batches in self.micro_batches.rounds(update - 1):
            rows = itertools.chain.from_iterable(micro_batches)
            num_tokens.append(sum(self._row_tokens[row] for row in rows))
        for name in MEANS_OVER_TOKENS:
            means = self._metrics["train"][name]
            total = sum(mean * n for mean, n in zip(means, num_tokens, strict=True))
            self._metrics["train"][name] = [total / sum(num_tokens)]

    def _metrics_row(self, update: int, logs: dict[str, float]) -> dict[str, Any]:
        """Returns the metrics of an update.

        Raises:
            RunError: Too many consecutive updates were skipped.
        """
        row: dict[str, Any] = {"step": update, "update": update}
        for trl_name, name in METRICS.items():
            if trl_name in logs:
                row[name] = float(logs[trl_name])
        assert self._norm_limit is not None
        grad_norm = self._norm_limit.norm
        deepspeed_engine: Any = self.deepspeed
        is_applied = bool(deepspeed_engine.was_step_applied()) and math.isfinite(row["loss"])
        self._stop_after_skipped_updates(update, row["loss"], grad_norm, is_applied=is_applied)
        row["update/not_finite"] = float(not is_applied)
        if not is_applied:
            row["policy/grad_norm"] = grad_norm
        # TRL's own count of tokens starts at 0 again after a resume.
        batch_size = self._config.sft.batch_size
        first_row = (update - 1) * batch_size
        row["update/tokens"] = sum(self._row_tokens[first_row : first_row + batch_size])
        row["update/micro_batches"] = self.micro_batches.num_per_update
        row["policy/lr"] = learning_rate(self._config.learner, update - 1, self._config.sft.updates)
        row["time/total_s"] = time.monotonic() - self._update_started_at
        return row

    def _stop_after_skipped_updates(
        self, update: int, loss: float, grad_norm: float, *, is_applied: bool
    ) -> None:
        """Raises RunError after too many consecutive updates that were skipped."""
        if is_applied:
            self._num_consecutive_skips = 0
            return
        self._num_consecutive_skips += 1
        # Without ZeRO, DeepSpeed applies an update that is not finite, and the weights are lost.
        max_skips = MAX_SKIPPED_UPDATES if self._config.learner.zero_stage else 1
        if self._num_consecutive_skips == max_skips:
            raise skipped_updates_error(update, loss, grad_norm, self._config.learner, max_skips)

    def _is_checkpoint_due(self, update: int) -> bool:
        if update == self._config.sft.updates:
            return True
        every = self._config.checkpoint.every
        return every > 0 and update % every == 0

    def _write_checkpoint(self, directory: Path) -> None:
        self.args.output_dir = str(directory)
        # SFTTrainer's own method also writes a model card.
        Trainer._save_checkpoint(self, self.model, trial=None)  # type: ignore[arg-type]


def _num_trained_tokens(row: dict[str, list[int]]) -> int:
    return sum(label != IGNORED_LABEL for label in row["labels"])


def _training_arguments(config: SftConfig, num_micro_batches: int, output_dir: Path) -> SFTConfig:
    # Only reports and checks of consistency read the number of rows per micro-batch, which differs.
    rows_per_rank = config.sft.batch_size // ranks.world_size()
    mean_rows = math.ceil(rows_per_rank / num_micro_batches)
    settings = config.learner
    has_gpu = torch.cuda.is_available()
    return SFTConfig(
        output_dir=str(output_dir),
        use_cpu=not has_gpu,
        bf16=config.model.dtype == "bfloat16",
        seed=config.seed,
        max_steps=config.sft.updates,
        per_device_train_batch_size=mean_rows,
        gradient_accumulation_steps=num_micro_batches,
        optim="adamw_torch_fused",
        learning_rate=settings.lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_epsilon=settings.eps,
        max_grad_norm=settings.max_grad_norm,
        max_length=None,
        gradient_checkpointing=config.model.gradient_checkpointing,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=has_gpu,
        average_tokens_across_devices=True,
        padding_free=config.model.is_packed,
        deepspeed=_trainer_deepspeed_config(config, mean_rows, num_micro_batches),
    )


def _trainer_deepspeed_config(
    config: SftConfig, mean_rows: int, num_micro_batches: int
) -> dict[str, Any]:
    """Returns DeepSpeed's config for transformers' Trainer.

    The Trainer creates the optimizer and counts micro-batches itself.
    """
    settings = deepspeed_config(config.learner, config.model.dtype)
    del settings["optimizer"]
    del settings["managed_gradient_accumulation"]
    # With offloaded states, too, the optimizer is torch's and not DeepSpeed's own.
    settings["zero_force_ds_cpu_optimizer"] = False
    settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    settings["train_micro_batch_size_per_gpu"] = mean_rows
    settings["gradient_accumulation_steps"] = num_micro_batches
    return settings
