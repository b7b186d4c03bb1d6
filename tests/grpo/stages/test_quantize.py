"""Quantization: scales, written weights, quantization-aware training, and serving with vLLM."""

from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from real_engines import PROMPTS, start_engine
from tiny_models import tiny_config
from training_samples import padded_batches, random_samples
from transformers import AutoModelForCausalLM
from vllm import _custom_ops as vllm_ops

from grpo import config as configs
from grpo.config import DistillConfig, QuantizeConfig
from grpo.engines import Request, SamplingOptions
from grpo.learning import models
from grpo.learning.learner import Learner
from grpo.learning.quantization import (
    best_scales,
    enable_qat,
    linear_layers,
    quantization_args,
    rounded_activations,
    rounded_weight,
)
from grpo.losses import cross_entropy
from grpo.metrics.cpu import int4_obstacle, int8_warning
from grpo.stages.quantize import check_quantizable, write_quantized
from grpo.types import UserError

SCHEMES = ("int8", "int8_tensor", "int4")
GROUP_SIZE = 32


def expected_quantization_args(strategy, num_bits):
    group_size = 16 if strategy == "group" else None
    return QuantizationArgs(
        num_bits=num_bits, strategy=strategy, symmetric=True, group_size=group_size
    )


def split_by_scale(weight, strategy):
    """Returns a weight [24, 64] reshaped such that the last axis has the values of one scale."""
    if strategy == "tensor":
        return weight.reshape(1, 24 * 64)
    if strategy == "channel":
        return weight.reshape(24, 1, 64)
    return weight.reshape(24, 4, 16)


def rounding_error(parts, scale):
    """Returns the squared error of rounding to 4 bits, per scale."""
    scale = scale[..., None]
    rounded = (parts / scale).round().clamp(-8, 7) * scale
    return (rounded - parts).square().sum(-1)


@pytest.mark.parametrize(
    ("strategy", "shape"), [("tensor", (1,)), ("channel", (24, 1)), ("group", (24, 4))]
)
def test_int8_scales_cover_the_largest_weight_and_int4_scales_reduce_the_error(strategy, shape):
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    weight[3, 5] = 9.0  # an outlier: clipping it reduces the error in 4 bits
    parts = split_by_scale(weight, strategy)
    largest = parts.abs().amax(-1)

    # 8 bits: the range is [-128, 127], and a scale is the largest absolute weight / 127.5.
    int8_scale = best_scales(weight, expected_quantization_args(strategy, 8))
    assert int8_scale.shape == shape
    assert torch.allclose(int8_scale, largest / 127.5)

    # 4 bits: the range is [-8, 7]. Without clipping, a scale is the largest absolute weight / 7.5.
    int4_scale = best_scales(weight, expected_quantization_args(strategy, 4))
    error = rounding_error(parts, int4_scale)
    unclipped_error = rounding_error(parts, largest / 7.5)
    assert bool((error <= unclipped_error + 1e-6).all())
    assert float(error.sum()) < float(unclipped_error.sum())


def write_scheme(model_dir, target, scheme):
    """Writes the model in a scheme to the directory `target`."""
    write_quantized(model_dir, target, scheme, GROUP_SIZE, models.load_tokenizer(model_dir))


def test_model_that_cannot_be_quantized_raises(tiny, tmp_path):
    with pytest.raises(
        UserError, match=r"quantize.group_size=24 does not divide the 64 inputs of model.layers.0"
    ):
        check_quantizable(tiny(), 24)
    write_scheme(tiny(), tmp_path / "int8", "int8")
    with pytest.raises(UserError, match="already quantized"):
        check_quantizable(tmp_path / "int8", 1)
    tree = {
        "run_dir": "x",
        "data": {"name": "arithmetic"},
        "model": {"path": "tiny-qwen2", "lora": {}},
    }
    with pytest.raises(UserError, match="needs a finished model"):
        configs.parse(tree, kind=QuantizeConfig)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_written_weights_equal_rounded_weights_in_bfloat16(tiny, tmp_path, scheme):
    original_dir = tmp_path / "original"
    models.load_model(tiny(), "eager").to(torch.bfloat16).save_pretrained(original_dir)
    original = AutoModelForCausalLM.from_pretrained(original_dir, dtype="auto")

    write_quantized(
        original_dir, tmp_path / scheme, scheme, GROUP_SIZE, models.load_tokenizer(tiny())
    )
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / scheme, dtype="auto")
    quantized(torch.tensor([[40, 41]]))  # the first forward pass unpacks the weights

    weight_args, _ = quantization_args(scheme, GROUP_SIZE)
    original_layers = linear_layers(original)
    quantized_layers = linear_layers(quantized)
    for (name, original_layer), (_, quantized_layer) in zip(
        original_layers, quantized_layers, strict=True
    ):
        expected = rounded_weight(original_layer.weight.data, weight_args)
        assert torch.equal(expected, quantized_layer.weight), name


def int8_activations_of_vllm(x):
    """Returns activations [..., in] with the values that vLLM's kernel rounds them to."""
    levels, scales, _ = vllm_ops.onednn_scaled_int8_quant(x.flatten(0, -2))
    return (levels * scales).reshape(x.shape).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_rounded_as_vllms_kernel_rounds_them(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 50, 128, generator=generator) * torch.logspace(-3, 2, 50)[:, None]
    x[1, 2] = 0
    x = x.to(dtype)
    assert torch.equal(rounded_activations(x), int8_activations_of_vllm(x))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantisation_aware_model_computes_the_logits_of_the_written_model(tiny, tmp_path, scheme):
    write_scheme(tiny(), tmp_path / scheme, scheme)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / scheme, dtype=torch.float32)
    ids = torch.tensor([list(range(40, 80))])
    written(ids)  # the first forward pass unpacks the weights
    # A model with the written weights, and with vLLM's rounding of the activations.
    quantized = models.load_model(tiny(), "eager")
    for (_, layer), (_, written_layer) in zip(
        linear_layers(quantized), linear_layers(written), strict=True
    ):
        layer.weight.data = written_layer.weight.data
        if scheme != "int4":
            layer.register_forward_pre_hook(
                lambda layer, inputs: (int8_activations_of_vllm(inputs[0]),)
            )
    plain = models.load_model(tiny(), "eager")
    aware = models.load_model(tiny(), "eager")
    enable_qat(aware, scheme, GROUP_SIZE)
    assert aware.state_dict().keys() == plain.state_dict().keys()

    logits = aware(ids).logits
    with torch.no_grad():
        expected = quantized(ids).logits
    assert torch.allclose(logits, expected, atol=1e-4)
    assert not torch.allclose(plain(ids).logits, expected, atol=1e-2)

    logits.logsumexp(-1).sum().backward()
    for name, layer in linear_layers(aware):
        assert layer.weight.grad.abs().sum() > 0, name


def train_on_batch(model, config, batch):
    """Trains a model for 60 updates on the same batch and returns the learner."""
    learner = Learner(model, config, cross_entropy.loss)
    for _ in range(60):
        learner.update([batch])
    return learner


def mean_loss(learner, batch):
    """Returns the mean negative logprob of the completion tokens of a batch."""
    (scores,) = learner.score([batch])
    return -float(scores.logprobs[batch.token_mask].mean())


def test_final_training_with_rounding_reduces_the_loss_of_the_quantized_model(tiny, tmp_path):
    samples = []
    for sample in random_samples(count=30):
        # The advantage of a token is the weight of its cross-entropy.
        samples.append(replace(sample, advantages=(1.0,) * len(sample.advantages)))
    (batch,) = padded_batches(samples, 100_000)

    def config_with(lr):
        return tiny_config(
            tmp_path,
            tiny(),
            learner={"lr": lr, "zero_stage": 0, "schedule": "linear"},
            algorithm={"loss": "cross_entropy"},
            train={"rollouts": 60},
        )

    common_start = models.load_model(tiny(), "eager")
    train_on_batch(common_start, config_with(lr=3e-3), batch)

    def start_again():
        model = models.load_model(tiny(), "eager")
        model.load_state_dict(common_start.state_dict())
        return model

    plain = start_again()
    learner = train_on_batch(plain, config_with(lr=1e-4), batch)
    enable_qat(plain, "int4", GROUP_SIZE)
    loss_without_qat = mean_loss(learner, batch)

    aware = start_again()
    enable_qat(aware, "int4", GROUP_SIZE)
    learner = train_on_batch(aware, config_with(lr=1e-4), batch)
    loss_with_qat = mean_loss(learner, batch)

    assert loss_with_qat < 0.8 * loss_without_qat  # measured: 0.17 and 0.24


@pytest.mark.parametrize(("scheme", "num_bits"), [("int8", 8), ("int8_tensor", 8), ("int4", 4)])
def test_weight_bits_of_a_written_model(tiny, tmp_path, scheme, num_bits):
    assert models.weight_bits(tiny()) is None
    write_scheme(tiny(), tmp_path / scheme, scheme)
    assert models.weight_bits(tmp_path / scheme) == num_bits


def test_qat_is_only_for_models_that_are_not_sampled_in_training(tiny, tmp_path):
    qat = {"path": str(tiny()), "dtype": "float32", "qat": {"scheme": "int4"}}
    with pytest.raises(UserError, match=r"model\.qat is for `grpo sft`, and for `grpo distill`"):
        tiny_config(tmp_path, tiny(), model=qat)
    with pytest.raises(UserError, match=r"model\.qat\.group_size=24 does not divide the 64 inputs"):
        enable_qat(models.load_model(tiny(), "eager"), "int4", 24)
    tree = {
        "run_dir": str(tmp_path),
        "model": qat | {"teacher": str(tiny())},
        "data": {"name": "arithmetic"},
        "way": "sequence",
    }
    sequence = tree | {"collect": {"problems": 4}, "sft": {"updates": 1}}
    parts = configs.parse(sequence, kind=DistillConfig).stage_configs()
    collect, sft = parts.values()
    assert collect.model.qat is None
    assert sft.model.qat.scheme == "int4"
    on_policy = tree | {"way": "on_policy", "train": {"rollouts": 1}}
    with pytest.raises(UserError, match=r"model\.qat is for"):
        configs.parse(on_policy, kind=DistillConfig)


def mean_gap_to_parent(parent, prompt, completion):
    """Returns the mean absolute difference of the engine's and the parent's logprobs."""
    ids = torch.tensor([prompt + completion.token_ids])
    logits = parent(input_ids=ids).logits[0, len(prompt) - 1 : -1]  # [T, V]
    completion_ids = torch.tensor(completion.token_ids)[:, None]
    parent_logprobs = logits.log_softmax(-1).gather(1, completion_ids)[:, 0]
    engine_logprobs = torch.tensor(completion.logprobs)
    return (parent_logprobs - engine_logprobs).abs().mean()


@pytest.mark.engine
@pytest.mark.parametrize(
    ("scheme", "max_gap"), [("int8", 0.1), ("int8_tensor", 0.15), ("int4", 0.6)]
)
def test_vllm_serves_the_quantized_model_with_logprobs_near_those_of_its_parent(
    tiny, tmp_path, scheme, max_gap
):
    obstacle = int4_obstacle() if scheme == "int4" else int8_warning()
    if obstacle is not None:
        pytest.skip(obstacle)
    write_scheme(tiny(), tmp_path / scheme, scheme)
    engine = start_engine(tmp_path / scheme, tmp_path, dtype="bfloat16", load_weights=True)
    try:
        requests = [Request(prompt_ids=prompt, seed=i) for i, prompt in enumerate(PROMPTS)]
        options = SamplingOptions(max_tokens=12, ignore_eos=True)
        groups = engine.generate(requests, options)
    finally:
        engine.close()
    parent = models.load_model(tiny(), "eager")
    gaps = []
    for prompt, (completion,) in zip(PROMPTS, groups, strict=True):
        gaps.append(mean_gap_to_parent(parent, prompt, completion))
    gap = float(torch.stack(gaps).mean())
    assert gap < max_gap
