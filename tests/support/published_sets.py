"""Small sets in the layout and the row format of published ones. All rows are written by hand."""

import json

import datasets

from grpo.data.common.published_sets import DAPO_INSTRUCTION

TRACE = "<think>\n1 and 1 is 2.\n</think>\nIt is \\boxed{2}."
SKY_T1_TRACE = (
    "<|begin_of_thought|>\n\n1 and 1 is 2.\n\n<|end_of_thought|>\n\n"
    "<|begin_of_solution|>\n\nIt is 2.\n\n<|end_of_solution|>"
)


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(path)


def write_readme(folder, files_by_subset):
    """Writes a card that names the files of each split: `{"default": {"train": "data/train-*"}}`.

    The card declares JSON, which is YAML.
    """
    configs = []
    for subset, files in files_by_subset.items():
        data_files = [{"split": split, "path": pattern} for split, pattern in files.items()]
        configs.append({"config_name": subset, "data_files": data_files})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")


def openr1_row(problem, answer, trace, uuid):
    return {
        "problem": problem,
        "solution": "A human's solution.",
        "answer": answer,
        "problem_type": "Algebra",
        "question_type": "math-word-problem",
        "source": "olympiads",
        "uuid": uuid,
        "is_reasoning_complete": [True, True],
        "generations": [trace, "<think>wrong</think>3"],
        "correctness_math_verify": [True, False],
        "correctness_llama": None,
        "finish_reasons": ["stop", "stop"],
        "correctness_count": 1,
        "messages": [
            {"role": "user", "content": problem},
            {"role": "assistant", "content": trace},
        ],
    }


def write_openr1(folder):
    files = {"default": {"train": "data/train-*"}, "extended": {"train": "extended/train-*"}}
    write_readme(folder, files)
    rows = [
        openr1_row("1 and 1?", "2", TRACE, "u1"),
        openr1_row("Prove it.", "proof", TRACE, "u2"),
        openr1_row("2 and 2?", "4", TRACE, None),
    ]
    write_parquet(folder / "data" / "train-00000-of-00002.parquet", rows[:2])
    write_parquet(folder / "data" / "train-00001-of-00002.parquet", rows[2:])
    write_parquet(
        folder / "extended" / "train-00000-of-00001.parquet",
        [openr1_row("3 and 3?", "6", TRACE, "u9")],
    )


def dapo_row(question, answer):
    before, after = DAPO_INSTRUCTION
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": before + question + after, "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"index of {question}"},
    }


def write_dapo(folder):
    rows = [dapo_row("1 and 1?", "2"), dapo_row("2 and 2?", "4")]
    write_parquet(folder / "data" / "dapo-math-17k.parquet", rows * 3)


def write_dapo_processed(folder):
    subsets = ("all", "en", "cn")
    write_readme(folder, {subset: {"train": f"{subset}/train-*"} for subset in subsets})
    rows = []
    for question, answer in (("1 and 1?", "2"), ("1 加 1?", "2")):
        row = dapo_row(question, answer)
        row["source_prompt"] = row["prompt"]
        row |= {"prompt": question, "solution": answer}
        rows.append(row)
    for subset, rows_of_subset in (("all", rows), ("en", rows[:1]), ("cn", rows[1:])):
        write_parquet(folder / subset / "train-00000-of-00001.parquet", rows_of_subset)


def write_deepscaler(folder):
    rows = [
        {"problem": "1 and 1?", "answer": "2", "solution": "Count."},
        {"problem": "Unknown?", "answer": "", "solution": ""},
        {"problem": "2 and 2?", "answer": "4", "solution": ""},
    ]
    folder.mkdir(parents=True)
    (folder / "deepscaler.json").write_text(json.dumps(rows, indent=2))


def write_big_math(folder):
    rows = [
        {
            "problem": "1 and 1?",
            "answer": "2",
            "source": "gsm8k",
            "domain": ["Mathematics -> Arithmetic"],
            "llama8b_solve_rate": 0.75,
        },
        {
            "problem": "2 and 2?",
            "answer": "4",
            "source": "orca_math",
            "domain": [],
            "llama8b_solve_rate": None,
        },
    ]
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", rows)


def numina_row(problem, answer, **fields):
    return {
        "problem": problem,
        "solution": "A solution.",
        "answer": answer,
        "problem_type": "Algebra",
        "question_type": "math-word-problem",
        "problem_is_valid": "Yes",
        "solution_is_valid": "Yes",
        "source": "cn_k12",
        "synthetic": False,
        **fields,
    }


def write_numina(folder):
    rows = [
        numina_row("1 and 1?", "2"),
        numina_row("Show it.", "1", question_type="proof"),
        numina_row("Show that.", "proof"),
        numina_row("Lost?", "notfound"),
        numina_row("Null?", None),
        numina_row("Broken?", "3", problem_is_valid="Incomplete"),
        numina_row("Odd?", "3", solution_is_valid="No"),
    ]
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", rows)


def write_orz(folder):
    rows = []
    for question, answer in (("1 and 1?", "2"), ("2 and 2?", "4")):
        rows.append(
            [
                {"from": "human", "value": question},
                {"from": "assistant", "ground_truth": {"value": answer}},
            ]
        )
    folder.mkdir(parents=True)
    (folder / "orz_math_57k_collection.json").write_text(json.dumps(rows))


def skywork_row(ability, question, ground_truth):
    difficulty = {"DeepSeek-R1-Distill-Qwen-1.5B": 3, "DeepSeek-R1-Distill-Qwen-7B": 0}
    return {
        "data_source": f"train-{ability}",
        "prompt": [{"content": question, "role": "user"}],
        "ability": ability,
        "reward_model": {"ground_truth": ground_truth, "style": "rule"},
        "extra_info": {"index": 0, "model_difficulty": difficulty},
    }


def write_skywork(folder):
    write_readme(folder, {"default": {"math": "data/math-*", "code": "data/code-*"}})
    rows = [
        skywork_row("math", "1 and 1?", '["2"]'),
        skywork_row("math", "A half?", '["\\\\frac{1}{2}", "0.5"]'),
    ]
    write_parquet(folder / "data" / "math-00000-of-00001.parquet", rows)
    code_tests = json.dumps({"entry_point": "f", "test_code": "def check(f):\n    pass"})
    code_rows = [skywork_row("code", "Write f.", code_tests)]
    write_parquet(folder / "data" / "code-00000-of-00001.parquet", code_rows)


def write_open_thoughts(folder):
    files = {"default": {"train": "data/train-*"}, "metadata": {"train": "metadata/train-*"}}
    write_readme(folder, files)
    row = {
        "system": "Think first.",
        "conversations": [
            {"from": "user", "value": "1 and 1?"},
            {"from": "assistant", "value": SKY_T1_TRACE},
        ],
    }
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", [row])
    metadata = {"problem": "1 and 1?", "deepseek_reasoning": "1 and 1 is 2.", "domain": "math"}
    write_parquet(folder / "metadata" / "train-00000-of-00001.parquet", [metadata])


WRITERS = {
    "open-r1/OpenR1-Math-220k": write_openr1,
    "BytedTsinghua-SIA/DAPO-Math-17k": write_dapo,
    "open-r1/DAPO-Math-17k-Processed": write_dapo_processed,
    "agentica-org/DeepScaleR-Preview-Dataset": write_deepscaler,
    "SynthLabsAI/Big-Math-RL-Verified": write_big_math,
    "AI-MO/NuminaMath-1.5": write_numina,
    "Open-Reasoner-Zero/orz_math_57k_collection": write_orz,
    "Skywork/Skywork-OR1-RL-Data": write_skywork,
    "open-thoughts/OpenThoughts-114k": write_open_thoughts,
}


def write_published_sets(folder):
    """Writes all sets to `folder/OWNER/NAME`. Returns the folder of each id."""
    folders = {}
    for name, write in WRITERS.items():
        folders[name] = folder / name
        write(folder / name)
    return folders
