"""Runs work that must not hang."""

import threading


def run_within(seconds, work):
    """Returns what `work` returns, raises what it raises; fails if it takes longer."""
    results, errors = [], []

    def run():
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"not done within {seconds} s"
    if errors:
        raise errors[0]
    return results[0]
