"""Rule-based rewards.

One file each, with `reward(completion, problem) -> float | Verdict | None`.
"""
