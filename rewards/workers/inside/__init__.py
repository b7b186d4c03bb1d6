"""The part of the sandbox that runs inside of it.

`keeper.py` is the trusted process of a sandbox. It enters the namespaces and starts the jobs.
`child.py` confines the process of a job. Everything here is imported before the sandbox is closed,
because afterwards grpo's files are not visible. It starts often and therefore imports only a few
modules of the standard library.
"""
