"""The policy on a GPU: kernels for logprobs, norms and attention, in bfloat16 and float32."""

import time

import pytest
import torch
from training_samples import grouped_samples, values_and_gradients

from grpo.learning import models, packing, token_logprobs
from grpo.learning.batch import micro_batches, to_device
from grpo.learning.policy import HeadOptions, Policy
from grpo.learning.token_logprobs import TokenGrads
from grpo.types import Sample

from .gpu_helpers import DEVICE, report, to_device_and_dtype

pytestmark = pytest.mark.gpu
TEMPERATURE = 0.7
REPEATS = 10


@pytest.mark.parametrize("kind", ["tiny-qwen2", "tiny-llama", "tiny-qwen3"])
def test_gradients_of_the_packed_stream_match_float32_on_a_cpu(tiny, kind):
    """Covers variable-length attention, the fused norms and the kernels for logprobs."""
    expected_values, expected_gradients = values_and_gradients(
        models.load_model(tiny(kind), "eager"), grouped_samples(), 1000
    )
    model = to_device_and_dtype(models.load_model(tiny(kind), "packed"), torch.bfloat16)
    models.use_fused_norms(model)
    values, gradients = values_and_gradients(model, grouped_samples(), 1000, DEVICE)
    mean_difference = (values.cpu() - expected_values)[0].abs().mean()
    report(f"{kind}, mean difference of logprobs, bfloat16", mean_difference, "nats")
    total_norm = float(torch.nn.utils.get_total_norm(expected_gradients.values()))
    errors = {}
    for name, expected in expected_gradients.items():
        errors[name] = float((gradients[name].float().cpu() - expected).norm())
    largest_error = max(errors.values()) / total_norm
    report(f"{kind}, largest error of a gradient, bfloat16", largest_error, "of the total norm")
    assert mean_difference < 0.03  # 0.011 was measured on an H200
    for name, expected in expected_gradients.items():
        assert errors[name] < 0.05 * expected.norm() + 0.001 * total_norm, name


@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "dtype"),
    [
        (5, 49_153, torch.float32),
        # the vocabulary of Qwen2.5
        (2048, 151_936, torch.float32),
        (2048, 151_936, torch.bfloat16),
    ],
)
def test_logprob_kernels_match_pytorch_operations(num_rows, vocab_size, dtype):
    from grpo.learning import logprob_kernels  # needs Triton

    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = 4 * torch.randn(num_rows, vocab_size, device=DEVICE, generator=generator)
    logits = logits.to(dtype)
    targets = torch.randint(0, vocab_size, (num_rows,), device=DEVICE, generator=generator)
    logprob_grads, entropy_grads = torch.randn(2, num_rows, device=DEVICE, generator=generator)

    expected_values = token_logprobs.compute_values(logits, targets, temperature=TEMPERATURE)
    actual_values = logprob_kernels.compute_values(logits, targets, temperature=TEMPERATURE)
    for actual, expected in zip(actual_values, expected_values, strict=True):
        assert torch.allclose(actual, expected, atol=1e-4)
    # In bfloat16, the kernels round their result.
    tolerance = 1e-4 if dtype == torch.float32 else 2**-7
    for optional_entropy_grads in (None, entropy_grads):
        grads = TokenGrads(logprob_grads, optional_entropy_grads)
        arguments = (targets, expected_values, grads)
        actual = logprob_kernels.compute_gradient(logits, *arguments, temperature=TEMPERATURE)
        expected = token_logprobs.compute_gradient(
            logits.float(), *arguments, temperature=TEMPERATURE
        )
        assert actual.dtype == dtype
        assert torch.allclose(actual.float(), expected, rtol=tolerance, atol=1e-6)

    grads = TokenGrads(logprob_grads, entropies=None)
    for name, module in (("Triton", logprob_kernels), ("PyTorch", token_logprobs)):
        case = f"{num_rows} x {vocab_size} logits in {dtype}, {name}"
        values_ms = milliseconds(module.compute_values, logits, targets)
        report(f"{case}: values", values_ms, "ms")
        gradient_ms = milliseconds(module.compute_gradient, logits, targets, expected_values, grads)
        report(f"{case}: gradient", gradient_ms, "ms")


def milliseconds(function, *arguments):
    """Returns the mean time of a call after a warm-up."""
    function(*arguments, temperature=TEMPERATURE)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(REPEATS):
        function(*arguments, temperature=TEMPERATURE)
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / REPEATS


def long_samples():
    """Returns two completions, of 8,000 and 3,000 tokens, of a prompt of 100 tokens."""
    generator = torch.Generator().manual_seed(0)

    def random_tokens(count):
        return tuple(torch.randint(10, 200, (count,), generator=generator).tolist())

    prompt = random_tokens(100)
    result = []
    for length in (8000, 3000):
        result.append(
            Sample(
                token_ids=prompt + random_tokens(length),
                prompt_length=100,
                advantages=(1.0,) * length,
            )
        )
    return result


def logprobs_of_long_samples(model_dir, attention, dtype):
    """Returns the logprobs of all completion tokens, in the order of the samples."""
    (batch,) = micro_batches(
        long_samples(), [1.0] * 2, max_tokens=20_000, packed=attention == "packed"
    )
    model = to_device_and_dtype(models.load_model(model_dir, attention), dtype)
    with torch.no_grad():
        policy = Policy(model, HeadOptions(temperature=1.0, chunk_tokens=512))
        output = policy(to_device(batch, DEVICE))
    logprobs = []
    for row in torch.tensor(batch.sample_indices).argsort().tolist():
        mask = batch.token_mask[row].to(DEVICE)
        logprobs.append(output.logprobs[row][mask])
    return torch.cat(logprobs).float()


@pytest.fixture(scope="module")
def expected_long_logprobs(tiny):
    return logprobs_of_long_samples(tiny(), "eager", torch.float32)


@pytest.mark.parametrize("attention", ["packed", "sdpa", "flash_attention_2"])
def test_logprobs_of_8k_tokens_match_eager_attention_in_float32(
    tiny, expected_long_logprobs, attention
):
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    actual = logprobs_of_long_samples(tiny(), attention, torch.bfloat16)
    mean_difference = (actual - expected_long_logprobs).abs().mean()
    report(f"{attention}, mean difference of logprobs, 8,000 tokens", mean_difference, "nats")
    assert mean_difference < 0.05


@pytest.mark.parametrize("kind", ["tiny-qwen2", "tiny-deepseek-v3"])
def test_packed_attention_in_float32_matches_eager_attention(tiny, kind):
    """FlashAttention does not support float32, so the stream is gathered into padded rows."""
    expected_values, expected_gradients = values_and_gradients(
        to_device_and_dtype(models.load_model(tiny(kind), "eager"), torch.float32),
        grouped_samples(),
        1000,
        DEVICE,
    )
    model = to_device_and_dtype(models.load_model(tiny(kind), "packed"), torch.float32)
    assert not packing.supports_varlen_kernel(model.config, model.dtype, DEVICE)
    values, gradients = values_and_gradients(model, grouped_samples(), 1000, DEVICE)
    largest_difference = (values - expected_values).abs().max()
    report(f"{kind}, largest difference of a logprob, float32", largest_difference, "nats")
    assert largest_difference < 1e-4
    for name, expected in expected_gradients.items():
        tolerance = 1e-4 * float(expected.abs().max())
        assert torch.allclose(gradients[name], expected, atol=tolerance), name
