"""The data set `hub`: published and other sets, from the hub and from local files."""

import dataclasses
import datetime
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import datasets
import pytest
import yaml
from hub_server import serve_repositories
from published_sets import (
    TRACE,
    write_parquet,
    write_published_sets,
    write_readme,
)
from whole_runs import RANK_VARIABLES

from grpo import cli
from grpo import config as configs
from grpo.config import DataSettings
from grpo.data import hub
from grpo.data.common.published_sets import DAPO_INSTRUCTION, PUBLISHED_SETS, find_published_set
from grpo.stages.collect import _evaluation_sets
from grpo.stages.problems import load_problems
from grpo.stages.train import warm_start_config
from grpo.types import Problem, UserError

ROOT = Path(__file__).parents[2]
ROWS = [{"question": f"{number}?", "answer": str(number)} for number in range(6)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(path, split="train", *, test_fraction=0.0, **options):
    """Returns the problems of a local set, by default all of them."""
    return hub.load(split, seed=0, path=str(path), test_fraction=test_fraction, **options)


def load_rows(tmp_path, rows, **options):
    return load(write_jsonl(tmp_path / "set.jsonl", rows), **options)


def questions(problems):
    return [problem.question for problem in problems]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The folder of each published set, by its id."""
    return write_published_sets(tmp_path_factory.mktemp("published"))


# --- Published sets ---

EXPECTED = {
    "open-r1/OpenR1-Math-220k": [
        Problem(
            id="OpenR1-Math-220k/u1",
            question="1 and 1?",
            answer="2",
            source="olympiads",
            solution=TRACE,
        ),
        Problem(
            id="OpenR1-Math-220k/train/2",
            question="2 and 2?",
            answer="4",
            source="olympiads",
            solution=TRACE,
        ),
    ],
    "BytedTsinghua-SIA/DAPO-Math-17k": [
        Problem(
            id="DAPO-Math-17k/train/0", question="1 and 1?", answer="2", source="DAPO-Math-17k"
        ),
        Problem(
            id="DAPO-Math-17k/train/1", question="2 and 2?", answer="4", source="DAPO-Math-17k"
        ),
    ],
    "open-r1/DAPO-Math-17k-Processed": [
        Problem(
            id="DAPO-Math-17k-Processed/train/0",
            question="1 and 1?",
            answer="2",
            source="DAPO-Math-17k-Processed",
        ),
        Problem(
            id="DAPO-Math-17k-Processed/train/1",
            question="1 加 1?",
            answer="2",
            source="DAPO-Math-17k-Processed",
        ),
    ],
    "agentica-org/DeepScaleR-Preview-Dataset": [
        Problem(
            id="DeepScaleR-Preview-Dataset/train/0",
            question="1 and 1?",
            answer="2",
            source="DeepScaleR-Preview-Dataset",
            solution="Count.",
        ),
        Problem(
            id="DeepScaleR-Preview-Dataset/train/2",
            question="2 and 2?",
            answer="4",
            source="DeepScaleR-Preview-Dataset",
        ),
    ],
    "SynthLabsAI/Big-Math-RL-Verified": [
        Problem(id="Big-Math-RL-Verified/train/0", question="1 and 1?", answer="2", source="gsm8k"),
        Problem(
            id="Big-Math-RL-Verified/train/1", question="2 and 2?", answer="4", source="orca_math"
        ),
    ],
    "AI-MO/NuminaMath-1.5": [
        Problem(
            id="NuminaMath-1.5/train/0",
            question="1 and 1?",
            answer="2",
            source="cn_k12",
            solution="A solution.",
        ),
    ],
    "Open-Reasoner-Zero/orz_math_57k_collection": [
        Problem(
            id="orz_math_57k_collection/train/0",
            question="1 and 1?",
            answer="2",
            source="orz_math_57k_collection",
        ),
        Problem(
            id="orz_math_57k_collection/train/1",
            question="2 and 2?",
            answer="4",
            source="orz_math_57k_collection",
        ),
    ],
    "Skywork/Skywork-OR1-RL-Data": [
        Problem(
            id="Skywork-OR1-RL-Data/math/0", question="1 and 1?", answer="2", source="train-math"
        ),
        Problem(
            id="Skywork-OR1-RL-Data/math/1",
            question="A half?",
            answer="\\frac{1}{2}",
            source="train-math",
        ),
    ],
    "open-thoughts/OpenThoughts-114k": [
        Problem(
            id="OpenThoughts-114k/train/0",
            question="1 and 1?",
            answer="",
            source="OpenThoughts-114k",
            solution="<think>\n\n1 and 1 is 2.\n\n</think>\n\n\n\nIt is 2.",
        ),
    ],
}


@pytest.mark.parametrize("name", PUBLISHED_SETS)
def test_a_published_set_needs_only_its_id(published, name):
    fraction = None if name == "open-thoughts/OpenThoughts-114k" else 0.0
    problems = load(published[name], test_fraction=fraction)
    assert [dataclasses.replace(problem, meta={}) for problem in problems] == EXPECTED[name]


def test_the_meta_of_published_sets_has_what_rewards_and_curricula_need(published):
    (openr1, _) = load(published["open-r1/OpenR1-Math-220k"])
    assert "generations" not in openr1.meta
    assert "messages" not in openr1.meta
    assert openr1.meta["problem_type"] == "Algebra"
    (big_math, _) = load(published["SynthLabsAI/Big-Math-RL-Verified"])
    assert big_math.meta == {
        "domain": ["Mathematics -> Arithmetic"],
        "llama8b_solve_rate": 0.75,
    }
    (dapo, _) = load(published["BytedTsinghua-SIA/DAPO-Math-17k"])
    assert dapo.meta.keys() == {"data_source", "ability", "extra_info"}


def test_skipped_rows_are_counted(published, caplog):
    load(published["AI-MO/NuminaMath-1.5"])
    assert (
        "skipped rows: 3 (no answer), 1 (problem_is_valid is not Yes), 1 (question_type is proof), "
        "1 (solution_is_valid is not Yes)"
    ) in caplog.text
    load(published["BytedTsinghua-SIA/DAPO-Math-17k"])
    assert "skipped rows: 4 (repeated)" in caplog.text


def test_the_instruction_of_dapo_is_kept_on_request(published):
    (problem, _) = load(published["BytedTsinghua-SIA/DAPO-Math-17k"], keep_instruction=True)
    assert problem.question == "1 and 1?".join(DAPO_INSTRUCTION)


def test_the_keys_of_the_user_replace_those_of_a_published_set(published):
    folder = published["open-r1/OpenR1-Math-220k"]
    problems = load(folder, columns={"solution": "solution", "id": None})
    assert [problem.solution for problem in problems] == ["A human's solution."] * 2
    assert problems[0].id == "OpenR1-Math-220k/train/0"
    assert questions(load(folder, subset="extended")) == ["3 and 3?"]
    processed = published["open-r1/DAPO-Math-17k-Processed"]
    assert questions(load(processed, subset="en")) == ["1 and 1?"]


def test_a_column_with_answers_can_be_given_to_a_set_that_has_none(tmp_path):
    folder = tmp_path / "open-thoughts" / "OpenThoughts-114k"
    folder.mkdir(parents=True)
    messages = [{"from": "user", "value": "2+2?"}, {"from": "assistant", "value": TRACE}]
    path = write_jsonl(folder / "rows.jsonl", [{"conversations": messages, "gold": "4"}])
    (problem,) = load(path, columns={"answer": "gold"})
    assert problem.answer == "4"
    (problem,) = load(path, test_fraction=None)
    assert problem.answer == ""
    assert problem.meta == {"gold": "4"}
    with pytest.raises(UserError, match=r"answers: false contradicts data\.columns\.answer=gold"):
        load(path, columns={"answer": "gold"}, answers=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_split": "train"}, "is also the split of the training"),
        ({"columns": {"question": "text", "answer": "text"}}, "the same column 'text'"),
        ({"columns": {"question": "text", "solution": "text"}}, "the same column 'text'"),
        ({"subset": "main"}, "no subset and no revision"),
    ],
)
def test_options_that_would_leak_or_have_no_effect_are_errors(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        load_rows(tmp_path, [{"text": "2+2?", "answer": "4"}], **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_missing_number_is_no_answer(tmp_path, value):
    rows = [{"question": "a", "answer": value}, {"question": "b", "answer": 1.5}]
    with pytest.raises(UserError, match="line 1: field 'answer' is empty"):
        load_rows(tmp_path, rows)
    malformed = []
    (problem,) = load_rows(tmp_path, rows, malformed=malformed)
    assert problem.answer == "1.5"
    with pytest.raises(UserError, match=r"1 rows were dropped: .*field 'answer' is empty"):
        load_rows(tmp_path, rows[:1], malformed=malformed[:0])


def test_a_repeated_question_with_another_answer_is_counted(tmp_path, caplog):
    rows = [{"question": "a", "answer": answer} for answer in ("1", "2", "1")]
    (problem,) = load_rows(tmp_path, rows)
    assert problem.answer == "1"
    assert "1 (repeated), 1 (repeated with another answer)" in caplog.text


def test_a_label_is_read_by_its_name(tmp_path):
    label = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"question": datasets.Value("string"), "answer": label})
    table = datasets.Dataset.from_dict({"question": ["a"], "answer": [1]}, features=features)
    table.to_parquet(str(tmp_path / "a.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    for path in (tmp_path / "a.parquet", tmp_path / "saved"):
        assert [problem.answer for problem in load(path)] == ["yes"]


def test_files_without_rows_and_files_that_cannot_be_read(tmp_path):
    empty = datasets.Dataset.from_dict({"question": ["a"], "answer": ["1"]}).select([])
    empty.to_parquet(str(tmp_path / "empty.parquet"))
    (tmp_path / "empty.csv").write_text("question,answer\n")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "bom.json").write_text('\ufeff[{"question": "a", "answer": 1}]')
    for name in ("empty.parquet", "empty.csv"):
        with pytest.raises(UserError, match="Its split train has no row with a problem"):
            load(tmp_path / name)
    with pytest.raises(UserError, match=r"deep\.json: not a readable JSON file"):
        load(tmp_path / "deep.json")
    assert questions(load(tmp_path / "bom.json")) == ["a"]
    with pytest.raises(UserError, match=r"cannot be read: OSError: .*too long"):
        load("x" * 300)


def test_a_folder_whose_name_is_a_pattern_is_an_error(tmp_path):
    for name in ("a*c", "a[b]c", "a::b"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "train.jsonl", ROWS)
        with pytest.raises(UserError, match=r"as a pattern\. Rename it"):
            load(tmp_path / name)


def test_files_of_a_folder_that_are_not_read_are_named(tmp_path, caplog):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "b.csv").write_text("question,answer\na,1\n")
    assert len(load(tmp_path)) == len(ROWS)
    assert "not read, by the rules of `datasets`: b.csv" in caplog.text


def test_a_split_of_another_format_is_an_error(published):
    folder = published["Skywork/Skywork-OR1-RL-Data"]
    with pytest.raises(UserError, match=r"row 1: the answer '\{\"entry_point\".* is no JSON list"):
        load(folder, stored_split="code")


def test_proofs_are_prompts_without_answers(published):
    problems = load(published["open-r1/OpenR1-Math-220k"], test_fraction=None, answers=False)
    assert questions(problems) == ["1 and 1?", "Prove it.", "2 and 2?"]


def test_a_file_of_a_published_set_is_recognized_by_its_path(published):
    folder = published["Skywork/Skywork-OR1-RL-Data"]
    problems = load(folder / "data" / "math-00000-of-00001.parquet")
    assert [problem.answer for problem in problems] == ["2", "\\frac{1}{2}"]
    assert find_published_set("/data/Skywork-OR1-RL-Data") is None


# --- The hub ---

LOAD_SCRIPT = """
import dataclasses, json, sys
from grpo.data import hub
from grpo.types import UserError
for arguments in json.loads(sys.argv[1]):
    try:
        problems = hub.load("train", seed=0, **arguments)
        print(json.dumps([dataclasses.asdict(problem) for problem in problems]))
    except UserError as error:
        print(json.dumps(f"{type(error).__name__}: {error}"))
"""


def load_in_process(arguments, folder, **variables):
    """Returns problems as dicts, or the message of an error, for each call of `load`.

    huggingface_hub reads the address of the hub when it is imported.
    """
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    python_path = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    environment |= {"PYTHONPATH": python_path, "HF_HOME": str(folder / "hf"), **variables}
    process = subprocess.run(
        [sys.executable, "-c", LOAD_SCRIPT, json.dumps(arguments)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


def test_published_sets_are_the_same_from_the_hub_and_then_from_its_cache(published, tmp_path):
    arguments = [{"path": name} for name in PUBLISHED_SETS]
    local = []
    for folder in published.values():
        problems = hub.load("train", seed=0, path=str(folder))
        local.append([dataclasses.asdict(problem) for problem in problems])
    with serve_repositories(published) as server:
        online = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"}
        assert load_in_process(arguments, tmp_path, **online) == local
        num_bytes_sent = server.num_bytes_sent
        assert num_bytes_sent > 0
        assert load_in_process(arguments, tmp_path, HF_HUB_OFFLINE="1") == local
        assert server.num_bytes_sent == num_bytes_sent


def test_max_rows_streams_the_first_rows_only(tmp_path):
    folder = tmp_path / "set"
    for shard in range(10):
        rows = []
        for number in range(100):
            random = Random(100 * shard + number)
            rows.append({"question": f"{shard}-{number}? {random.random()}", "answer": "1"})
        write_parquet(folder / f"train-{shard:05}-of-00010.parquet", rows)
    size = sum(file.stat().st_size for file in folder.iterdir())
    arguments = [{"path": "owner/set", "max_rows": 3, "test_fraction": 0}]
    with serve_repositories({"owner/set": folder}) as server:
        online = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"}
        (problems,) = load_in_process(arguments, tmp_path, **online)
        numbers = [problem["question"].partition("?")[0] for problem in problems]
        assert numbers == ["0-0", "0-1", "0-2"]
        assert 0 < server.num_bytes_sent < size / 2


def test_a_set_that_the_hub_does_not_have_is_an_error_with_the_way_out(published, tmp_path):
    arguments = [
        {"path": "open-r1/OpenR1-Math-22k"},
        {"path": "owner/gated"},
        {"path": "open-r1/OpenR1-Math-220k", "subset": "defualt"},
        {"path": "open-r1/OpenR1-Math-220k", "stored_split": "test"},
    ]
    with serve_repositories(published) as server:
        online = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"}
        missing, gated, subset, split = load_in_process(arguments, tmp_path, **online)
    assert "is no local file or folder, and the hub has no data set of this name" in missing
    assert "(did you mean open-r1/OpenR1-Math-220k?)" in missing
    assert "https://huggingface.co/datasets/owner/gated" in gated
    assert "no subset 'defualt' (did you mean default?). Available: default, extended" in subset
    assert "no split 'test'. Available: train" in split


def test_an_unreachable_hub_is_an_error_of_one_line(tmp_path):
    (message,) = load_in_process([{"path": "owner/set"}], tmp_path, HF_HUB_OFFLINE="1")
    expected = (
        "DownloadError: data.path: owner/set is no local file or folder, and cannot be fetched"
    )
    assert message.startswith(expected)
    assert "\n" not in message


# --- Files and folders ---


def test_a_local_path_wins_over_the_hub(tmp_path, monkeypatch):
    (tmp_path / "owner" / "set").mkdir(parents=True)
    write_jsonl(tmp_path / "owner" / "set" / "train.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    assert questions(load("owner/set")) == [row["question"] for row in ROWS]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "csv"])
def test_every_format_gives_the_same_problems(tmp_path, suffix):
    path = tmp_path / f"set.{suffix}"
    rows = [{**row, "solution": "So.", "level": "7"} for row in ROWS]
    if suffix == "jsonl":
        write_jsonl(path, rows)
    elif suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "parquet":
        write_parquet(path, rows)
    else:
        datasets.Dataset.from_list(rows).to_csv(path)
    problems = load(path)
    assert problems[5] == Problem(
        id="set/train/5",
        question="5?",
        answer="5",
        source="set",
        solution="So.",
        meta={"level": "7"},
    )
    assert len(problems) == 6


def test_cells_of_csv_are_text_and_may_have_commas_and_line_breaks(tmp_path):
    path = tmp_path / "set.csv"
    path.write_text('\ufeffquestion,answer,solution\n"1, 2\nor 3?",1.50,\n\n"4?",007,"So, 7"\n')
    first, second = load(path)
    assert (first.question, first.answer, first.solution) == ("1, 2\nor 3?", "1.50", None)
    assert (second.answer, second.solution) == ("007", "So, 7")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("question,answer\n1?,1,2\n", "row 1: 3 cells, expected 2: question, answer"),
        ("question,question\n1?,1\n", "two columns have the same name"),
        ('question,answer\n"1?,1\n', "not a readable CSV file"),
        ("", "has no train problems"),
        ("question,answer\n", "has no train problems"),
    ],
)
def test_an_invalid_csv_file_is_an_error(tmp_path, content, message):
    path = tmp_path / "set.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load(path)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_shards_are_read_in_the_order_of_their_names(tmp_path, suffix):
    for shard in (2, 0, 1):
        rows = ROWS[2 * shard : 2 * shard + 2]
        path = tmp_path / f"train-0000{shard}-of-00003.{suffix}"
        write_parquet(path, rows) if suffix == "parquet" else write_jsonl(path, rows)
    write_jsonl(tmp_path / f"test-00000-of-00001.{suffix}", [])
    (tmp_path / "notes.txt").write_text("no data")
    problems = load(tmp_path)
    assert questions(problems) == [row["question"] for row in ROWS]
    assert [problem.id.rpartition("/")[2] for problem in problems] == list("012345")


def test_folders_of_save_to_disk_are_read(tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    splits = datasets.DatasetDict({"train": table.select(range(4)), "dev": table.select([4, 5])})
    splits.save_to_disk(tmp_path / "several")
    assert len(load(tmp_path / "one")) == 6
    assert len(load(tmp_path / "several")) == 4
    held_out = load(tmp_path / "several", "test", test_split="dev")
    assert questions(held_out) == ["4?", "5?"]
    with pytest.raises(UserError, match=r"no split 'test'\. Available: train, dev"):
        load(tmp_path / "several", stored_split="test")


def test_a_split_or_subset_that_does_not_exist_names_those_there_are(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "validation.jsonl", ROWS)
    message = r"data\.split: .* no split 'valdiation' \(did you mean validation\?\)\. Available: "
    with pytest.raises(UserError, match=message + "train, validation"):
        load(tmp_path, stored_split="valdiation")
    with pytest.raises(UserError, match=r"no split 'test'\. Available: train, validation"):
        load(tmp_path, "test", test_split="test")
    with pytest.raises(UserError, match=r"no split 'test'\. Available: train"):
        load(tmp_path / "train.jsonl", stored_split="test")
    with pytest.raises(UserError, match=r"no subset 'main'\. Available: default"):
        load(tmp_path, subset="main")


def test_a_set_with_several_subsets_needs_the_name_of_one(tmp_path):
    write_readme(tmp_path, {"easy": {"train": "easy.jsonl"}, "hard": {"train": "hard.jsonl"}})
    write_jsonl(tmp_path / "easy.jsonl", ROWS[:1])
    write_jsonl(tmp_path / "hard.jsonl", ROWS[1:])
    with pytest.raises(UserError, match=r"has several subsets\. Set one of easy, hard"):
        load(tmp_path)
    (problem,) = load(tmp_path, subset="easy")
    assert problem.id == f"{tmp_path.name}/easy/train/0"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.jsonl", r"no such file or folder: nowhere\.jsonl\. A set on the hub is named"),
        ("empty", "cannot be read: .*contain any data files"),
        ("set.txt", r"set\.txt has an unsupported format\. Supported: \.jsonl, \.json, \.parquet"),
        ("broken.parquet", "not a readable parquet file"),
        ("broken.jsonl", r"broken\.jsonl: line 2: not JSON"),
        ("state", "cannot be read"),
    ],
)
def test_a_path_that_cannot_be_read_is_an_error(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "state.json").write_text("{}")
    (tmp_path / "set.txt").write_text("1?")
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    (tmp_path / "broken.jsonl").write_text('{"question": "1?", "answer": "1"}\n{"question": \n')
    with pytest.raises(UserError, match=message) as error_info:
        load(path)
    assert "\n" not in str(error_info.value)


def test_max_rows_of_a_file_reads_no_further(tmp_path):
    path = tmp_path / "set.jsonl"
    write_jsonl(path, ROWS)
    with path.open("a") as file:
        file.write('{"question": "no answer?"}\n')
    assert len(load(path, max_rows=6)) == 6
    with pytest.raises(UserError, match="line 7: no column 'answer'"):
        load(path, max_rows=7)
    with pytest.raises(UserError, match=r"data\.hub\.max_rows: got 0"):
        load(path, max_rows=0)


# --- Columns ---

NESTED = {
    "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "1 and 1?"}],
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra": {"uid": "a7", "origin": "mine", "level": 3},
    "texts": ["first", "second"],
}


def test_dotted_paths_lead_into_nested_values(tmp_path):
    columns = {
        "question": "texts.1",
        "answer": "reward_model.ground_truth",
        "solution": "prompt.0.content",
        "id": "extra.uid",
        "source": "extra.origin",
    }
    (problem,) = load_rows(tmp_path, [NESTED], columns=columns)
    assert problem == Problem(
        id="set/a7",
        question="second",
        answer="2",
        source="mine",
        solution="Think.",
        meta={"extra": NESTED["extra"]},
    )


def test_the_format_of_verl_needs_no_columns(tmp_path):
    (problem,) = load_rows(tmp_path, [NESTED])
    assert (problem.question, problem.answer) == ("1 and 1?", "2")


def test_a_column_with_a_dot_in_its_name_is_not_a_path(tmp_path):
    row = {"a.b": "1?", "a": {"b": "2?"}, "answer": "1"}
    (problem,) = load_rows(tmp_path, [row], columns={"question": "a.b"})
    assert problem.question == "1?"
    assert problem.meta == {}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"answer": "anwser"},
            "line 1: data.columns.answer=anwser: no column 'anwser' (did you mean answer?). "
            "The row has the columns problem, answer, extra.",
        ),
        (
            {"answer": "extra.ground_thruth"},
            "extra has no 'ground_thruth' (did you mean ground_truth?). "
            "It has ground_truth, messages.",
        ),
        ({"answer": "extra.messages.2"}, "extra.messages has no '2'. It has 0."),
        ({"answer": "problem.x"}, "problem has no 'x'. It has nothing, it is a str."),
        ({"answer": "extra"}, "field 'extra' is a dict, expected text or a number"),
        ({"answer": None}, "no column 'answer' or 'final_answer'"),
        ({"question": None}, "no column 'problem' or 'question' or 'prompt'"),
        ({"solution": "solutoin"}, "data.columns.solution=solutoin: no column 'solutoin'"),
        ({"id": "uuid"}, "data.columns.id=uuid: no column 'uuid'"),
    ],
)
def test_a_wrong_column_names_those_there_are(tmp_path, columns, message):
    row = {
        "problem": "1?",
        "answer": "1",
        "extra": {"ground_truth": "1", "messages": [{"role": "user", "content": "1?"}]},
    }
    with pytest.raises(UserError, match=re.escape(message)) as error_info:
        load_rows(tmp_path, [row], columns=columns)
    assert "\n" not in str(error_info.value)


def test_a_set_without_answers_says_how_to_train_on_it(tmp_path):
    rows = [{"question": "Write.", "solution": "Text."}, {"question": "Sing.", "solution": None}]
    with pytest.raises(UserError, match=r"or set data\.options=\{answers: false\}"):
        load_rows(tmp_path, rows)
    path = tmp_path / "set.jsonl"
    problems = load(path, test_fraction=None, answers=False)
    assert [(problem.answer, problem.solution) for problem in problems] == [
        ("", "Text."),
        ("", None),
    ]
    with pytest.raises(UserError, match=r"no test problems\. It has no gold answers.*eval\.data"):
        load(path, "test", test_fraction=None, answers=False)
    with pytest.raises(UserError, match="need gold answers"):
        load(path, "test", test_split="dev", test_fraction=None, answers=False)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(4, "4"), (0, "0"), (4.5, "4.5"), (" x ", "x"), (["7"], "7"), ("[1, 2]", "[1, 2]")],
)
def test_answers_may_be_numbers_or_lists_of_one(tmp_path, answer, expected):
    (problem,) = load_rows(tmp_path, [{"question": "1?", "answer": answer}])
    assert problem.answer == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "1?", "answer": None}, "line 2: field 'answer' is empty"),
        ({"question": "1?", "answer": " "}, "line 2: field 'answer' is empty"),
        ({"question": "1?", "answer": True}, "line 2: field 'answer' is a bool"),
        ({"question": "1?", "answer": ["1", "2"]}, "line 2: field 'answer' is a list"),
        ({"question": "", "answer": "1"}, "line 2: field 'question' is empty"),
        ({"question": {"text": "1?"}, "answer": "1"}, "line 2: field 'question' is a dict"),
        ({"question": "1?", "answer": "1", "solution": ["So."]}, "field 'solution' is a list"),
        ("text", "line 2: got a str, expected an object"),
    ],
)
def test_a_malformed_row_is_an_error_or_is_dropped(tmp_path, row, message):
    rows = [ROWS[0], row, ROWS[2]]
    with pytest.raises(UserError, match=message):
        load_rows(tmp_path, rows)
    reasons = []
    problems = load_rows(tmp_path, rows, malformed=reasons)
    assert questions(problems) == ["0?", "2?"]
    assert len(reasons) == 1
    assert message.removeprefix("line 2: ") in reasons[0]


def test_the_share_of_malformed_rows_is_limited(tmp_path):
    rows = [*ROWS, *[{"question": "1?", "answer": None}] * 20]
    path = write_jsonl(tmp_path / "set.jsonl", rows)
    data = DataSettings(name="hub", path=path, malformed="drop", options={"test_fraction": 0})
    with pytest.raises(UserError, match=r"data\.hub: dropped 20 of 26 problems"):
        load_problems(data, "train", 0)
    lines = []
    more = data.model_copy(update={"max_dropped": 0.5})
    assert len(load_problems(more, "train", 0, say=lines.append)["hub"]) == 6
    assert "dropped 20 of 26 problems" in lines[0]


def test_repeated_rows_are_read_once_but_other_solutions_are_kept(tmp_path, caplog):
    rows = [
        {"question": "1?", "answer": "1", "solution": "a"},
        {"question": "1?", "answer": "1", "solution": "b"},
        {"question": "1?", "answer": "1", "solution": "a", "id": "again"},
    ]
    problems = load_rows(tmp_path, rows)
    assert [problem.solution for problem in problems] == ["a", "b"]
    assert "skipped rows: 1 (repeated)" in caplog.text


def test_an_id_that_appears_twice_says_how_to_number_the_rows(tmp_path):
    rows = [{"id": 1, **row} for row in ROWS]
    with pytest.raises(UserError, match=r"id 'set/1' appears twice\. Set columns: \{id: null\}"):
        load_rows(tmp_path, rows)
    assert len(load_rows(tmp_path, rows, columns={"id": None})) == 6


def test_the_meta_can_be_stored_as_json(tmp_path):
    row = {
        "question": "1?",
        "answer": "1",
        "when": datetime.datetime(2024, 1, 2, 3, 4),
        "days": [datetime.date(2024, 1, 2)],
        "data": b"\x00",
        "nested": {"levels": [1, None]},
    }
    write_parquet(tmp_path / "set.parquet", [row])
    (problem,) = load(tmp_path / "set.parquet")
    assert json.loads(json.dumps(problem.meta)) == {
        "when": "2024-01-02T03:04:00",
        "days": ["2024-01-02"],
        "data": None,
        "nested": {"levels": [1, None]},
    }


def test_thoughts_in_a_field_of_a_message_become_tags(tmp_path):
    messages = [
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "It is 1.", "reasoning_content": "One."},
    ]
    columns = {"question": "messages", "solution": "messages"}
    (problem,) = load_rows(tmp_path, [{"messages": messages, "answer": "1"}], columns=columns)
    assert problem.question == "1?"
    assert problem.solution == "<think>\nOne.\n</think>\nIt is 1."


# --- Splits ---


def test_train_and_test_are_disjoint_and_do_not_depend_on_seed_or_order(tmp_path):
    rows = [{"question": f"{number}?", "answer": "1"} for number in range(1000)]
    path = write_jsonl(tmp_path / "set.jsonl", rows)
    train = questions(hub.load("train", seed=0, path=path))
    test = questions(hub.load("test", seed=0, path=path))
    assert sorted(train + test) == sorted(row["question"] for row in rows)
    assert 70 < len(test) < 130
    assert train == sorted(train, key=lambda text: int(text[:-1]))
    assert questions(hub.load("test", seed=5, path=path)) == test
    backwards = write_jsonl(tmp_path / "backwards.jsonl", rows[::-1])
    assert questions(hub.load("test", seed=0, path=backwards)) == test[::-1]


def test_test_fraction_and_the_split_test(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "test.jsonl", [{"question": "held out?", "answer": "1"}])
    assert questions(load(tmp_path, "test", test_split="test")) == ["held out?"]
    assert len(load(tmp_path, test_split="test")) == 6
    assert len(load(tmp_path, "test", test_fraction=1)) == 6
    for_evaluation = hub.load("test", seed=0, path=str(tmp_path), stored_split="test")
    assert questions(for_evaluation) == ["held out?"]
    with pytest.raises(UserError, match="All are held out for evaluation"):
        hub.load("train", seed=0, path=str(tmp_path), stored_split="test")
    with pytest.raises(UserError, match=r"no test problems\. Set data\.options\.test_split"):
        load(tmp_path, "test", test_fraction=0)
    with pytest.raises(UserError, match=r"test_fraction: got 1.5, expected a share from 0 to 1"):
        load(tmp_path, test_fraction=1.5)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"max_rows": "ten"}, "data.hub.max_rows: got 'ten', expected an integer from 1"),
        ({"test_fraction": "half"}, "data.hub.test_fraction: got 'half', expected a share from 0"),
        ({"test_fraction": True}, "data.hub.test_fraction: got True, expected a share"),
        ({"answers": "no"}, "data.hub.answers: got 'no', expected true or false"),
        ({"subset": 2024}, "data.hub.subset: got 2024, expected text"),
    ],
)
def test_an_option_of_another_type_is_an_error(tmp_path, option, message):
    with pytest.raises(UserError, match=message):
        load_rows(tmp_path, ROWS, **option)


# --- Configs ---


def data_settings(section):
    """Returns the section `data` of a train config. Raises UserError as for a config file."""
    tree = configs.read_yaml(str(ROOT / "configs/tiny.yaml"))
    return configs.parse({**tree, "data": section}).data


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"name": "gsm8k", "split": "train"},
            "data.split: the data set gsm8k cannot use it; hub can. Remove it.",
        ),
        (
            {"mixture": {"mine": {"name": "arithmetic", "columns": {"answer": "a"}}}},
            "data.mixture.mine.columns: the data set arithmetic cannot use it; hub can",
        ),
        (
            {"name": "gsm8k", "malformed": "drop"},
            "the data set gsm8k cannot drop rows; hub, jsonl and traces can",
        ),
        ({"name": "hub"}, "data.path: missing. Set it to OWNER/NAME on the hub"),
        (
            {"name": "hub", "path": "x.jsonl", "options": {"test_spilt": "test"}},
            "data.hub.options: got an unexpected keyword argument 'test_spilt'",
        ),
        ({"mixture": {"hub": {}}, "split": "train"}, "split has no effect with mixture"),
        ({"mixture": {"hub": {}}, "columns": {"id": "a"}}, "columns has no effect with mixture"),
        ({"name": "hub", "columns": {"anwser": "a"}}, "data.columns.anwser"),
        ({"name": "hub", "colums": {}}, "data.colums: unknown key (did you mean columns?)"),
    ],
)
def test_a_wrong_key_is_an_error_that_names_it(section, message):
    with pytest.raises(UserError, match=re.escape(message)) as error_info:
        load_problems(data_settings(section), "train", 0)
    assert "\n" not in str(error_info.value)


def test_a_mixture_contains_hub_several_times(published, tmp_path):
    mine = write_jsonl(tmp_path / "mine.jsonl", [{"text": "1?", "label": 1}])
    settings = {
        "dapo": {"name": "hub", "path": str(published["BytedTsinghua-SIA/DAPO-Math-17k"])},
        "mine": {
            "name": "hub",
            "path": mine,
            "columns": {"question": "text", "answer": "label"},
            "options": {"test_fraction": 0},
        },
    }
    problems = load_problems(data_settings({"mixture": settings}), "train", 0)
    assert questions(problems["mine"]) == ["1?"]
    assert problems["mine"][0].id == "mine/mine/train/0"
    assert set(questions(problems["dapo"])) <= {"1 and 1?", "2 and 2?"}


def test_a_function_of_the_user_receives_split_and_columns(tmp_path, monkeypatch):
    (tmp_path / "my_sets.py").write_text(
        "from grpo.types import Problem\n"
        "def load(split, *, seed, path=None, stored_split=None, columns=None):\n"
        "    return [Problem(id='1', question=f'{stored_split} {columns}', answer='', source='')]\n"
    )
    section = {
        "name": f"{tmp_path}/my_sets.py:load",
        "split": "dev",
        "columns": {"question": "text"},
    }
    ((problem,),) = load_problems(data_settings(section), "train", 0).values()
    assert problem.question == "dev {'question': 'text'}"


def test_the_id_of_a_set_is_not_the_folder_of_other_sets():
    collect = configs.read_yaml(str(ROOT / "configs/tiny_collect.yaml"))
    collect["data"] = {"name": "hub", "path": "owner/set"}
    collect["collect"] = {**collect["collect"], "decontaminate": {"math": {}}}
    config = configs.parse(collect, kind=configs.CollectConfig)
    assert _evaluation_sets(config).data_sets["math"].path is None
    train = configs.read_yaml(str(ROOT / "configs/gsm8k_smollm2.yaml"))
    train["data"] = {"name": "hub", "path": "owner/set"}
    train["model"]["warm_start"] = str(ROOT / "configs/gsm8k_smollm2_sft.yaml")
    assert warm_start_config(configs.parse(train)).data.path is None


def test_the_dry_run_and_doctor_read_a_local_copy(published, tiny, tmp_path, capsys):
    data = f"data={{name: hub, path: {published['AI-MO/NuminaMath-1.5']}, options: OPTIONS}}"
    dry_run_data = data.replace("OPTIONS", "{test_fraction: 0}")
    config = str(ROOT / "configs/gsm8k_smollm2.yaml")
    arguments = ["train", config, "--dry-run", dry_run_data, "eval.every=0"]
    assert cli.main([*arguments, f"model={{path: {tiny()}}}", f"run_dir={tmp_path}/run"]) == 0
    assert "1 and 1?" in capsys.readouterr().out
    misspelled = dry_run_data.replace("test_fraction: 0", "max_row: 1")
    assert cli.main([*arguments[:3], misspelled, f"run_dir={tmp_path}/run"]) == 2
    assert "data.hub.options: got an unexpected keyword argument 'max_row'" in (
        capsys.readouterr().err
    )
    # The same problems for training and for evaluation.
    held_out = data.replace("OPTIONS", "{test_fraction: 1}")
    arguments = ["doctor", str(ROOT / "configs/tiny.yaml"), "--no-sample", dry_run_data]
    arguments.append(f"eval.{held_out}")
    assert cli.main([*arguments, f"model={{path: {tiny()}}}", f"run_dir={tmp_path}/run"]) == 0
    output = capsys.readouterr().out
    assert "1 of 1 held-out problems share" in output
    assert "gold" in output


# --- The page for users ---

PAGE = (ROOT / "docs" / "data.md").read_text()
BLOCKS = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_the_page_has_blocks():
    assert len(BLOCKS) >= 6


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_of_the_page_loads_problems(block, published, tmp_path, monkeypatch):
    """The ids in the blocks are folders of the working directory."""
    monkeypatch.chdir(published["AI-MO/NuminaMath-1.5"].parents[1])
    write_files_of_the_page(Path.cwd())
    tree = yaml.safe_load(block)
    split = "test" if "eval" in tree else "train"
    data = data_settings(tree["eval"]["data"] if split == "test" else tree["data"])
    if data.path is None:  # gsm8k and math are read from the working directory
        data = data.model_copy(update={"path": "."})
    for problems in load_problems(data, split, 0).values():
        assert len(problems) > 0


def write_files_of_the_page(folder):
    for name in ("set", "benchmark"):
        (folder / "owner" / name).mkdir(parents=True, exist_ok=True)
    row = {"instruction": "1?", "reward_model": {"ground_truth": "1"}, "reference": "So."}
    rows = [{**row, "instruction": f"{number}?"} for number in range(9)]
    write_jsonl(folder / "owner" / "set" / "train.jsonl", rows)
    write_jsonl(folder / "owner" / "benchmark" / "test.jsonl", ROWS)
    (folder / "my_prompts.csv").write_text("text,id\nWrite.,1\nSing.,1\n")
    texts = [{"text": f"{number}?", "label": number} for number in range(9)]
    write_jsonl(folder / "my_problems.jsonl", texts)
    write_jsonl(folder / "gsm8k_train.jsonl", [{"problem": "1?", "answer": "1"}])
    write_jsonl(folder / "math_train.jsonl", [{"problem": "1?", "answer": "1", "level": 1}])


def test_the_page_names_every_published_set_with_its_license():
    for name, published in PUBLISHED_SETS.items():
        (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |")]
        assert f"| {published.license or 'see its card'} |" in line
        assert published.source.removeprefix("arXiv ") in line
    assert "None of these sets has been loaded with this code" in PAGE
