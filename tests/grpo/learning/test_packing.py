"""Tests of the packed stream: its layout, and its values and gradients against a padded batch."""

import inspect
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from training_samples import grouped_samples, values_and_gradients

from grpo.learning import models, packing
from grpo.learning.batch import micro_batches
from grpo.learning.ulysses import Ulysses
from grpo.types import Sample, UserError

# Prompt (5, 6) with completions (7, 8) and (9,), prompt (4,) with completion (3, 2, 1)
GOLDEN_ROWS = [(5, 6, 7, 8), (5, 6, 9), (4, 3, 2, 1)]
GOLDEN_PROMPT_LENGTHS = [2, 2, 1]


def test_golden_layout():
    """The last token of a completion is not in the stream, because it predicts nothing."""
    layout = packing.make_layout(GOLDEN_ROWS, GOLDEN_PROMPT_LENGTHS, torch.device("cpu"))
    assert layout.ids.tolist() == [[5, 6, 4, 7, 3, 2]]
    assert layout.positions.tolist() == [[0, 1, 0, 2, 1, 2]]
    # The 6 at index 1 predicts 7 and 9, and the 7 at index 3 predicts 8. The 4, 3 and 2 at indices
    # 2, 4 and 5 predict 3, 2 and 1.
    assert layout.predictors.tolist() == [1, 3, 1, 2, 4, 5]
    assert layout.varlen is None

    rows = layout.padded
    # prompts (5, 6) and (4, padding)
    assert rows.prompt_index.tolist() == [0, 1, 2, 0]
    assert rows.prompt_slots.tolist() == [0, 1, 2]
    # completion inputs (7, padding), (padding, padding) and (3, 2)
    assert rows.completion_index.tolist() == [3, 0, 0, 0, 4, 5]
    assert rows.completion_slots.tolist() == [0, 4, 5]
    assert rows.prompt_of_completion.tolist() == [0, 0, 1]
    # The columns are two slots of the prompt and two slots of the completion inputs. In row 2, the
    # first input attends to 4 and 3, and the second input to 4, 3 and 2.
    assert rows.mask[2, 0].tolist() == [[True, False, True, False], [True, False, True, True]]
    assert rows.mask[0, 0, 0].tolist() == [True, True, True, False]


def test_golden_varlen_sequences():
    """The keys of a completion are those of its prompt and of its inputs. (9,) has no inputs."""
    layout = packing.make_layout(
        GOLDEN_ROWS, GOLDEN_PROMPT_LENGTHS, torch.device("cpu"), kernel=True
    )
    assert layout.padded is None
    assert layout.ids.tolist() == [[5, 6, 4, 7, 3, 2]]

    sequences = layout.varlen
    # queries (5, 6), (4), (7), (3, 2)
    assert sequences.cu_seq_q.tolist() == [0, 2, 3, 4, 6]
    # keys (5, 6), (4), (5, 6, 7), (4, 3, 2)
    assert sequences.key_index.tolist() == [0, 1, 2, 0, 1, 3, 2, 4, 5]
    assert sequences.cu_seq_k.tolist() == [0, 2, 3, 6, 9]
    assert sequences.num_queries == 6
    assert sequences.max_q == 2
    assert sequences.max_k == 3


# The parameters are those of torch.nn.attention.varlen.varlen_attn.
def plain_varlen_attention(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale):
    """Computes varlen_attn with window_size=(-1, 0) in plain PyTorch, in any dtype."""
    query_ranges = list(pairwise(cu_seq_q.tolist()))
    key_ranges = list(pairwise(cu_seq_k.tolist()))
    assert max_q == max(end - start for start, end in query_ranges)
    assert max_k == max(end - start for start, end in key_ranges)
    outputs = []
    for query_range, key_range in zip(query_ranges, key_ranges, strict=True):
        queries = slice(*query_range)
        keys = slice(*key_range)
        outputs.append(causal_attention(query[queries], key[keys], value[keys], scale))
    return torch.cat(outputs)


def causal_attention(query, key, value, scale):
    """Returns the attention output of one sequence, [T, Hq, D].

    The causal mask is aligned at the end: the last query attends to all keys.

    Args:
        query: [T, Hq, D].
        key: [S, Hkv, D].
        value: [S, Hkv, D].
        scale: factor of the scores.
    """
    num_queries = len(query)
    num_keys = len(key)
    heads_per_key_head = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(heads_per_key_head, dim=1)  # [S, Hq, D]
    value = value.repeat_interleave(heads_per_key_head, dim=1)
    is_hidden = torch.ones(num_queries, num_keys, dtype=torch.bool)
    is_hidden = is_hidden.triu(num_keys - num_queries + 1)
    scores = torch.einsum("thd,shd->hts", query, key) * scale
    weights = scores.masked_fill(is_hidden, -torch.inf).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, value)


def test_errors_name_ranks_and_heads_that_cannot_share_a_stream(tiny, monkeypatch):
    model = models.load_model(tiny(), "packed")
    with pytest.raises(UserError, match="sequence_parallel=2 does not divide the 1 ranks"):
        Ulysses(model, 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(
        UserError, match="cannot split the 2 query heads and 1 key-value heads of Qwen2"
    ):
        Ulysses(model, 3)


def assert_close(values, gradients, expected_values, expected_gradients):
    assert torch.allclose(values, expected_values, atol=1e-5)
    for name, expected in expected_gradients.items():
        tolerance = 1e-5 * float(expected.abs().max())
        assert torch.allclose(gradients[name], expected, atol=tolerance), name


@pytest.mark.parametrize("kind", models.TINY_MODELS)
@pytest.mark.parametrize("max_tokens", [1000, 60])
def test_packed_equals_padded_in_logprobs_entropies_and_gradients(tiny, kind, max_tokens):
    expected_values, expected_gradients = values_and_gradients(
        models.load_model(tiny(kind), "eager"), grouped_samples(), 1000
    )
    values, gradients = values_and_gradients(
        models.load_model(tiny(kind), "packed"), grouped_samples(), max_tokens
    )
    assert_close(values, gradients, expected_values, expected_gradients)


# The kernel does not support tiny-deepseek-v3, whose values have a smaller head size than its keys.
@pytest.mark.parametrize(
    "kind", [kind for kind in models.TINY_MODELS if kind != "tiny-deepseek-v3"]
)
@pytest.mark.parametrize("max_tokens", [1000, 60])
def test_varlen_equals_padded_in_logprobs_entropies_and_gradients(
    tiny, monkeypatch, kind, max_tokens
):
    """Replaces the GPU kernel with plain PyTorch that takes the same arguments."""
    expected_values, expected_gradients = values_and_gradients(
        models.load_model(tiny(kind), "eager"), grouped_samples(), 1000
    )
    num_calls = 0

    def counting_attention(*arguments, **options):
        nonlocal num_calls
        num_calls += 1
        return plain_varlen_attention(*arguments, **options)

    monkeypatch.setattr(packing, "supports_varlen_kernel", lambda *_: True)
    monkeypatch.setattr(packing, "_varlen_attention", lambda: counting_attention)
    model = models.load_model(tiny(kind), "packed")
    values, gradients = values_and_gradients(model, grouped_samples(), max_tokens)
    assert num_calls >= model.config.num_hidden_layers
    assert_close(values, gradients, expected_values, expected_gradients)


def test_the_kernel_is_causal_and_gets_only_options_that_this_pytorch_supports():
    from torch.nn.attention.varlen import varlen_attn

    options = packing._varlen_attention().keywords
    parameters = inspect.signature(varlen_attn).parameters
    assert options["window_size"] == (-1, 0)
    assert options.keys() | {"scale"} <= parameters.keys()
    assert options.get("enable_gqa", False) == ("enable_gqa" in parameters)


@pytest.mark.parametrize(
    "config, dtype, capability, expected",
    [
        ({"head_dim": 64}, torch.bfloat16, (9, 0), True),
        (
            {"head_dim": None, "hidden_size": 1536, "num_attention_heads": 12},
            torch.bfloat16,
            (8, 0),
            True,
        ),
        ({"head_dim": 64}, torch.float32, (9, 0), False),
        ({"head_dim": 64}, torch.bfloat16, (7, 5), False),
        ({"head_dim": 20}, torch.bfloat16, (9, 0), False),
        ({"head_dim": 512}, torch.bfloat16, (9, 0), False),
        ({"head_dim": 64, "kv_lora_rank": 512}, torch.bfloat16, (9, 0), False),
    ],
)
def test_the_kernel_is_used_only_for_supported_models_dtypes_and_gpus(
    monkeypatch, config, dtype, capability, expected
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    model_config = SimpleNamespace(**config)
    assert packing.supports_varlen_kernel(model_config, dtype, torch.device("cuda")) == expected
    assert not packing.supports_varlen_kernel(model_config, dtype, torch.device("cpu"))


def test_repeated_key_heads_give_the_attention_of_grouped_query_heads():
    query = torch.randn(2, 6, 5, 8)
    key, value = torch.randn(2, 2, 2, 7, 8).unbind()
    grouped = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    repeated = F.scaled_dot_product_attention(
        query, packing._repeat_heads(key, 6), packing._repeat_heads(value, 6)
    )
    assert torch.allclose(repeated, grouped, atol=1e-6)


def test_the_log_of_a_run_names_the_attention(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    packed = SimpleNamespace(head_dim=64, _attn_implementation="packed")
    describe = packing.describe_attention
    assert "variable-length FlashAttention" in describe(packed, torch.bfloat16, cuda)
    assert "padded rows" in describe(packed, torch.float32, cuda)
    assert "padded rows" in describe(packed, torch.bfloat16, cpu)
    eager = SimpleNamespace(head_dim=64, _attn_implementation="eager")
    assert describe(eager, torch.bfloat16, cuda) == "eager of transformers"


@pytest.mark.parametrize("kind", ["tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-qwen3-moe"])
def test_fused_norms_equal_the_norms_of_transformers(tiny, kind):
    expected_values, expected_gradients = values_and_gradients(
        models.load_model(tiny(kind), "eager"), grouped_samples(), 1000
    )
    model = models.load_model(tiny(kind), "eager")
    num_fused = models.use_fused_norms(model)
    num_norms = sum(type(module).__name__.endswith("RMSNorm") for module in model.modules())
    assert num_fused == num_norms
    values, gradients = values_and_gradients(model, grouped_samples(), 1000)
    assert_close(values, gradients, expected_values, expected_gradients)


def test_logprobs_are_correct_if_all_completions_have_one_token(tiny):
    samples = [
        Sample(token_ids=(9, 8, token), prompt_length=2, advantages=(1.0,)) for token in (10, 11)
    ]
    expected, _ = values_and_gradients(models.load_model(tiny(), "eager"), samples, 100)
    actual, _ = values_and_gradients(models.load_model(tiny(), "packed"), samples, 100)
    assert torch.allclose(actual, expected, atol=1e-5)


def sample_with_prompt_of_ten(prompt_token, completion_length):
    return Sample(
        token_ids=(prompt_token,) * 10 + (1,) * completion_length,
        prompt_length=10,
        advantages=(1.0,) * completion_length,
    )


def test_samples_of_a_group_share_a_micro_batch_and_their_prompt_counts_once():
    samples = [
        sample_with_prompt_of_ten(7, completion_length=3),
        sample_with_prompt_of_ten(8, completion_length=3),
        sample_with_prompt_of_ten(7, completion_length=5),
        sample_with_prompt_of_ten(8, completion_length=5),
    ]
    weights = [1.0] * 4
    # A group has 10 + 3 + 5 = 18 tokens.
    batches = micro_batches(samples, weights, max_tokens=18, packed=True)
    prompt_tokens = []
    for batch in batches:
        prompt_tokens.append([samples[i].token_ids[0] for i in batch.sample_indices])
    assert prompt_tokens == [[7, 7], [8, 8]]
    assert len(micro_batches(samples, weights, max_tokens=36, packed=True)) == 1
    assert len(micro_batches(samples, weights, max_tokens=17, packed=True)) == 4


def test_attention_with_a_sliding_window_is_rejected(tiny):
    model = models.load_model(
        tiny(use_sliding_window=True, sliding_window=4, max_window_layers=0), "packed"
    )
    with pytest.raises(NotImplementedError, match=r"Set model\.attention to sdpa or eager"):
        values_and_gradients(model, grouped_samples(), 1000)
