"""Quantisation.

The scales, what is refused, and a model in each scheme as the real vLLM serves it.
"""

from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from real_engines import PROMPTS, start_engine
from tiny_models import tiny_config
from training_samples import batches, samples
from transformers import AutoModelForCausalLM

from grpo import config as configs
from grpo.config import DistillConfig, QuantizeConfig
from grpo.engines import Request, SamplingOptions
from grpo.learning import models
from grpo.learning.learner import Learner
from grpo.learning.quantization import (
    arguments,
    best_scale,
    learn_rounded,
    linear_layers,
    rounded_weight,
)
from grpo.losses import cross_entropy
from grpo.stages.quantize import check_quantizable, write_quantized
from grpo.types import UserError


def rounded(weight, scale, low, high):
    return (weight / scale).round().clamp(low, high) * scale


@pytest.mark.parametrize(
    ("strategy", "shape"), [("tensor", (1,)), ("channel", (24, 1)), ("group", (24, 4))]
)
def test_scales_are_those_of_the_largest_weight_and_no_clip_does_better(strategy, shape):
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    weight[3, 5] = 9.0  # one large weight: worth clipping at 4 bits
    sized = {"group_size": 16} if strategy == "group" else {}
    found = best_scale(
        weight, QuantizationArgs(num_bits=8, strategy=strategy, symmetric=True, **sized)
    )
    parts = {
        "tensor": weight.reshape(1, -1),
        "channel": weight.reshape(24, 1, 64),
        "group": weight.reshape(24, 4, 16),
    }[strategy]
    assert found.shape == shape and torch.allclose(found, parts.abs().amax(-1) / 127.5)
    four = best_scale(
        weight, QuantizationArgs(num_bits=4, strategy=strategy, symmetric=True, **sized)
    )

    def error(scale):
        return (rounded(parts, scale[..., None], -8, 7) - parts).square().sum(-1)

    widest = parts.abs().amax(-1) / 7.5
    assert bool((error(four) <= error(widest) + 1e-6).all()) and float(error(four).sum()) < float(
        error(widest).sum()
    )


def test_what_cannot_be_quantised_is_told_before_a_weight_is_loaded(tiny, tmp_path):
    with pytest.raises(
        UserError, match=r"quantize.group_size=24 does not divide the 64 inputs of model.layers.0"
    ):
        check_quantizable(tiny(), 24)
    write_quantized(tiny(), tmp_path / "int8", "int8", 32, models.load_tokenizer(tiny()))
    with pytest.raises(UserError, match="already quantised"):
        check_quantizable(tmp_path / "int8", 1)
    tree = {
        "run_dir": "x",
        "data": {"name": "arithmetic"},
        "model": {"path": "tiny-qwen2", "lora": {}},
    }
    with pytest.raises(UserError, match="needs a finished model"):
        configs.parse(tree, kind=QuantizeConfig)


@pytest.mark.parametrize("scheme", ["int8", "int8_tensor", "int4"])
def test_the_rounded_weights_are_those_written_in_bfloat16_too(tiny, tmp_path, scheme):
    models.load_model(tiny(), "eager").to(torch.bfloat16).save_pretrained(tmp_path / "own")
    write_quantized(tmp_path / "own", tmp_path / scheme, scheme, 32, models.load_tokenizer(tiny()))
    written = AutoModelForCausalLM.from_pretrained(tmp_path / scheme, dtype="auto")
    written(torch.tensor([[40, 41]]))  # unpacks its weights
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "own", dtype="auto")
    for (name, layer), (_, theirs) in zip(linear_layers(own), linear_layers(written), strict=True):
        assert torch.equal(
            rounded_weight(layer.weight.data, arguments(scheme, 32)[0]), theirs.weight
        ), name


@pytest.mark.parametrize("scheme", ["int8", "int8_tensor", "int4"])
def test_learning_with_rounding_computes_what_is_written(tiny, tmp_path, scheme):
    write_quantized(tiny(), tmp_path / scheme, scheme, 32, models.load_tokenizer(tiny()))
    written = AutoModelForCausalLM.from_pretrained(
        tmp_path / scheme, dtype=torch.float32, attn_implementation="eager"
    )
    plain, aware = models.load_model(tiny(), "eager"), models.load_model(tiny(), "eager")
    learn_rounded(aware, scheme, 32)
    ids = torch.tensor([list(range(40, 80))])
    found, expected = aware(ids).logits, written(ids).logits
    assert torch.allclose(found, expected, atol=1e-4) and not torch.allclose(
        plain(ids).logits, expected, atol=1e-2
    )
    assert aware.state_dict().keys() == plain.state_dict().keys()
    found.logsumexp(-1).sum().backward()
    assert all(layer.weight.grad.abs().sum() > 0 for _, layer in linear_layers(aware))


def test_a_model_that_learned_with_rounding_at_last_is_better_rounded(tiny, tmp_path):
    taught = [
        replace(sample, advantages=(1.0,) * len(sample.advantages)) for sample in samples(count=30)
    ]
    batch = batches(taught, 100_000)

    def learned(model, lr):
        settings = {"lr": lr, "zero_stage": 0, "schedule": "linear"}
        config = tiny_config(
            tmp_path,
            tiny(),
            learner=settings,
            algorithm={"loss": "cross_entropy"},
            train={"rollouts": 60},
        )
        learner = Learner(model, config, cross_entropy.loss)
        for _ in range(60):
            learner.update(batch)
        return learner

    start_of_both, ends = models.load_model(tiny(), "eager"), {}
    learned(start_of_both, 3e-3)
    for scheme in (None, "int4"):
        model = models.load_model(tiny(), "eager")
        model.load_state_dict(start_of_both.state_dict())
        if scheme:
            learn_rounded(model, scheme, 32)
        learner = learned(model, 1e-4)
        if not scheme:
            learn_rounded(model, "int4", 32)
        (logprobs, _), mask = learner.score(batch)[0], batch[0].token_mask
        ends[scheme] = -float(logprobs[mask].mean())
    assert ends["int4"] < 0.8 * ends[None], ends  # 0.17 and 0.24


def test_rounding_while_learning_is_for_what_nothing_samples_from(tiny, tmp_path):
    qat = {"path": str(tiny()), "dtype": "float32", "qat": {"scheme": "int4"}}
    with pytest.raises(UserError, match=r"model\.qat is for `grpo sft`, and for `grpo distill`"):
        tiny_config(tmp_path, tiny(), model=qat)
    with pytest.raises(UserError, match=r"model\.qat\.group_size=24 does not divide the 64 inputs"):
        learn_rounded(models.load_model(tiny(), "eager"), "int4", 24)
    tree = {
        "run_dir": str(tmp_path),
        "model": qat | {"teacher": str(tiny())},
        "data": {"name": "arithmetic"},
        "way": "sequence",
    }
    config = configs.parse(
        tree | {"collect": {"problems": 4}, "sft": {"updates": 1}}, kind=DistillConfig
    )
    collect, sft = config.parts().values()
    assert collect.model.qat is None and sft.model.qat.scheme == "int4"
    with pytest.raises(UserError, match=r"model\.qat is for"):
        configs.parse(tree | {"way": "on_policy", "train": {"rollouts": 1}}, kind=DistillConfig)


@pytest.mark.engine
@pytest.mark.parametrize("scheme", ["int8", "int8_tensor", "int4"])
def test_vllm_serves_it_and_its_logprobs_are_near_the_parents(tiny, tmp_path, scheme):
    write_quantized(tiny(), tmp_path / scheme, scheme, 32, models.load_tokenizer(tiny()))
    engine = start_engine(tmp_path / scheme, tmp_path, dtype="bfloat16", load_weights=True)
    try:
        options = SamplingOptions(max_tokens=12, ignore_eos=True)
        completions = [
            c
            for (c,) in engine.generate(
                [Request(prompt_ids=p, seed=i) for i, p in enumerate(PROMPTS)], options
            )
        ]
    finally:
        engine.close()
    parent = models.load_model(tiny(), "eager")
    gaps = []
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        logits = parent(input_ids=torch.tensor([prompt + completion.token_ids])).logits[
            0, len(prompt) - 1 : -1
        ]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[
            :, 0
        ]
        gaps.append((expected - torch.tensor(completion.logprobs)).abs().mean())
    gap = float(torch.stack(gaps).mean())
    assert gap < {"int8": 0.1, "int8_tensor": 0.15, "int4": 0.6}[scheme], gap
