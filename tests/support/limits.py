"""Runs code with a limit of time or of file size."""

import contextlib
import resource
import threading


@contextlib.contextmanager
def limited_file_size(max_bytes):
    """Makes every write past `max_bytes` of a file fail, as on a full disk."""
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, hard_limit))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft_limit, hard_limit))


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
