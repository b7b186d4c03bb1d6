"""Problem sets, one file per set.

A config names a set by its file: `data: {name: gsm8k}` uses gsm8k.py. Each file has a function
`load(split, *, seed, path, **options) -> Sequence[Problem]`; `options` come from `data.options`.
"""
