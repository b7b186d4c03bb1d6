"""One stream without padding for a micro-batch, and the attention that reads it.

The stream has each distinct prompt once, then every completion.

Linear layers, norms and the head see [1, N]: no padding, and a group's prompt only once, so a group
of 8 with prompts as long as its completions costs 9 lengths and not 16. A completion attends to its
prompt and to itself. On a GPU, FlashAttention's variable-length kernel reads the stream as it is,
with the keys of each completion gathered behind those of its prompt (`Spans`). Elsewhere attention
gathers the stream into padded rows (`Rows`). The gradient is that of the padded batch; only the
order of sums differs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

# the keys under which transformers finds `attend` (model.attention) and `attend_rows`
NAME, ROWS = "packed", "packed_rows"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The stream in padded rows.

    Q prompts of at most P tokens, B completions of at most C inputs.
    """

    prompts: Tensor  # [Q * P] stream places, 0 where padded
    prompt_places: Tensor  # places of the stream's prompt part in [Q * P]
    completions: Tensor  # [B * C] stream places, 0 where padded
    completion_places: Tensor  # places of the stream's completion part in [B * C]
    prompt_of: Tensor  # [B]
    mask: Tensor  # [B, 1, C, P + C] bool: what a completion's inputs attend to
    num_prompts: int
    num_completions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """The stream as R sequences of different lengths.

    The prompts come first, then the completions that have inputs.

    The queries are the stream itself. The keys of a completion are its prompt's and its own, so
    they are longer: K places in all. With prompt (5, 6) and completions (7, 8), (9,): the stream is
    5 6 7, queries are (5 6), (7) and keys (5 6), (5 6 7).
    """

    query_starts: Tensor  # [R + 1] int32
    keys: Tensor  # [K] stream places
    key_starts: Tensor  # [R + 1] int32
    num_queries: int
    max_queries: int  # of one sequence
    max_keys: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where everything lies in the stream of N tokens.

    Each distinct prompt comes once, then the inputs of every completion.

    With prompt (5, 6) and completions (7, 8), (9,): the stream is 5 6 7, for the last token of a
    completion predicts nothing.
    """

    ids: Tensor  # [1, N]
    positions: Tensor  # [1, N]
    predictors: Tensor  # stream places whose state predicts each completion token, row by row
    longest: int  # tokens of the longest prompt plus inputs of the longest completion
    rows: Rows | None  # one of the two: see `layout`
    spans: Spans | None
    # the attention of ranks that share the stream (grpo/learning/ulysses.py)
    through: Callable[..., tuple[Tensor, None]] | None = None


def has_kernel(config: Any, dtype: torch.dtype, device: torch.device) -> bool:
    """Returns whether FlashAttention's variable-length kernel takes this model's attention.

    `config`: transformers' config of the model.
    """
    if getattr(config, "kv_lora_rank", None):  # DeepSeek's values are narrower than its keys
        return False
    head_size = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return _kernel_takes(head_size, dtype, device)


def _kernel_takes(head_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    if (
        device.type != "cuda"
        or dtype != torch.bfloat16
        or torch.cuda.get_device_capability(device) < (8, 0)
    ):
        return False
    return head_size % 8 == 0 and head_size <= 256


def layout(
    rows: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    device: torch.device,
    *,
    kernel: bool = False,
) -> Layout:
    """Returns the layout of sequences (prompt then completion, without padding).

    It has `spans` for FlashAttention's kernel if `kernel` is set, otherwise padded `rows`.
    """
    prompts: dict[tuple[int, ...], int] = {}
    prompt_of = [
        prompts.setdefault(tuple(row[:length]), len(prompts))
        for row, length in zip(rows, prompt_lengths, strict=True)
    ]
    inputs = [row[length:-1] for row, length in zip(rows, prompt_lengths, strict=True)]
    sizes, counts = [len(prompt) for prompt in prompts], [len(row) for row in inputs]
    starts = _starts([*sizes, *counts])
    ends = [starts[q] + size - 1 for q, size in enumerate(sizes)]
    predictors = [
        place
        for q, start, count in zip(prompt_of, starts[len(sizes) :], counts, strict=True)
        for place in (ends[q], *range(start, start + count))
    ]
    positions = [
        *(i for size in sizes for i in range(size)),
        *(prompt_lengths[b] + i for b, n in enumerate(counts) for i in range(n)),
    ]
    return Layout(
        ids=_index([token for part in (*prompts, *inputs) for token in part], device)[None],
        positions=_index(positions, device)[None],
        predictors=_index(predictors, device),
        longest=max(sizes) + max(counts),
        rows=None if kernel else _rows(sizes, counts, prompt_of, device),
        spans=_spans(sizes, counts, prompt_of, device) if kernel else None,
    )


def _index(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.long).to(device, non_blocking=True)


def _rows(
    sizes: Sequence[int], counts: Sequence[int], prompt_of: Sequence[int], device: torch.device
) -> Rows:
    """Returns the stream in padded rows.

    `sizes`: tokens of each prompt. `counts`: inputs of each completion. `prompt_of`: the prompt of
    each completion.
    """
    starts = _starts([*sizes, *counts])
    width, depth = max(sizes), max(counts)
    seen = torch.arange(width) < torch.tensor([sizes[q] for q in prompt_of])[:, None]  # [B, P]
    # padded inputs see themselves, so no row of a softmax is empty
    causal = torch.ones(depth, depth, dtype=torch.bool).tril()
    mask = torch.cat(
        [seen[:, None].expand(-1, depth, -1), causal.expand(len(counts), -1, -1)], dim=-1
    )[:, None]
    prompt_index, prompt_places = _padded(starts[: len(sizes)], sizes, width)
    completion_index, completion_places = _padded(starts[len(sizes) :], counts, depth)
    return Rows(
        prompts=_index(prompt_index, device),
        prompt_places=_index(prompt_places, device),
        completions=_index(completion_index, device),
        completion_places=_index(completion_places, device),
        prompt_of=_index(prompt_of, device),
        mask=mask.to(device, non_blocking=True),
        num_prompts=len(sizes),
        num_completions=len(counts),
    )


def _spans(
    sizes: Sequence[int], counts: Sequence[int], prompt_of: Sequence[int], device: torch.device
) -> Spans:
    """Returns the stream as sequences of different lengths; the arguments are those of `_rows`.

    A completion without inputs (one token) has no queries and is left out.
    """
    starts = _starts([*sizes, *counts])
    keys = list(range(sum(sizes)))
    query_lengths, key_lengths = list(sizes), list(sizes)
    for completion, prompt in enumerate(prompt_of):
        count = counts[completion]
        if count:
            start = starts[len(sizes) + completion]
            keys += range(starts[prompt], starts[prompt] + sizes[prompt])
            keys += range(start, start + count)
            query_lengths.append(count)
            key_lengths.append(sizes[prompt] + count)
    return Spans(
        query_starts=_bounds(query_lengths, device),
        keys=_index(keys, device),
        key_starts=_bounds(key_lengths, device),
        num_queries=sum(query_lengths),
        max_queries=max(query_lengths),
        max_keys=max(key_lengths),
    )


def _bounds(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Returns [R + 1] int32: where each of R sequences starts, and where the last one ends."""
    return _index([*_starts(lengths), sum(lengths)], device).int()


def _starts(sizes: Sequence[int]) -> list[int]:
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    return starts[:-1]


def _padded(starts: Sequence[int], sizes: Sequence[int], width: int) -> tuple[list[int], list[int]]:
    """Returns the stream places of padded rows, and the places in the rows of what is not padding.

    A row is padded to `width` places, with 0.
    """
    index = [
        start + i if i < size else 0
        for start, size in zip(starts, sizes, strict=True)
        for i in range(width)
    ]
    places = [row * width + i for row, size in enumerate(sizes) for i in range(size)]
    return index, places


def _check_plain(
    module: nn.Module,
    longest: int,
    dropout: float,
    sliding_window: int | None,
    more: dict[str, Any],
) -> None:
    if (
        dropout
        or (sliding_window and sliding_window < longest)
        or more.get("softcap")
        or more.get("s_aux") is not None
    ):
        raise NotImplementedError(
            f"model.attention={NAME} is plain causal attention; use sdpa or eager for "
            f"{type(module).__name__}"
        )


def attend(
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
    """The attention interface of transformers.

    Query [1, Hq, N, D], key and value [1, Hkv, N, D] -> [1, N, Hq, D]. What is at the stream's end
    and in no row gets 0.
    """
    if packed.through is not None:
        more = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window}
        return packed.through(
            module, query, key, value, attention_mask, packed=packed, **kwargs | more
        )
    _check_plain(module, packed.longest, dropout, sliding_window, kwargs)
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # [N, H, D]
    out = (
        _attend_spans(q, k, v, packed.spans, scaling)
        if packed.spans is not None
        else _attend_padded(q, k, v, packed.rows, scaling)
    )
    return F.pad(out, (0, 0, 0, 0, 0, query.shape[2] - len(out)))[None], None


def _attend_spans(query: Tensor, key: Tensor, value: Tensor, spans: Spans, scale: float) -> Tensor:
    """Returns [num_queries, Hq, D] from query [N, Hq, D], key and value [N, Hkv, D]."""
    queries = query[: spans.num_queries]
    keys, values = key.index_select(0, spans.keys), value.index_select(0, spans.keys)
    out: Tensor = _varlen_attention()(
        queries,
        keys,
        values,
        spans.query_starts,
        spans.key_starts,
        spans.max_queries,
        spans.max_keys,
        scale=scale,
    )
    return out


@functools.cache
def _varlen_attention() -> Callable[..., Any]:
    """Returns PyTorch's variable-length FlashAttention, causal.

    The last query of a sequence attends to all of its keys.

    PyTorch 2.13 asks for `enable_gqa` where several query heads share a key head; 2.11 has no such
    argument and accepts them.
    """
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"window_size": (-1, 0)}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    return functools.partial(varlen_attn, **options)


def _attend_padded(q: Tensor, k: Tensor, v: Tensor, packed: Rows | None, scaling: float) -> Tensor:
    """Returns [prompt and completion tokens, Hq, D].

    Query is [N, Hq, D], key and value are [N, Hkv, D].
    """
    assert packed is not None

    def rows(states: Tensor, places: Tensor, count: int) -> Tensor:
        padded: Tensor = states.index_select(0, places).unflatten(0, (count, -1))
        return padded.transpose(1, 2)

    def flat(out: Tensor, places: Tensor) -> Tensor:
        return out.transpose(1, 2).flatten(0, 1).index_select(0, places)

    kp, vp = (rows(states, packed.prompts, packed.num_prompts) for states in (k, v))  # [Q, H, P, D]
    qp = rows(q, packed.prompts, packed.num_prompts)
    out = flat(
        F.scaled_dot_product_attention(qp, kp, vp, is_causal=True, scale=scaling, enable_gqa=True),
        packed.prompt_places,
    )
    if packed.completions.numel():
        # [B, H, C, D]
        qc, kc, vc = (
            rows(states, packed.completions, packed.num_completions) for states in (q, k, v)
        )
        kc = torch.cat([kp.index_select(0, packed.prompt_of), kc], dim=2)
        vc = torch.cat([vp.index_select(0, packed.prompt_of), vc], dim=2)
        own = F.scaled_dot_product_attention(
            qc, kc, vc, attn_mask=packed.mask, scale=scaling, enable_gqa=True
        )
        out = torch.cat([out, flat(own, packed.completion_places)])
    return out


def attend_rows(
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
    """The same for a stream of whole sequences one after another, as TRL's collator makes it.

    Each attends to itself alone.
    """
    _check_plain(module, int(max_length_q), dropout, sliding_window, kwargs)
    size = query.shape[-1]
    if value.shape[-1] == size and _kernel_takes(size, query.dtype, query.device):
        q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # [N, H, D]
        starts = cu_seq_lens_q.int()
        return _varlen_attention()(
            q, k, v, starts, starts, int(max_length_q), int(max_length_q), scale=scaling
        )[None], None
    starts, sizes = cu_seq_lens_q[:-1].long(), cu_seq_lens_q.diff()
    place = torch.arange(int(max_length_q), device=query.device)
    places = (starts[:, None] + place).clamp(max=query.shape[2] - 1).flatten()
    kept = (place < sizes[:, None]).flatten().nonzero()[:, 0]

    def rows(states: Tensor) -> Tensor:
        chosen = states[0].transpose(0, 1).index_select(0, places)
        padded: Tensor = chosen.unflatten(0, (len(sizes), -1))
        return padded.transpose(1, 2)

    out = F.scaled_dot_product_attention(
        rows(query), rows(key), rows(value), is_causal=True, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).flatten(0, 1).index_select(0, kept)[None], None


AttentionInterface.register(NAME, attend)
AttentionInterface.register(ROWS, attend_rows)
