r"""Published sets that `hub` reads by their id alone: their columns and their peculiarities.

None of the sets has been loaded with this code. The entries follow the published formats: the cards
of the sets and the public loaders of other projects. If a set changes, `data.columns`, `data.split`
and `data.options` replace what is wrong here.

- OpenR1-Math-220k: its card. The traces of DeepSeek-R1 are in `generations`; `messages` has the
  question and one of them. Answers come from NuminaMath 1.5.
- DAPO-Math-17k: the card, and the script that made the processed set. Each of about 17,000 prompts
  is stored about 100 times, with an instruction before and after the question.
- DAPO-Math-17k-Processed: the same without the repetitions. Its column `solution` is the answer.
- DeepScaleR-Preview-Dataset: its card; a few rows have no answer.
- Big-Math-RL-Verified: its card.
- NuminaMath-1.5: its card. About a quarter of the rows are proofs, not valid, or have the answer
  "proof" or "notfound"; they are skipped, as in NeMo RL.
- orz_math_57k_collection: one JSON file; a row is a list of two messages, of which the second has
  `ground_truth`. `datasets` names the elements of such a row "0" and "1".
- Skywork-OR1-RL-Data: its card. The answer is a JSON list in a text, `'["42"]'`. Only the split
  `math`: the tests of the split `code` have a format that the reward `code` does not read.
- OpenThoughts-114k: its card. The traces have Sky-T1's tags, which become <think> tags. There is no
  gold answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import PurePath
from types import MappingProxyType
from typing import NamedTuple

# The answers of NuminaMath 1.5 to problems that have none, and of sets that were made from it.
NO_ANSWERS = ("", "proof", "notfound")
NO_VALUES: Mapping[str, str] = MappingProxyType({})
DAPO_INSTRUCTION = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n",
    '\n\nRemember to put your answer on its own line after "Answer:".',
)


class PublishedSet(NamedTuple):
    """How a published set is read.

    Attributes:
        source: the paper, or the project without one.
        license: the license on the set's card; None if it has not been looked up.
        columns: fields of a problem, and the set's columns for them. Other fields are not read.
        subset: the subset that is read by default.
        split: the split that is read by default.
        has_answer: whether the rows have a gold answer.
        json_answer: whether the answer is a JSON list as text. Its first element is the answer.
        instruction: what stands before and after each question, and is removed.
        required: rows with another value in one of these columns are skipped.
        excluded: rows with this value in one of these columns are skipped.
        ignored: columns that are not read, because they are large.
    """

    source: str
    license: str | None
    columns: Mapping[str, str]
    subset: str | None = None
    split: str = "train"
    has_answer: bool = True
    json_answer: bool = False
    instruction: tuple[str, str] = ("", "")
    required: Mapping[str, str] = NO_VALUES
    excluded: Mapping[str, str] = NO_VALUES
    ignored: tuple[str, ...] = ()


PUBLISHED_SETS: dict[str, PublishedSet] = {
    "open-r1/OpenR1-Math-220k": PublishedSet(
        source="https://github.com/huggingface/open-r1",
        license="Apache-2.0",
        subset="default",
        columns={
            "question": "problem",
            "answer": "answer",
            "solution": "messages",
            "id": "uuid",
            "source": "source",
        },
        ignored=("generations",),
    ),
    "BytedTsinghua-SIA/DAPO-Math-17k": PublishedSet(
        source="arXiv 2503.14476",
        license="Apache-2.0",
        columns={"question": "prompt", "answer": "reward_model.ground_truth"},
        instruction=DAPO_INSTRUCTION,
    ),
    "open-r1/DAPO-Math-17k-Processed": PublishedSet(
        source="arXiv 2503.14476",
        license=None,
        subset="all",
        columns={"question": "prompt", "answer": "solution"},
        instruction=DAPO_INSTRUCTION,
        ignored=("source_prompt",),
    ),
    "agentica-org/DeepScaleR-Preview-Dataset": PublishedSet(
        source="https://github.com/agentica-project/deepscaler",
        license="MIT",
        columns={"question": "problem", "answer": "answer", "solution": "solution"},
    ),
    "SynthLabsAI/Big-Math-RL-Verified": PublishedSet(
        source="arXiv 2502.17387",
        license="Apache-2.0",
        columns={"question": "problem", "answer": "answer", "source": "source"},
    ),
    "AI-MO/NuminaMath-1.5": PublishedSet(
        source="https://huggingface.co/datasets/AI-MO/NuminaMath-1.5",
        license="Apache-2.0",
        columns={
            "question": "problem",
            "answer": "answer",
            "solution": "solution",
            "source": "source",
        },
        required={"problem_is_valid": "Yes", "solution_is_valid": "Yes"},
        excluded={"question_type": "proof"},
    ),
    "Open-Reasoner-Zero/orz_math_57k_collection": PublishedSet(
        source="arXiv 2503.24290",
        license=None,
        columns={"question": "0.value", "answer": "1.ground_truth.value"},
    ),
    "Skywork/Skywork-OR1-RL-Data": PublishedSet(
        source="arXiv 2505.22312",
        license=None,
        split="math",
        columns={
            "question": "prompt",
            "answer": "reward_model.ground_truth",
            "source": "data_source",
        },
        json_answer=True,
    ),
    "open-thoughts/OpenThoughts-114k": PublishedSet(
        source="arXiv 2506.04178",
        license="Apache-2.0",
        subset="default",
        columns={"question": "conversations", "solution": "conversations"},
        has_answer=False,
    ),
}


def find_published_set(path: str) -> PublishedSet | None:
    """Returns the entry of a hub id, or of a local path that contains it; None if there is none.

    `/data/open-r1/OpenR1-Math-220k` and files in this folder are copies of that set.
    """
    parts = PurePath(path).parts
    for owner, name in pairwise(parts):
        published = PUBLISHED_SETS.get(f"{owner}/{name}")
        if published is not None:
            return published
    return None
