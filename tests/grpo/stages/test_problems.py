"""Loading problems: the rewards of a run read them, and can refuse them."""

import json

import pytest

from grpo import config as configs
from grpo.config import DataSettings, EvalConfig
from grpo.stages.problems import load_evaluation_sets, load_problems
from grpo.types import DownloadError, UserError


def data_with(tmp_path, rows):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSettings(name="jsonl", path=str(path), options={"test_fraction": 0})


def test_a_reward_reads_the_problems_when_they_are_loaded(tmp_path):
    row = {"problem": "?", "answer": "3+5", "numbers": ["3", "5"], "target": "8"}
    data = data_with(tmp_path, [row])
    (unread,) = load_problems(data, "train", 0)["jsonl"]
    assert unread.meta["numbers"] == ["3", "5"]
    (read,) = load_problems(data, "train", 0, ["format", "countdown"])["jsonl"]
    assert read.meta == {"numbers": [3, 5], "target": 8}


def test_problems_that_a_reward_refuses_are_named(tmp_path):
    rows = [{"problem": "a", "answer": "-", "id": "right", "test_list": ["assert f(1) == 1"]}]
    for number in range(7):
        test = f"import torch\nassert f({number}) == 1"
        rows.append(
            {"problem": f"p{number}", "answer": "-", "id": f"t{number}", "test_list": [test]}
        )
    data = data_with(tmp_path, rows)
    assert len(load_problems(data, "train", 0, ["accuracy"])["jsonl"]) == 8
    message = (
        r"data.jsonl: the reward code cannot judge 7 of 8 problems: t0 \(the tests import torch, "
        r"which is not in the standard library \(line 1\)\); t1 .*; t4 .*\. Correct or remove them"
    )
    with pytest.raises(UserError, match=message) as error:
        load_problems(data, "train", 0, ["accuracy", "code"])
    assert "t5" not in str(error.value)


def test_generated_problems_are_not_read():
    data = DataSettings(name="countdown")
    problems = load_problems(data, "train", 0, ["countdown"])["countdown"]
    assert len(problems) == 100_000


@pytest.mark.parametrize("name", ["jsonl", "hub", "arithmetic"])
def test_two_entries_with_the_same_set_have_different_ids(tmp_path, name):
    rows = [{"problem": f"{number}?", "answer": "1"} for number in range(3)]
    entries = {}
    for entry in ("first", "second"):
        entries[entry] = {"name": name}
        if name != "arithmetic":
            folder = tmp_path / entry
            folder.mkdir()
            path = data_with(folder, rows).path
            entries[entry] |= {"path": path, "options": {"test_fraction": 0}}
    data = DataSettings.model_validate({"mixture": entries})
    problems = load_problems(data, "train", 0)
    assert problems["first"][0].id == f"first/{problems['first'][0].id.partition('/')[2]}"
    assert isinstance(problems["first"], list) == (name != "arithmetic")
    ids = [problem.id for entry in entries for problem in problems[entry][:3]]
    assert len(set(ids)) == 6
    assert {problem.data_set for problem in problems["second"][:3]} == {"second"}


def test_keys_of_the_section_are_no_options(tmp_path):
    path = data_with(tmp_path, [{"problem": "a", "answer": "1"}]).path
    options = {"columns": {"question": "problem"}}
    with pytest.raises(UserError, match=r"data\.options\.columns: set data\.columns"):
        load_problems(DataSettings(name="hub", path=path, options=options), "train", 0)
    with pytest.raises(UserError, match=r"options\.seed: no option: set the key seed"):
        load_problems(DataSettings(name="jsonl", path=path, options={"seed": 1}), "train", 0)


def eval_config(**changes):
    tree = {"run_dir": "x", "model": {"path": "tiny-qwen2"}, **changes}
    return configs.parse(tree, kind=EvalConfig)


def test_the_sets_of_an_evaluation_find_their_files_in_one_folder(tmp_path):
    for name, answer in [("aime24", "204"), ("aime25", "70"), ("amc23", "27")]:
        row = {"problem": "?", "answer": answer}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    own = tmp_path / "own.jsonl"
    own.write_text('{"problem": "?", "answer": "1"}\n')
    config = eval_config(
        data={"path": str(tmp_path)},
        sets={
            "a24": {"name": "aime"},
            "a25": {"name": "aime", "options": {"year": 2025}},
            "amc": {"mixture": {"amc": {}}},
            "own": {"name": "amc", "path": str(own)},
        },
    )
    problems = load_evaluation_sets(config.set_configs())
    answers = {}
    for name, problems_by_data_set in problems.items():
        ((problem,),) = problems_by_data_set.values()
        answers[name] = problem.answer
    assert answers == {"a24": "204", "a25": "70", "amc": "27", "own": "1"}


def test_the_error_about_missing_sets_names_all_of_them_and_the_overrides_that_remove_them(
    tmp_path,
):
    (tmp_path / "amc23.jsonl").write_text('{"problem": "?", "answer": "27"}\n')
    (tmp_path / "math500.jsonl").write_text('{"problem": "?"}\n')
    sets = {"amc": {"name": "amc"}, "math": {"name": "math"}, "gpqa": {"name": "gpqa"}}
    config = eval_config(data={"path": str(tmp_path)}, sets=sets)
    message = (
        r"^sets\.math: .*math500\.jsonl: line 1: .*; sets\.gpqa: data.path: .* has none of "
        r"gpqa_diamond.jsonl, .* To evaluate without these sets: sets\.math= sets\.gpqa=$"
    )
    with pytest.raises(UserError, match=message) as error:
        load_evaluation_sets(config.set_configs())
    assert not isinstance(error.value, DownloadError)

    # Without a folder, all sets are downloaded. The tests have no access to the hub.
    names = [f"set{number}" for number in range(5)]
    config = eval_config(sets={name: {"name": "gpqa"} for name in names})
    with pytest.raises(DownloadError, match=r"and 2 more\. To evaluate .* sets\.set4=$"):
        load_evaluation_sets(config.set_configs())
    # A single set without a name has its own error.
    with pytest.raises(DownloadError, match=r"^Idavidrein/gpqa cannot be fetched"):
        load_evaluation_sets(eval_config(data={"name": "gpqa"}).set_configs())


def test_the_folder_of_all_sets_cannot_be_a_file(tmp_path):
    file = tmp_path / "amc23.jsonl"
    file.write_text('{"problem": "?", "answer": "27"}\n')
    config = eval_config(data={"path": str(file)}, sets={"amc": {"name": "amc"}})
    with pytest.raises(UserError, match=r"amc23.jsonl: a file, expected the folder"):
        load_evaluation_sets(config.set_configs())
