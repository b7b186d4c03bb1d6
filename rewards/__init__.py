"""Rule-based rewards, one file per reward.

A config names a reward by its file: `rewards: {accuracy: 1.0}` uses accuracy.py. Each file has a
function `reward(completion, problem, **options)` that returns a number, a `Score`, a `Verdict`, or
None if the reward does not apply to the problem. `preference` is the exception: it scores all
groups of a rollout in one call.

The policy learns whatever a reward pays for. A reward must therefore not be satisfied by hidden,
hedged or forged text: tests/rewards/ attacks each of them.

A file may also have a function `prepare(**options)`, which checks the options before a run starts,
and a constant `TIMEOUT_S`: such a reward runs in worker processes with this time limit per call.
`check_problem(problem)` returns why the gold answer of a problem cannot be read, or None;
`grpo doctor` calls it for each problem. `read_problem(problem)` returns the problem with its fields
converted to the types that the reward expects. It raises ValueError with the reason if the reward
cannot judge the problem. It is called for each problem when the data is loaded.

An exception in one of these files makes the completion undecided and does not end the run.
"""
