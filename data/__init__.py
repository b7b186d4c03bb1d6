"""Problem sets.

One file each, with `load(split, *, seed, path, **options) -> Sequence[Problem]`.
"""
