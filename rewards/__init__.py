"""Rule-based rewards: one file each, with `reward(completion, problem) -> float | Verdict | None`."""
