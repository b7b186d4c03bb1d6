"""Problem sets: one file each, with `load(split, *, seed, path, **options) -> Sequence[Problem]`."""
