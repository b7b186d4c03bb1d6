"""Prints the failure of a GPU test at once, because the kit may stop the tests before their end."""


def pytest_runtest_logreport(report):
    if report.failed and report.nodeid.startswith("tests/gpu/"):
        print(f"\n{report.nodeid} failed:\n{report.longreprtext}", flush=True)
