"""The packed stream against the padded batch.

The same logprobs and gradients, each prompt once, no padding.
"""

import inspect
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from training_samples import groups, scored

from grpo.learning import models, packing
from grpo.learning.batch import micro_batches
from grpo.learning.ulysses import Ulysses
from grpo.types import Sample, UserError


def test_golden_layout():
    """Prompt (5, 6) with completions (7, 8) and (9,), prompt (4,) with (3, 2, 1).

    A last token predicts nothing and is left out.
    """
    made = packing.layout([(5, 6, 7, 8), (5, 6, 9), (4, 3, 2, 1)], [2, 2, 1], torch.device("cpu"))
    assert made.ids.tolist() == [[5, 6, 4, 7, 3, 2]]
    assert made.positions.tolist() == [[0, 1, 0, 2, 1, 2]]
    # 7 and 9 are predicted by the 6 at index 1, 8 by the 7 at index 3; 3, 2, 1 by the 4, 3, 2 at
    # indices 2, 4, 5
    assert made.predictors.tolist() == [1, 3, 1, 2, 4, 5]
    rows = made.padded
    assert made.varlen is None
    assert rows.prompt_index.tolist() == [0, 1, 2, 0]
    assert rows.prompt_slots.tolist() == [0, 1, 2]
    assert rows.completion_index.tolist() == [3, 0, 0, 0, 4, 5]
    assert rows.completion_slots.tolist() == [0, 4, 5]
    assert rows.prompt_of_completion.tolist() == [0, 0, 1]
    # Two slots of the prompt, then two of the inputs: the second input of row 2 attends to 4, 3
    # and 2.
    assert rows.mask[2, 0].tolist() == [[True, False, True, False], [True, False, True, True]]
    assert rows.mask[0, 0, 0].tolist() == [True, True, True, False]


def test_golden_varlen_sequences():
    """The layout above for the variable-length kernel.

    The keys of a completion are those of its prompt and of its inputs; (9,) has no input.
    """
    made = packing.layout(
        [(5, 6, 7, 8), (5, 6, 9), (4, 3, 2, 1)], [2, 2, 1], torch.device("cpu"), kernel=True
    )
    sequences = made.varlen
    assert made.padded is None and made.ids.tolist() == [[5, 6, 4, 7, 3, 2]]
    assert sequences.cu_seq_q.tolist() == [0, 2, 3, 4, 6]  # (5 6), (4), (7), (3 2)
    # (5 6), (4), (5 6 7), (4 3 2)
    assert sequences.key_index.tolist() == [0, 1, 2, 0, 1, 3, 2, 4, 5]
    assert sequences.cu_seq_k.tolist() == [0, 2, 3, 6, 9]
    assert (sequences.num_queries, sequences.max_q, sequences.max_k) == (6, 2, 3)


def plain_varlen_attention(
    query, key, value, query_starts, key_starts, max_queries, max_keys, scale
):
    """torch.nn.attention.varlen.varlen_attn with window_size=(-1, 0), one sequence after another,
    in any dtype.
    """
    outputs = []
    queries, keys = (list(pairwise(starts.tolist())) for starts in (query_starts, key_starts))
    assert max_queries == max(end - start for start, end in queries) and max_keys == max(
        end - start for start, end in keys
    )
    for (query_start, query_end), (key_start, key_end) in zip(queries, keys, strict=True):
        q = query[query_start:query_end]  # [T, Hq, D]
        group = q.shape[1] // key.shape[1]
        k = key[key_start:key_end].repeat_interleave(group, dim=1)  # [S, Hq, D]
        v = value[key_start:key_end].repeat_interleave(group, dim=1)
        hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
        scores = torch.einsum("thd,shd->hts", q, k) * scale
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hts,shd->thd", weights, v))
    return torch.cat(outputs)


def test_ranks_and_heads_that_cannot_share_a_stream_are_named(tiny, monkeypatch):
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
        assert torch.allclose(gradients[name], expected, atol=1e-5 * float(expected.abs().max())), (
            name
        )


@pytest.mark.parametrize("kind", models.TINY)
@pytest.mark.parametrize("max_tokens", [1000, 60])
def test_packed_equals_padded_in_logprobs_entropies_and_gradients(tiny, kind, max_tokens):
    expected, gradients = scored(models.load_model(tiny(kind), "eager"), groups(), 1000)
    values, ours = scored(models.load_model(tiny(kind), "packed"), groups(), max_tokens)
    assert_close(values, ours, expected, gradients)


# its values are narrower than its keys
@pytest.mark.parametrize("kind", [kind for kind in models.TINY if kind != "tiny-deepseek-v3"])
@pytest.mark.parametrize("max_tokens", [1000, 60])
def test_varlen_equals_padded_in_logprobs_entropies_and_gradients(
    tiny, monkeypatch, kind, max_tokens
):
    """What a GPU's kernel is given, computed in plain PyTorch."""
    expected, gradients = scored(models.load_model(tiny(kind), "eager"), groups(), 1000)
    calls = []

    def counted(*arguments, **options):
        calls.append(arguments)
        return plain_varlen_attention(*arguments, **options)

    monkeypatch.setattr(packing, "has_kernel", lambda *_: True)
    monkeypatch.setattr(packing, "_varlen_attention", lambda: counted)
    model = models.load_model(tiny(kind), "packed")
    values, ours = scored(model, groups(), max_tokens)
    assert len(calls) >= model.config.num_hidden_layers
    assert_close(values, ours, expected, gradients)


def test_the_kernel_is_called_causally_with_arguments_that_this_pytorch_has():
    from torch.nn.attention.varlen import varlen_attn

    options, parameters = (
        packing._varlen_attention().keywords,
        inspect.signature(varlen_attn).parameters,
    )
    assert options["window_size"] == (-1, 0) and options.keys() | {"scale"} <= parameters.keys()
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
def test_the_kernel_is_for_what_it_can_compute(monkeypatch, config, dtype, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert packing.has_kernel(SimpleNamespace(**config), dtype, torch.device("cuda")) == expected
    assert not packing.has_kernel(SimpleNamespace(**config), dtype, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-qwen3-moe"])
def test_fused_norms_compute_what_transformers_norms_do(tiny, kind):
    expected, gradients = scored(models.load_model(tiny(kind), "eager"), groups(), 1000)
    model = models.load_model(tiny(kind), "eager")
    fused = models.use_fused_norms(model)
    assert fused == sum(type(module).__name__.endswith("RMSNorm") for module in model.modules())
    values, ours = scored(model, groups(), 1000)
    assert_close(values, ours, expected, gradients)


def test_one_token_completions_need_no_completion_inputs(tiny):
    samples = [
        Sample(token_ids=(9, 8, token), prompt_length=2, advantages=(1.0,)) for token in (10, 11)
    ]
    expected, _ = scored(models.load_model(tiny(), "eager"), samples, 100)
    values, _ = scored(models.load_model(tiny(), "packed"), samples, 100)
    assert torch.allclose(values, expected, atol=1e-5)


def test_a_groups_samples_share_a_micro_batch_and_count_their_prompt_once():
    samples = [
        Sample(token_ids=(prompt,) * 10 + (1,) * n, prompt_length=10, advantages=(1.0,) * n)
        for n in (3, 5)
        for prompt in (7, 8)
    ]
    batches = micro_batches(samples, [1.0] * 4, max_tokens=18, packed=True)
    assert [sorted(samples[i].token_ids[0] for i in batch.index) for batch in batches] == [
        [7, 7],
        [8, 8],
    ]
    assert len(micro_batches(samples, [1.0] * 4, max_tokens=36, packed=True)) == 1
    assert len(micro_batches(samples, [1.0] * 4, max_tokens=17, packed=True)) == 4


def test_attention_that_is_not_plain_is_refused(tiny):
    model = models.load_model(
        tiny(use_sliding_window=True, sliding_window=4, max_window_layers=0), "packed"
    )
    with pytest.raises(NotImplementedError, match=r"Set model\.attention to sdpa or eager"):
        scored(model, groups(), 1000)
