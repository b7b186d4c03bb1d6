"""Soft targets from a teacher with another tokenizer: spans, common tokens, the loss, a run.

References are sums over small vocabularies and plain PyTorch in float64.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from tiny_models import make_tiny_with, merging_tokenizer, tiny_config
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from grpo.config import SoftTargetSettings
from grpo.learning import models
from grpo.learning.alignment import Alignment, TokenPair, read_tokens
from grpo.learning.batch import micro_batches, token_weights
from grpo.learning.divergence import CommonTokens, SpanStart, divergence, span_divergence
from grpo.learning.learner import Learner
from grpo.learning.policy import Reference
from grpo.losses.cross_entropy import loss
from grpo.types import Sample, UserError

TEXTS = [
    "Natalia sold 48/2 = 24 clips in May. She sold 48+24 = 72 clips altogether.",
    "<think>347+85: 7+5=12, 4+8+1=13, 3+0+1=4</think><answer>432</answer>",
    "Weng earns $12/60 = $0.2 per minute, so she earned 50 x 0.2 = $10.",
    "The price is 1234567 €, and the naïve answer is wrong: √2 ≈ 1.414.\n\n2 + 2 = 4",
]


@pytest.fixture(scope="module")
def qwen_like():
    return merging_tokenizer(TEXTS, vocabulary=400, digits=1, end="<|im_end|>", normalizer="NFC")


@pytest.fixture(scope="module")
def llama_like():
    return merging_tokenizer(TEXTS * 2 + ["123 456 789 100 200"], vocabulary=340, digits=3)


@pytest.fixture(scope="module")
def alignment(llama_like, qwen_like):
    """Returns the alignment of a student like Llama 3 with a teacher like Qwen."""
    return Alignment(
        student=read_tokens(llama_like, llama_like.eos_token_id),
        teacher=read_tokens(qwen_like, qwen_like.eos_token_id),
    )


def ends_of(tokens, ids):
    """Returns the positions, in bytes of the text, at which the tokens end."""
    return list(itertools.accumulate(len(tokens.bytes_of[token_id]) for token_id in ids))


@pytest.mark.parametrize("text", [*TEXTS, "", "Ünïcødé 漢字 🙂🙂 99999"])
def test_spans_end_where_tokens_of_both_end(alignment, text):
    ids = (*alignment.student.tokenizer(text)["input_ids"], alignment.student.end_id)
    result = alignment.teacher_text((5, 6), ids)
    assert result.prompt_ids == (5, 6)
    teacher_ids = alignment.teacher.tokenizer(text)["input_ids"]
    assert result.completion_ids == (*teacher_ids, alignment.teacher.end_id)
    *inner, last = result.spans
    assert last == (len(ids), len(result.completion_ids))
    student_ends = ends_of(alignment.student, ids[:-1])
    teacher_ends = ends_of(alignment.teacher, teacher_ids)
    assert [student_ends[student - 1] for student, _ in inner] == sorted(
        set(student_ends) & set(teacher_ends)
    )
    for student, teacher in inner:
        assert student_ends[student - 1] == teacher_ends[teacher - 1]
    assert student_ends[-1:] == ([len(text.encode())] if text else [])


def test_some_spans_have_several_tokens(alignment):
    # Numbers: up to three digits per token of the student, one per token of the teacher.
    ids = alignment.student.tokenizer("123 456")["input_ids"]
    result = alignment.teacher_text((), ids)
    assert len(result.completion_ids) > len(ids)
    assert any(
        end - start > 1
        for (_, start), (_, end) in zip([(0, 0), *result.spans], result.spans, strict=False)
    )


def test_common_tokens_have_the_same_bytes(alignment):
    pairs = alignment.common_tokens()
    assert pairs[-1] == TokenPair(alignment.student.end_id, alignment.teacher.end_id)
    for student, teacher in pairs[:-1]:
        assert alignment.student.bytes_of[student] == alignment.teacher.bytes_of[teacher] != b""
    assert len({pair.student for pair in pairs}) == len({pair.teacher for pair in pairs})
    assert len(pairs) > 256


def test_a_completion_that_was_cut_off_within_a_character_is_aligned_up_to_it(alignment):
    ids = alignment.student.tokenizer("24 clips €")["input_ids"]
    while alignment.student.bytes_of[ids[-1]][-1:] == "€".encode()[-1:]:
        ids = ids[:-1]
    ids = [*ids, alignment.student.tokenizer("€")["input_ids"][0]]
    content = b"".join(alignment.student.bytes_of[token_id] for token_id in ids)
    with pytest.raises(UnicodeDecodeError):
        content.decode()
    result = alignment.teacher_text((), ids)
    num_student, _ = result.spans[-1]
    aligned = b"".join(alignment.student.bytes_of[token_id] for token_id in ids[:num_student])
    assert aligned.decode() in ("24 clips", "24 clips ")


def test_spans_end_where_a_tokenizer_changes_the_text(alignment):
    # The teacher's normalization NFC joins the letter and its accent.
    ids = (*alignment.student.tokenizer("24 clips e\u0301 24")["input_ids"], 1)
    result = alignment.teacher_text((), ids)
    num_student, _ = result.spans[-1]
    content = b"".join(alignment.student.bytes_of[token_id] for token_id in ids[:num_student])
    assert content.startswith(b"24 clips")
    assert len(content) <= len("24 clips e")


def test_another_stop_token_also_ends_the_text(llama_like, alignment):
    pad_id = llama_like.pad_token_id
    student = read_tokens(llama_like, llama_like.eos_token_id, [pad_id])
    ids = llama_like("24 clips")["input_ids"]
    ended = replace(alignment, student=student).teacher_text((), (*ids, pad_id))
    assert ended == alignment.teacher_text((), (*ids, llama_like.eos_token_id))


def test_spans_end_with_the_context_of_the_teacher(alignment):
    ids = (*alignment.student.tokenizer(TEXTS[0])["input_ids"], alignment.student.end_id)
    complete = alignment.teacher_text((5, 6), ids)
    short = replace(alignment, max_teacher_tokens=12).teacher_text((5, 6), ids)
    assert 0 < len(short.completion_ids) <= 10
    assert short.spans == complete.spans[: len(short.spans)]
    assert short.completion_ids == complete.completion_ids[: short.spans[-1][1]]


def test_a_completion_without_any_span_has_one_token_that_is_not_compared(alignment):
    [first, *_] = alignment.student.tokenizer("€")["input_ids"]
    assert alignment.teacher_text((5,), [first]).spans == ()
    assert len(alignment.teacher_text((5,), [first]).completion_ids) == 1
    # It does not disturb the other rows of its batch.
    texts = [(first,), tuple(alignment.student.tokenizer("24 clips")["input_ids"])]
    samples = [
        Sample(
            token_ids=(5, *ids),
            prompt_length=1,
            advantages=(0.0,) * len(ids),
            teacher_text=alignment.teacher_text((5,), ids),
        )
        for ids in texts
    ]
    [batch] = micro_batches(samples, token_weights(samples, "token", 9), max_tokens=100)
    num_spans = len(samples[1].teacher_text.spans)
    assert len(batch.spans.student_starts) == num_spans
    assert batch.token_mask.sum() == len(batch.spans.student_spans)
    assert batch.teacher_batch.token_mask.sum() == len(batch.spans.teacher_spans)


def test_tokens_of_a_sentencepiece_model(tmp_path):
    vocabulary = {"<unk>": 0, "<0xE2>": 1, "<0x82>": 2, "<0xAC>": 3, "▁a": 4, "b": 5, "</s>": 6}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    tokens = read_tokens(fast, 6)
    assert tokens.bytes_of[1:6] == [b"\xe2", b"\x82", b"\xac", b" a", b"b"]


def test_the_space_that_llama_2_puts_before_a_text_is_not_part_of_it():
    vocabulary = {"<unk>": 0, "▁": 1, "a": 2, "b": 3, "▁a": 4, "</s>": 5}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocabulary, [("▁", "a")], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    student = models.character_tokenizer()
    alignment = Alignment(student=read_tokens(student, 1), teacher=read_tokens(fast, 5))
    result = alignment.teacher_text((), student("ab a")["input_ids"])
    assert result.completion_ids == (4, 3, 4)
    assert result.spans == ((1, 1), (2, 2), (4, 3))


def test_a_tokenizer_whose_tokens_have_no_bytes_raises():
    tokenizer = Tokenizer(tokenizer_models.WordLevel({"a": 0, "</s>": 1}, "a"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    with pytest.raises(UserError, match=r"do not state their bytes.*use grpo distill with way=seq"):
        read_tokens(fast, 1)


def test_golden_divergence_of_a_span():
    # The student has the tokens 0: "1", 1: "2", 2: "12", 3: "3", the teacher 0: "1", 1: "2",
    # 2: "3". Common are "1", "2" and "3". The span "12" is one token of the student and two of the
    # teacher, whose second one has the probability 0.9.
    student = torch.tensor([[0.2, 0.1, 0.6, 0.1]]).log()
    teacher = torch.tensor([[0.7, 0.1, 0.2]]).log()
    student_ids, teacher_ids = torch.tensor([0, 1, 3]), torch.tensor([0, 1, 2])
    value = span_divergence(
        SpanStart(
            student, torch.tensor([2]), torch.zeros(1), CommonTokens(student_ids, torch.tensor([2]))
        ),
        SpanStart(
            teacher,
            torch.tensor([0]),
            torch.tensor([math.log(0.9)]),
            CommonTokens(teacher_ids, torch.tensor([], dtype=torch.long)),
        ),
        "reverse_kl",
    )
    # Outcomes: the text "12", the tokens "2" and "3", and everything else. For the student, that is
    # the token "1"; for the teacher, "1" that is not followed by "2".
    s = [0.6, 0.1, 0.1, 0.2]
    t = [0.7 * 0.9, 0.1, 0.2, 0.7 * 0.1]
    expected = sum(p * math.log(p / q) for p, q in zip(s, t, strict=True))
    assert float(value) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_with_equal_vocabularies_it_is_the_divergence_of_all_tokens(kind):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(6, 30, generator=generator).requires_grad_()
    teacher = torch.randn(6, 30, generator=generator)
    first_ids = torch.randint(30, (6,), generator=generator)
    common = CommonTokens(torch.randperm(30), torch.tensor([], dtype=torch.long))
    rest = torch.zeros(6)
    value = span_divergence(
        SpanStart(student, first_ids, rest, common),
        SpanStart(teacher, first_ids, rest, common),
        kind,
    )
    expected = divergence(student, teacher, kind, 1.0)
    torch.testing.assert_close(value, expected)
    [gradient] = torch.autograd.grad(value.sum(), student)
    [expected_gradient] = torch.autograd.grad(expected.sum(), student)
    torch.testing.assert_close(gradient, expected_gradient)


def samples_of(alignment, weight):
    """Returns a sample per text; the teacher has prompts of its own."""
    samples = []
    for index, text in enumerate([*TEXTS, TEXTS[1]]):
        prompt_ids = tuple(range(10, 12 + index))
        ids = (*alignment.student.tokenizer(text)["input_ids"][:30], alignment.student.end_id)
        if index == 2:
            ids = ids[:-1]  # cut off
        samples.append(
            Sample(
                token_ids=(*prompt_ids, *ids),
                prompt_length=len(prompt_ids),
                advantages=(weight,) * len(ids),
                teacher_text=alignment.teacher_text((7,) * (9 - index), ids),
            )
        )
    return samples


def outcomes(logprobs, first, rest, pairs, own, skipped):
    """Returns the probabilities of the outcomes of one span, by the definition of the docstring."""
    probabilities = logprobs.exp()
    span = probabilities[first] * rest.exp()
    common = [probabilities[getattr(pair, own)] for pair in pairs if pair not in skipped]
    everything_else = 1 - span - sum(common)
    return torch.stack([span, *common, everything_else])


def plain_loss(student, teacher, samples, alignment, weight):
    """Returns the mean over tokens of the forward KL of spans, and of the cross-entropy."""
    pairs = alignment.common_tokens()
    total = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        text = sample.teacher_text
        ids = sample.token_ids[sample.prompt_length :]
        rows = student(input_ids=torch.tensor([sample.token_ids])).logits[0]
        rows = rows[sample.prompt_length - 1 : -1].log_softmax(-1)
        teacher_ids = text.completion_ids
        teacher_rows = teacher(input_ids=torch.tensor([(*text.prompt_ids, *teacher_ids)])).logits
        teacher_rows = teacher_rows[0, len(text.prompt_ids) - 1 : -1].log_softmax(-1).detach()
        for (s, t), (s_end, t_end) in zip([(0, 0), *text.spans], text.spans, strict=False):
            skipped = [pair for pair in pairs if pair[0] == ids[s] or pair[1] == teacher_ids[t]]
            zero = torch.zeros((), dtype=torch.float64)
            rest = sum((rows[i, ids[i]] for i in range(s + 1, s_end)), zero)
            teacher_rest = sum((teacher_rows[i, teacher_ids[i]] for i in range(t + 1, t_end)), zero)
            p = outcomes(rows[s], ids[s], rest, pairs, "student", skipped)
            q = outcomes(teacher_rows[t], teacher_ids[t], teacher_rest, pairs, "teacher", skipped)
            total = total + (q * (q / p).log()).sum()
        total = total - weight * sum(rows[i, token_id] for i, token_id in enumerate(ids))
    return total / sum(sample.completion_length for sample in samples)


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_loss_and_gradient_equal_plain_torch_in_float64_for_every_split(
    tmp_path, alignment, zero_stage
):
    weight = 0.3
    make_tiny_with(alignment.student.tokenizer, tmp_path / "student")
    make_tiny_with(alignment.teacher.tokenizer, tmp_path / "teacher", "tiny-qwen2", seed=1)
    samples = samples_of(alignment, weight)
    student = models.load_model(tmp_path / "student", "eager").double()
    teacher = models.load_model(tmp_path / "teacher", "eager").double()
    expected_loss = plain_loss(student, teacher, samples, alignment, weight)
    expected_loss.backward()
    gradients = [parameter.grad for parameter in student.parameters()]
    expected_norm = float(torch.nn.utils.get_total_norm(gradients))
    config = tiny_config(
        tmp_path / "run",
        tmp_path / "student",
        learner={"lr": 1e-12, "logits_chunk_tokens": 8, "zero_stage": zero_stage},
    )
    soft = SoftTargetSettings(updates=1, hard_weight=weight)
    for max_tokens, attention in ((1000, "packed"), (60, "packed"), (100, "eager")):
        reference = Reference(
            models.load_model(tmp_path / "teacher", attention), alignment.common_tokens()
        )
        policy = models.load_model(tmp_path / "student", attention)
        learner = Learner(policy, config, loss, {"": reference}, soft=soft)
        batches = micro_batches(
            samples,
            token_weights(samples, "token", 100),
            max_tokens=max_tokens,
            packed=attention == "packed",
        )
        assert (len(batches) > 1) == (max_tokens < 1000)
        report = learner.update(batches)
        assert report["loss"] == pytest.approx(float(expected_loss), rel=1e-4)
        assert report["policy/grad_norm"] == pytest.approx(expected_norm, rel=1e-4)
        learner.close()


def test_the_teacher_s_tokens_count_in_the_size_of_a_micro_batch(alignment):
    samples = samples_of(alignment, 1.0)
    long_prompt = replace(samples[0].teacher_text, prompt_ids=(7,) * 90)
    samples[0] = replace(samples[0], teacher_text=long_prompt)
    batches = micro_batches(samples, token_weights(samples, "token", 100), max_tokens=120)
    [alone] = [batch for batch in batches if 0 in batch.sample_indices]
    assert len(alone.sample_indices) == 1
