"""Rule-based rewards, one file per reward.

A config names a reward by its file: `rewards: {accuracy: 1.0}` uses accuracy.py. Each file has a
function `reward(completion, problem, **options)` that returns a number, a `Score`, a `Verdict`, or
None if the reward does not apply to the problem. `preference` is the exception: it scores all
groups of a rollout in one call.

A file may also have a function `prepare(**options)`, which checks the options before a run starts,
and a constant `TIMEOUT_S`: such a reward runs in worker processes with this time limit per call.
`check_problem(problem)` returns why the gold answer of a problem cannot be read, or None;
`grpo doctor` calls it for each problem.

An exception in one of these files makes the completion undecided and does not end the run.
"""
