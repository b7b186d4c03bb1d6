"""Runs code that must not hang."""

import threading


def run_within(seconds, work):
    """Calls `work` in a thread and returns its result.

    Args:
        seconds: Time limit.
        work: Function without parameters.

    Raises:
        AssertionError: `work` does not return within the limit.
        BaseException: `work` raised this exception.
    """
    results = []
    errors = []

    def run():
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"not finished within {seconds} s"
    if errors:
        raise errors[0]
    return results[0]
