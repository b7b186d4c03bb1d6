"""Packed micro-batches: one stream without padding, in which each distinct prompt occurs once.

The stream of a micro-batch is its P distinct prompts, followed by the inputs of its B completions.
The inputs of a completion are its tokens without the last one, which predicts nothing. Example:
prompt (5, 6) with completions (7, 8) and (9,), prompt (4,) with completion (3, 2, 1):

    stream       5  6      | 4 | 7 | 3  2       (9,) has no inputs
    position     0  1      | 0 | 2 | 1  2
    predicts        7, 9   | 3 | 8 | 2  1

A completion attends to its prompt and to itself, so its log-probabilities are those of the padded
batch. Values and gradients differ from the padded batch in the order of floating point sums only.
Linear layers, norms and the output head see the stream as a batch [1, T]. A group of 8 completions
that are as long as their prompt costs 9 times that length, where the padded batch costs 16 times.

`make_layout` builds the stream and the indices of its parts. `attend` is the attention that reads
it:
- On a GPU, FlashAttention's variable-length kernel reads the stream. The keys of each completion
  are gathered behind the keys of its prompt (`VarlenSequences`).
- Elsewhere, the stream is gathered into padded rows for `scaled_dot_product_attention`
  (`PaddedRows`).

Axes in comments: P distinct prompts, B completions, T stream tokens, N completion tokens, Hq query
heads, Hkv key and value heads (H for either), D head size.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

# Names under which transformers finds the attention functions of this file.
PACKED_ATTENTION = "packed"  # `attend`; also the value of `model.attention` that selects it
CONCATENATED_ATTENTION = "packed_rows"  # `attend_concatenated`


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedRows:
    """Indices that gather the stream into padded rows, and padded rows into the stream.

    The rows are the P prompts, padded to the longest prompt (Tp tokens), and the inputs of the B
    completions, padded to the longest inputs (Tc tokens). A slot is a position in the flattened
    rows.
    """

    prompt_index: Tensor  # [P * Tp]: stream index of each slot, 0 where it is padding
    prompt_slots: Tensor  # slots of [P * Tp] without padding, in the order of the stream
    completion_index: Tensor  # [B * Tc]: stream index of each slot, 0 where it is padding
    completion_slots: Tensor  # slots of [B * Tc] without padding, in the order of the stream
    prompt_of_completion: Tensor  # [B]: index of the completion's prompt
    mask: Tensor  # [B, 1, Tc, Tp + Tc] bool: the keys to which each completion input attends
    num_prompts: int
    num_completions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VarlenSequences:
    """The stream as S sequences of different lengths, for PyTorch's `varlen_attn`.

    The sequences are the prompts, followed by the completions that have inputs. The queries are the
    stream itself. The keys of a completion are those of its prompt and of its inputs, so there are
    more keys than queries. For prompt (5, 6) with completions (7, 8) and (9,), the stream is 5 6 7:

        queries  (5 6), (7)         cu_seq_q  0 2 3
        keys     (5 6), (5 6 7)     cu_seq_k  0 2 5     key_index  0 1 0 1 2
    """

    cu_seq_q: Tensor  # [S + 1] int32: index of each sequence's first query, and number of queries
    key_index: Tensor  # [K]: stream index of each key
    cu_seq_k: Tensor  # [S + 1] int32: index of each sequence's first key, and number of keys
    num_queries: int
    max_q: int  # largest number of queries of a sequence
    max_k: int  # largest number of keys of a sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The stream of a micro-batch, and where its parts are."""

    ids: Tensor  # [1, T] token ids
    positions: Tensor  # [1, T] position ids; those of a completion continue those of its prompt
    predictors: Tensor  # [N]: index of the stream token that predicts each completion token
    max_context: int  # upper bound of the number of keys to which a token attends
    padded: PaddedRows | None  # None if `varlen` is set
    varlen: VarlenSequences | None  # None if `padded` is set
    # replaces `attend` where ranks share the stream (grpo/learning/ulysses.py)
    attend_across_ranks: Callable[..., tuple[Tensor, None]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Segments:
    """Where the prompts and the inputs of the completions are in the stream."""

    prompt_lengths: list[int]  # [P]
    input_lengths: list[int]  # [B]: number of tokens without the last one
    prompt_of_completion: list[int]  # [B]
    prompt_starts: list[int]  # [P]: stream index of the first token
    input_starts: list[int]  # [B]: stream index of the first input


def supports_varlen_kernel(config: Any, dtype: torch.dtype, device: torch.device) -> bool:
    """Returns whether FlashAttention's variable-length kernel supports a model's attention.

    Args:
        config: the model's transformers config.
        dtype: dtype of queries, keys and values.
        device: the device of the model.
    """
    if getattr(config, "kv_lora_rank", None):
        return False  # DeepSeek's values have a smaller head size than its keys
    head_size = getattr(config, "head_dim", None)
    if not head_size:
        head_size = config.hidden_size // config.num_attention_heads
    return _kernel_supports(head_size, dtype, device)


def _kernel_supports(head_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return head_size % 8 == 0 and head_size <= 256


def describe_attention(config: Any, dtype: torch.dtype, device: torch.device) -> str:
    """Returns the name of the attention that a learner runs, for the log of a run.

    Args:
        config: the model's transformers config.
        dtype: dtype of queries, keys and values.
        device: the device of the model.
    """
    implementation: str = config._attn_implementation
    if implementation not in (PACKED_ATTENTION, CONCATENATED_ATTENTION):
        return f"{implementation} of transformers"
    if supports_varlen_kernel(config, dtype, device):
        return "packed, with PyTorch's variable-length FlashAttention"
    return "packed, with PyTorch's scaled_dot_product_attention over padded rows"


def make_layout(
    rows: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    device: torch.device,
    *,
    kernel: bool = False,
) -> Layout:
    """Returns the packed stream of a micro-batch.

    Args:
        rows: token ids of the B sequences, prompt and completion, without padding.
        prompt_lengths: number of prompt tokens of each sequence [B].
        device: device of the tensors.
        kernel: lay the stream out for FlashAttention's kernel (`Layout.varlen`) instead of padded
            rows (`Layout.padded`).
    """
    prompt_indices: dict[tuple[int, ...], int] = {}  # index of each distinct prompt
    prompt_of_completion = []
    inputs = []
    for row, prompt_length in zip(rows, prompt_lengths, strict=True):
        prompt = tuple(row[:prompt_length])
        prompt_of_completion.append(prompt_indices.setdefault(prompt, len(prompt_indices)))
        inputs.append(row[prompt_length:-1])
    token_ids: list[int] = []
    for tokens in [*prompt_indices, *inputs]:
        token_ids.extend(tokens)
    segments = _segments(
        [len(prompt) for prompt in prompt_indices],
        [len(tokens) for tokens in inputs],
        prompt_of_completion,
    )
    return Layout(
        ids=_to_tensor(token_ids, device)[None],
        positions=_to_tensor(_positions(segments), device)[None],
        predictors=_to_tensor(_predictors(segments), device),
        max_context=max(segments.prompt_lengths) + max(segments.input_lengths),
        padded=None if kernel else _padded_rows(segments, device),
        varlen=_varlen_sequences(segments, device) if kernel else None,
    )


def _segments(
    prompt_lengths: list[int], input_lengths: list[int], prompt_of_completion: list[int]
) -> _Segments:
    starts = _starts([*prompt_lengths, *input_lengths])
    num_prompts = len(prompt_lengths)
    return _Segments(
        prompt_lengths=prompt_lengths,
        input_lengths=input_lengths,
        prompt_of_completion=prompt_of_completion,
        prompt_starts=starts[:num_prompts],
        input_starts=starts[num_prompts:],
    )


def _starts(lengths: Sequence[int]) -> list[int]:
    """Returns the index of the first element of each part: `_starts([2, 1, 4])` is `[0, 2, 3]`."""
    starts = []
    num_elements = 0
    for length in lengths:
        starts.append(num_elements)
        num_elements += length
    return starts


def _positions(segments: _Segments) -> list[int]:
    """Returns the position id of each stream token, [T]."""
    positions: list[int] = []
    for prompt_length in segments.prompt_lengths:
        positions += range(prompt_length)
    for prompt, num_inputs in zip(
        segments.prompt_of_completion, segments.input_lengths, strict=True
    ):
        prompt_length = segments.prompt_lengths[prompt]
        positions += range(prompt_length, prompt_length + num_inputs)
    return positions


def _predictors(segments: _Segments) -> list[int]:
    """Returns the stream index of the token that predicts each completion token, [N].

    The last prompt token predicts the first completion token. The inputs predict all others.
    """
    predictors: list[int] = []
    for prompt, start, num_inputs in zip(
        segments.prompt_of_completion, segments.input_starts, segments.input_lengths, strict=True
    ):
        predictors.append(segments.prompt_starts[prompt] + segments.prompt_lengths[prompt] - 1)
        predictors += range(start, start + num_inputs)
    return predictors


def _to_tensor(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.long).to(device, non_blocking=True)


def _padded_rows(segments: _Segments, device: torch.device) -> PaddedRows:
    prompt_lengths, input_lengths = segments.prompt_lengths, segments.input_lengths
    prompt_width = max(prompt_lengths)
    input_width = max(input_lengths)
    prompt_index = _padded_index(segments.prompt_starts, prompt_lengths, prompt_width)
    completion_index = _padded_index(segments.input_starts, input_lengths, input_width)
    return PaddedRows(
        prompt_index=_to_tensor(prompt_index, device),
        prompt_slots=_to_tensor(_filled_slots(prompt_lengths, prompt_width), device),
        completion_index=_to_tensor(completion_index, device),
        completion_slots=_to_tensor(_filled_slots(input_lengths, input_width), device),
        prompt_of_completion=_to_tensor(segments.prompt_of_completion, device),
        mask=_completion_mask(segments).to(device, non_blocking=True),
        num_prompts=len(prompt_lengths),
        num_completions=len(input_lengths),
    )


def _padded_index(starts: Sequence[int], lengths: Sequence[int], width: int) -> list[int]:
    """Returns the stream index of each slot of rows padded to `width`, 0 where it is padding."""
    index: list[int] = []
    for start, length in zip(starts, lengths, strict=True):
        index += range(start, start + length)
        index += [0] * (width - length)
    return index


def _filled_slots(lengths: Sequence[int], width: int) -> list[int]:
    """Returns the slots of rows padded to `width` that hold a token, in the order of the stream."""
    slots: list[int] = []
    for row, length in enumerate(lengths):
        slots += range(row * width, row * width + length)
    return slots


def _completion_mask(segments: _Segments) -> Tensor:
    """Returns the mask of keys, [B, 1, Tc, Tp + Tc] bool.

    An input attends to its prompt, to earlier inputs of its completion and to itself. Padding is
    masked as if it were inputs, so that no row of the softmax is empty.
    """
    num_completions = len(segments.input_lengths)
    prompt_width = max(segments.prompt_lengths)
    input_width = max(segments.input_lengths)
    prompt_lengths = [segments.prompt_lengths[prompt] for prompt in segments.prompt_of_completion]
    in_prompt = torch.arange(prompt_width) < torch.tensor(prompt_lengths)[:, None]  # [B, Tp]
    causal = torch.ones(input_width, input_width, dtype=torch.bool).tril()  # [Tc, Tc]
    mask = torch.cat(
        [
            in_prompt[:, None].expand(-1, input_width, -1),
            causal.expand(num_completions, -1, -1),
        ],
        dim=-1,
    )
    return mask[:, None]


def _varlen_sequences(segments: _Segments, device: torch.device) -> VarlenSequences:
    """Returns the sequences of the stream.

    A completion of one token has no inputs, therefore no queries, and is skipped.
    """
    key_index = list(range(sum(segments.prompt_lengths)))
    query_lengths = list(segments.prompt_lengths)
    key_lengths = list(segments.prompt_lengths)
    for prompt, start, num_inputs in zip(
        segments.prompt_of_completion, segments.input_starts, segments.input_lengths, strict=True
    ):
        if num_inputs == 0:
            continue
        prompt_start = segments.prompt_starts[prompt]
        prompt_length = segments.prompt_lengths[prompt]
        key_index += range(prompt_start, prompt_start + prompt_length)
        key_index += range(start, start + num_inputs)
        query_lengths.append(num_inputs)
        key_lengths.append(prompt_length + num_inputs)
    return VarlenSequences(
        cu_seq_q=_cumulative(query_lengths, device),
        key_index=_to_tensor(key_index, device),
        cu_seq_k=_cumulative(key_lengths, device),
        num_queries=sum(query_lengths),
        max_q=max(query_lengths),
        max_k=max(key_lengths),
    )


def _cumulative(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Returns the cumulative lengths, int32: [2, 1, 4] becomes [0, 2, 3, 7]."""
    return _to_tensor([*_starts(lengths), sum(lengths)], device).int()


# The parameters are those with which transformers calls an attention function.
def attend(  # noqa: PLR0913
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *,
    packed: Layout,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers for a packed stream (`model.attention=packed`).

    Args:
        module: the attention layer.
        query: [1, Hq, T, D].
        key: [1, Hkv, T, D].
        value: [1, Hkv, T, D].
        attention_mask: ignored; the layout says which keys a token attends to.
        packed: layout of the stream.
        scaling: factor of the scores.
        dropout: must be 0.
        sliding_window: must be `None` or at least as large as the longest context.
        **kwargs: other options of the model; soft-capping and attention sinks are not supported.

    Returns:
        The output [1, T, Hq, D] and `None` in place of the attention weights. Tokens after the end
        of the stream (padding for `ulysses`) get 0.

    Raises:
        NotImplementedError: the model's attention is not plain causal attention.
    """
    if packed.attend_across_ranks is not None:
        return packed.attend_across_ranks(
            module,
            query,
            key,
            value,
            attention_mask,
            packed=packed,
            scaling=scaling,
            dropout=dropout,
            sliding_window=sliding_window,
            **kwargs,
        )
    _require_plain_attention(module, packed.max_context, dropout, sliding_window, kwargs)
    query_stream = _tokens_first(query)
    key_stream = _tokens_first(key)
    value_stream = _tokens_first(value)
    if packed.varlen is not None:
        out = _attend_varlen(query_stream, key_stream, value_stream, packed.varlen, scaling)
    else:
        assert packed.padded is not None
        out = _attend_padded(query_stream, key_stream, value_stream, packed.padded, scaling)
    num_padding = query.shape[2] - len(out)
    return F.pad(out, (0, 0, 0, 0, 0, num_padding))[None], None


def _require_plain_attention(
    module: nn.Module,
    max_context: int,
    dropout: float,
    sliding_window: int | None,
    options: dict[str, Any],
) -> None:
    """Raises NotImplementedError if the layer needs more than plain causal attention."""
    has_small_window = sliding_window is not None and 0 < sliding_window < max_context
    has_softcap = bool(options.get("softcap"))
    has_sinks = options.get("s_aux") is not None
    if dropout or has_small_window or has_softcap or has_sinks:
        raise NotImplementedError(
            f"model.attention={PACKED_ATTENTION} computes plain causal attention, but "
            f"{type(module).__name__} has dropout, a sliding window, soft-capping or attention "
            "sinks. Set model.attention to sdpa or eager."
        )


def _tokens_first(states: Tensor) -> Tensor:
    """Returns states [1, H, T, D] as [T, H, D]."""
    return states[0].transpose(0, 1)


def _attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, sequences: VarlenSequences, scaling: float
) -> Tensor:
    """Returns the output [num_queries, Hq, D] of FlashAttention's variable-length kernel.

    Args:
        query: [T, Hq, D].
        key: [T, Hkv, D].
        value: [T, Hkv, D].
        sequences: queries and keys of each sequence.
        scaling: factor of the scores.
    """
    queries = query[: sequences.num_queries]
    keys = key.index_select(0, sequences.key_index)  # [K, Hkv, D]
    values = value.index_select(0, sequences.key_index)
    out: Tensor = _varlen_attention()(
        queries,
        keys,
        values,
        sequences.cu_seq_q,
        sequences.cu_seq_k,
        sequences.max_q,
        sequences.max_k,
        scale=scaling,
    )
    return out


@functools.cache
def _varlen_attention() -> Callable[..., Any]:
    """Returns PyTorch's variable-length FlashAttention with a causal mask.

    The mask is aligned at the end: the last query of a sequence attends to all of its keys.

    PyTorch 2.13 requires `enable_gqa` where several query heads share a key head. PyTorch 2.11
    accepts such heads and has no such parameter.
    """
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"window_size": (-1, 0)}  # causal
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    return functools.partial(varlen_attn, **options)


def _attend_padded(
    query: Tensor, key: Tensor, value: Tensor, rows: PaddedRows, scaling: float
) -> Tensor:
    """Returns the output of scaled_dot_product_attention over padded rows, as a stream.

    First the prompts attend to themselves, then each completion to its prompt and to itself.

    Args:
        query: [T, Hq, D].
        key: [T, Hkv, D].
        value: [T, Hkv, D].
        rows: indices of the padded rows.
        scaling: factor of the scores.
    """
    prompt_key = _gather_rows(key, rows.prompt_index, rows.num_prompts)  # [P, Hkv, Tp, D]
    prompt_value = _gather_rows(value, rows.prompt_index, rows.num_prompts)
    prompt_query = _gather_rows(query, rows.prompt_index, rows.num_prompts)
    prompt_out = _dense_attention(
        prompt_query, prompt_key, prompt_value, is_causal=True, scale=scaling
    )
    out = _select_slots(prompt_out, rows.prompt_slots)
    if rows.completion_index.numel() == 0:
        return out  # every completion has one token

    input_query = _gather_rows(query, rows.completion_index, rows.num_completions)  # [B, Hq, Tc, D]
    input_key = _gather_rows(key, rows.completion_index, rows.num_completions)
    input_value = _gather_rows(value, rows.completion_index, rows.num_completions)
    # [B, Hkv, Tp + Tc, D]: the keys and values of the prompt, then those of the completion
    all_keys = torch.cat([prompt_key.index_select(0, rows.prompt_of_completion), input_key], dim=2)
    all_values = torch.cat(
        [prompt_value.index_select(0, rows.prompt_of_completion), input_value], dim=2
    )
    completion_out = _dense_attention(
        input_query, all_keys, all_values, attn_mask=rows.mask, scale=scaling
    )
    return torch.cat([out, _select_slots(completion_out, rows.completion_slots)])


def _dense_attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Returns the output of `scaled_dot_product_attention`, [B, Hq, Tq, D].

    On a GPU, PyTorch's memory-efficient kernel needs a key head per query head. Otherwise PyTorch
    selects its math backend, which stores the scores of all pairs of tokens.

    Args:
        query: [B, Hq, Tq, D].
        key: [B, Hkv, Tk, D].
        value: [B, Hkv, Tk, D].
        options: `attn_mask` or `is_causal`, and `scale`.
    """
    if query.device.type != "cuda":
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)
    num_query_heads = query.shape[1]
    key = _repeat_heads(key, num_query_heads)
    value = _repeat_heads(value, num_query_heads)
    return F.scaled_dot_product_attention(query, key, value, **options)


def _repeat_heads(states: Tensor, num_heads: int) -> Tensor:
    """Returns states [B, Hkv, T, D] with each head repeated, [B, num_heads, T, D]."""
    return states.repeat_interleave(num_heads // states.shape[1], dim=1)


def _gather_rows(states: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """Returns the stream [T, H, D] as padded rows [num_rows, H, width, D]."""
    padded: Tensor = states.index_select(0, index).unflatten(0, (num_rows, -1))
    return padded.transpose(1, 2)


def _select_slots(rows: Tensor, slots: Tensor) -> Tensor:
    """Returns the tokens [len(slots), H, D] of padded rows [num_rows, H, width, D]."""
    return rows.transpose(1, 2).flatten(0, 1).index_select(0, slots)


# The parameters are those with which transformers calls an attention function.
def attend_concatenated(  # noqa: PLR0913
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers for concatenated sequences without shared prompts.

    TRL's collator concatenates the sequences of a micro-batch if `padding_free` is set. Each
    sequence attends to itself only. The result and the exceptions are those of `attend`.

    Args:
        module: the attention layer.
        query: [1, Hq, T, D].
        key: [1, Hkv, T, D].
        value: [1, Hkv, T, D]; D may differ from that of the keys.
        attention_mask: ignored.
        cu_seq_lens_q: [B + 1], cumulative lengths of the B sequences.
        max_length_q: length of the longest sequence.
        scaling: factor of the scores.
        dropout: must be 0.
        sliding_window: must be `None` or at least `max_length_q`.
        **kwargs: as for `attend`.
    """
    max_length = int(max_length_q)
    _require_plain_attention(module, max_length, dropout, sliding_window, kwargs)
    head_size = query.shape[-1]
    if value.shape[-1] == head_size and _kernel_supports(head_size, query.dtype, query.device):
        cu_seq = cu_seq_lens_q.int()
        out = _varlen_attention()(
            _tokens_first(query),
            _tokens_first(key),
            _tokens_first(value),
            cu_seq,
            cu_seq,
            max_length,
            max_length,
            scale=scaling,
        )
        return out[None], None

    rows = _concatenated_rows(cu_seq_lens_q, max_length, num_tokens=query.shape[2])
    out = _dense_attention(
        _gather_rows(_tokens_first(query), rows.token_index, rows.num_rows),
        _gather_rows(_tokens_first(key), rows.token_index, rows.num_rows),
        _gather_rows(_tokens_first(value), rows.token_index, rows.num_rows),
        is_causal=True,
        scale=scaling,
    )
    return _select_slots(out, rows.slots)[None], None


class _ConcatenatedRows(NamedTuple):
    """Indices that gather B concatenated sequences into padded rows; compare `PaddedRows`."""

    # [B * max_length]: stream index of each slot; where it is padding, the index of another token
    token_index: Tensor
    slots: Tensor  # [T]: slots without padding, in the order of the stream
    num_rows: int  # B


def _concatenated_rows(cu_seq_lens: Tensor, max_length: int, num_tokens: int) -> _ConcatenatedRows:
    starts = cu_seq_lens[:-1].long()  # [B]
    lengths = cu_seq_lens.diff()  # [B]
    column = torch.arange(max_length, device=cu_seq_lens.device)
    index = (starts[:, None] + column).clamp(max=num_tokens - 1)  # [B, max_length]
    is_filled = column < lengths[:, None]  # [B, max_length]
    return _ConcatenatedRows(
        token_index=index.flatten(),
        slots=is_filled.flatten().nonzero()[:, 0],
        num_rows=len(lengths),
    )


AttentionInterface.register(PACKED_ATTENTION, attend)
AttentionInterface.register(CONCATENATED_ATTENTION, attend_concatenated)
