"""The learner: a policy under DeepSpeed. It knows batches, a per-token loss and weights; nothing of problems, rewards or engines."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grpo import config as configs
from grpo.batch import to_device
from grpo.logprobs import Policy
from grpo.types import Batch, RunError, UserError

Loss = Callable[[Tensor, Batch, configs.Algorithm], tuple[Tensor, dict[str, Tensor]]]


class Learner:
    """Scores and updates a policy. State: weights, optimizer, and `updates`, the number of optimizer updates made."""

    def __init__(self, model: nn.Module, config: configs.Config, loss: Loss, reference: nn.Module | None = None) -> None:
        """`model` has float32 weights. `reference`, for KL, is kept frozen in the forward pass's dtype."""
        deepspeed = init_process_group()
        settings = config.learner
        if settings.threads:
            torch.set_num_threads(settings.threads)
        if config.model.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        model.train()
        self._settings, self._algorithm, self._loss = settings, config.algorithm, loss
        self._total_updates = config.train.total_updates
        self._dtype = getattr(torch, config.model.dtype)
        policy = Policy(model, temperature=config.sampling.temperature, chunk=settings.logits_chunk_tokens)
        ds_config = deepspeed_config(settings, config.model.dtype, torch.cuda.is_available())
        self._engine, *_ = deepspeed.initialize(
            model=policy,
            model_parameters=_parameter_groups(model, settings),
            config=ds_config,
        )
        self._policy: Policy = self._engine.module
        self.device = self._engine.device
        self._reference: Policy | None = None
        if reference is not None:
            reference = reference.to(device=self.device, dtype=self._dtype).eval().requires_grad_(False)
            self._reference = Policy(reference, temperature=config.sampling.temperature, chunk=settings.logits_chunk_tokens)
        self.updates = 0
        self._memory = FreedMemory()

    @torch.no_grad()
    def score(self, batches: Sequence[Batch], *, reference: bool = False) -> list[Tensor]:
        """Returns the logprobs [B, T] (float32, on the CPU) of each batch's completion tokens under the policy or the reference."""
        scorer = self._reference if reference else self._engine
        assert scorer is not None, "no reference model was loaded"
        return [scorer(to_device(batch, self.device))[0].cpu() for batch in batches]

    def update(self, batches: Sequence[Batch], on_batch: Callable[[int, int], None] | None = None) -> dict[str, float]:
        """Makes one optimizer update with the gradient summed over micro-batches; returns its metrics.

        The token weights already hold the reduction, so DeepSpeed divides by nothing. `on_batch(done, total)` is called after each
        micro-batch and may raise: nothing of the update has been applied then.
        """
        start = time.monotonic()
        lr = learning_rate(self._settings, self.updates, self._total_updates)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        tokens = sum(int(batch.token_mask.sum()) for batch in batches)
        sums: dict[str, float] = {}
        highest = 0.0
        for done, batch in enumerate(batches, start=1):
            batch = to_device(batch, self.device)
            logprobs, entropies = self._engine(batch)
            per_token, report = self._loss(logprobs, batch, self._algorithm)
            loss = (batch.token_weights * per_token).sum()
            self._engine.backward(loss, scale_wrt_gas=False)
            mask = batch.token_mask
            gap = (logprobs.detach() - batch.sampler_logprobs)[mask]
            report |= {"policy/entropy": entropies, "mismatch/k3": torch.exp(gap) - 1 - gap, "mismatch/abs": gap.abs()}
            for name, value in report.items():
                sums[name] = sums.get(name, 0.0) + float((value.detach()[mask] if value.shape == mask.shape else value).sum())
            sums["loss"] = sums.get("loss", 0.0) + float(loss.detach())
            highest = max(highest, float(torch.exp(gap).max()))
            if on_batch is not None:
                on_batch(done, len(batches))
        norm = self._gradient_norm() if self._settings.zero_stage == 0 else None  # DeepSpeed keeps none without ZeRO
        self._engine.step()
        self.updates += 1
        norm = float(self._engine.get_global_grad_norm()) if norm is None else norm
        if not math.isfinite(norm) or not math.isfinite(sums["loss"]):
            raise RunError(f"update {self.updates}: loss {sums['loss']}, gradient norm {norm}: not finite; lower learner.lr")
        self._memory.after_update()
        loss_value = sums.pop("loss")
        return {name: value / tokens for name, value in sums.items()} | {
            "loss": loss_value, "policy/grad_norm": norm, "policy/lr": lr, "mismatch/max_weight": highest,
            "update/tokens": tokens, "update/micro_batches": len(batches), "update/seconds": time.monotonic() - start,
        }  # fmt: skip

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every weight whole, under its Hugging Face name, in the forward pass's dtype; tied weights once. Copy before going on."""
        for name, parameter in self._policy.model.named_parameters():
            with self._whole(parameter):
                yield name, parameter.data

    @contextlib.contextmanager
    def perturbed(self, seed: int) -> Iterator[None]:
        """Within it every weight is visibly different (scaled by about 20 % and noisy by 10 %), seeded; after it, bit for bit as before."""
        kept: dict[str, Tensor] = {}
        try:
            with torch.no_grad():
                for i, (name, parameter) in enumerate(self._policy.model.named_parameters()):
                    with self._whole(parameter, write=True):
                        kept[name] = parameter.data.clone()
                        parameter.data.copy_(_perturb(parameter.data, seed + i))
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._policy.model.named_parameters():
                    if name in kept:
                        with self._whole(parameter, write=True):
                            parameter.data.copy_(kept[name])

    def _gradient_norm(self) -> float:
        return float(torch.nn.utils.get_total_norm([p.grad for p in self._policy.parameters() if p.grad is not None]))

    def _whole(self, parameter: nn.Parameter, write: bool = False) -> Any:
        """ZeRO-3 keeps parts of a parameter on each rank; within this context it is whole."""
        if self._settings.zero_stage < 3:
            return contextlib.nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if write else None)

    def save(self, directory: Path) -> None:
        """Writes weights, optimizer state and the update counter."""
        self._engine.save_checkpoint(str(directory), tag="learner", client_state={"updates": self.updates}, save_latest=False)

    def load(self, directory: Path) -> None:
        path, state = self._engine.load_checkpoint(str(directory), tag="learner")
        if path is None:
            raise RunError(f"{directory}: DeepSpeed found no checkpoint to load")
        self.updates = state["updates"]


def _perturb(weight: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(weight.shape, generator=generator).to(weight.device)
    factor = 1.2 if torch.rand((), generator=generator) < 0.5 else 0.8
    constant = bool((weight == weight.flatten()[0]).all())  # norms and fresh biases have no spread of their own
    spread = weight.float().abs().mean().clamp(min=1.0) if constant else weight.float().std()
    return weight * factor + 0.1 * spread * noise


def learning_rate(settings: configs.Learner, update: int, total_updates: int) -> float:
    """Returns the learning rate of update 0, 1, ...: linear warm-up, then constant, linear or cosine down to `min_lr_ratio`. No state."""
    if update < settings.warmup_updates:
        return settings.lr * (update + 1) / settings.warmup_updates
    progress = (update - settings.warmup_updates) / max(1, total_updates - settings.warmup_updates)
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[settings.schedule]
    floor = 1.0 if settings.schedule == "constant" else settings.min_lr_ratio
    return settings.lr * (floor + (1 - floor) * decay)


def deepspeed_config(settings: configs.Learner, dtype: str, cuda: bool) -> dict[str, Any]:
    """Returns DeepSpeed's own config, built from ours."""
    zero: dict[str, Any] = {"stage": settings.zero_stage, "overlap_comm": False}
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    optimizer = {"lr": settings.lr, "betas": list(settings.betas), "eps": settings.eps, "weight_decay": settings.weight_decay}
    if not cuda:
        optimizer |= {"torch_adam": True, "fused": True}  # no compiler run, as DeepSpeed's own would need; one pass over the states
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # the number of micro-batches varies: step() ends an update
        "optimizer": {"type": "AdamW", "params": optimizer},
        "bf16": {"enabled": dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "gradient_clipping": settings.max_grad_norm,
        "steps_per_print": None,
    }


def _parameter_groups(model: nn.Module, settings: configs.Learner) -> list[dict[str, Any]]:
    """Weight decay is for matrices; norms and biases have none."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class FreedMemory:
    """On a CPU, what an update has freed is kept for the next: else glibc maps each large tensor anew, a third of an SFT update's time.

    Sequences of unequal lengths leave holes that do not fit the next ones: when the process has grown by half since its first update,
    they are given back.
    """

    def __init__(self) -> None:
        self._libc = None if torch.cuda.is_available() or not hasattr(libc := ctypes.CDLL(None), "mallopt") else libc
        self._most = 0.0
        if self._libc:
            for option, value in {-4: 0, -1: -1, -2: 1 << 28}.items():  # no mappings of their own; no trimming; grow by 256 MiB
                self._libc.mallopt(option, value)

    def after_update(self) -> None:
        if self._libc:
            resident = int(Path("/proc/self/statm").read_text().split()[1])
            self._most = self._most or 1.5 * resident
            if resident > self._most:
                self._libc.malloc_trim(0)


def init_process_group() -> Any:
    """Joins the process group, a group of one without a launcher; returns DeepSpeed, with its chatter off."""
    deepspeed = _quiet_deepspeed()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}: the learner runs on one rank only so far")
    if torch.distributed.is_initialized():
        return deepspeed
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        os.environ.setdefault(name, value)
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False, verbose=False)
    return deepspeed


def _quiet_deepspeed() -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    return deepspeed
