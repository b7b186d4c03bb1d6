"""TRL's SFTTrainer as a learner of ours.

The loss and the loop are TRL's. The schedule, order, checkpoints, metrics and way to stop are ours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer
from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

from grpo.config import SftConfig
from grpo.learning import lora, packing
from grpo.learning.deepspeed_setup import (
    MAX_LOST,
    FreedMemory,
    NormLimit,
    deepspeed_config,
    join,
    learning_rate,
    not_finite,
)
from grpo.run import ranks

METRICS = {
    "loss": "loss",
    "grad_norm": "policy/grad_norm",
    "entropy": "policy/entropy",
    "mean_token_accuracy": "policy/token_accuracy",
}


class SupervisedTrainer(SFTTrainer):
    """Trains on rows in their order, `sft.batch_size` an update.

    The caller's functions see each update and write each checkpoint.
    """

    def __init__(
        self,
        config: SftConfig,
        model_dir: Path,
        tokenizer: Any,
        rows: Iterable[dict[str, list[int]]],
        *,
        on_update: Callable[[dict[str, Any]], None],
        save: Callable[[int, Callable[[Path], None]], None],
        stop: Callable[[], bool],
        scratch: Path,
    ) -> None:
        """Sets up TRL's trainer, which calls `on_update(metrics)` after each update.

        `save(update, write)` saves a checkpoint, of which `write(directory)` writes the files.
        `stop()` returns whether to save after this update and end.
        """
        join()
        self._memory = FreedMemory()
        self._config, self._on_update, self._keep, self._ended = config, on_update, save, stop
        self._clock = time.monotonic()
        self._limit: NormLimit | None = None
        self._lost = 0  # updates in a row that were skipped
        cuda = torch.cuda.is_available()
        settings, micro = config.learner, config.micro_batch
        arguments = SFTConfig(
            output_dir=str(scratch),
            use_cpu=not cuda,
            bf16=config.model.dtype == "bfloat16",
            seed=config.seed,
            max_steps=config.sft.updates,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=config.sft.batch_size // micro // ranks.world_size(),
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
            dataloader_pin_memory=cuda,
            average_tokens_across_devices=True,
            padding_free=config.model.packed,
            deepspeed=_trainer_config(config),
        )
        model = lora.load_policy(
            config, model_dir, packing.ROWS if config.model.packed else config.model.attention
        )
        taken = list(rows)
        self._lengths = [sum(label != -100 for label in row["labels"]) for row in taken]
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(taken),
            processing_class=tokenizer,
        )
        self.remove_callback(PrinterCallback)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every weight whole, tied ones once, adapters merged."""
        adapted = lora.of(self.model)  # type: ignore[arg-type]
        own = {name for name, _ in (*self.model.named_parameters(), *self.model.named_buffers())}  # type: ignore[union-attr] # tied: once
        # ZeRO-3 gives it to rank 0 alone
        whole = self.accelerator.get_state_dict(self.deepspeed) or {}
        for name, tensor in whole.items():
            if name in own and "lora_" not in name:
                name = name.replace(".base_layer.", ".")
                yield name, lora.merged(tensor, adapted[name]) if name in adapted else tensor

    def save_adapter(self, directory: Path) -> None:
        """Writes the model's LoRA adapter to `directory`."""
        lora.save(self.model, directory)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Returns a scheduler that follows our `learning_rate` in place of transformers' own."""
        settings = self._config.learner
        self.lr_scheduler = LambdaLR(
            optimizer or self.optimizer,  # type: ignore[arg-type]
            lambda update: learning_rate(settings, update, self._config.sft.updates) / settings.lr,
        )
        return self.lr_scheduler

    def training_step(self, *arguments: Any, **named: Any) -> Tensor:
        """Returns the loss of TRL's training step; the first sets the gradient norm's limit."""
        if self._limit is None:  # DeepSpeed's optimizer is there now
            engine: Any = self.deepspeed
            self._limit = NormLimit(engine.optimizer, self._config.learner.skip_grad_norm)
        loss: Tensor = super().training_step(*arguments, **named)  # type: ignore[no-untyped-call]
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(train_dataset or self.train_dataset)  # type: ignore[arg-type]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hands an update's metrics to `on_update`, and saves a checkpoint when one is due."""
        if "loss" not in logs:  # the trainer's closing summary
            return
        super().log(logs, start_time)
        self._memory.after_update()
        update = self.state.global_step
        settings = self._config.learner
        row: dict[str, Any] = {"step": update, "update": update}
        row |= {ours: float(logs[theirs]) for theirs, ours in METRICS.items() if theirs in logs}
        row |= self._skipped(row)
        size = self._config.sft.batch_size
        # TRL's own count starts anew at a resume
        row["update/tokens"] = sum(self._lengths[(update - 1) * size : update * size])
        row |= {
            "policy/lr": learning_rate(settings, update - 1, self._config.sft.updates),
            "time/total_s": time.monotonic() - self._clock,
        }
        self._on_update(row)
        every = self._config.checkpoint.every
        last = update == self._config.sft.updates
        if self._ended() or last or (every and update % every == 0):
            self._keep(update, self._write)
            if self._ended():
                self.control.should_training_stop = True
        self._clock = time.monotonic()

    def _skipped(self, row: dict[str, Any]) -> dict[str, float]:
        """Returns whether the update was skipped, and its norm.

        Without ZeRO an update that is not finite is not skipped, and the weights are lost. Raises
        RunError.
        """
        assert self._limit is not None
        engine: Any = self.deepspeed
        applied = bool(engine.was_step_applied()) and math.isfinite(row["loss"])
        self._lost = 0 if applied else self._lost + 1
        most = MAX_LOST if self._config.learner.zero_stage else 1
        if self._lost == most:
            raise not_finite(
                row["update"], row["loss"], self._limit.norm, self._config.learner, most
            )
        return {"update/not_finite": float(not applied)} | (
            {} if applied else {"policy/grad_norm": self._limit.norm}
        )

    def _write(self, directory: Path) -> None:
        self.args.output_dir = str(directory)
        Trainer._save_checkpoint(self, self.model, trial=None)  # type: ignore[arg-type] # SFTTrainer's own adds a model card


def _trainer_config(config: SftConfig) -> dict[str, Any]:
    """Returns DeepSpeed's config for transformers' Trainer.

    The Trainer makes the optimizer and counts micro-batches itself.
    """
    made = deepspeed_config(config.learner, config.model.dtype)
    del made["optimizer"], made["managed_gradient_accumulation"]
    made["zero_force_ds_cpu_optimizer"] = False  # offloaded, the states are torch's too
    made["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    return made | {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": config.sft.batch_size
        // config.micro_batch
        // ranks.world_size(),
    }
