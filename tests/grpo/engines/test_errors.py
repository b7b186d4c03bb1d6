"""The engines' error classes: their messages, and pickling, which sends errors to other ranks."""

import pickle
from dataclasses import astuple, is_dataclass

import pytest

import grpo.engines
from grpo.engines import EngineError

# For each error class: its fields, and a regular expression that its message matches.
EXAMPLES = {
    "EngineTimeoutError": (("the engine did not answer `x`", 5.0, "its log: f"), "within 5 s; its"),
    "EngineProcessDiedError": (("generate", -9, "f"), r"killed by SIGKILL \(out of memory\?"),
    "ProcessNotEndedError": (("process 7", 10.0), "process 7 did not end within 10 s"),
    "NoResponseError": (("http://s0", "/health", "ConnectError"), "/health at http://s0: Conn"),
    "ServerError": (("http://s0", "/pause", 500, "oh"), "/pause at http://s0: 500 oh"),
    "RejectedRequestError": (("http://s0", "/pause", 404, "no"), "/pause at http://s0: 404 no"),
    "EngineDeadError": (("http://s0", "/health", 503, ""), "/health at http://s0: 503"),
    "MalformedResponseError": (("http://s0", "/x", "no JSON"), "cannot be decoded: no JSON"),
    "IncompleteResponseError": (("http://s0", 1, 3), "incomplete response: 1 of 3 completions"),
    "AbortedRequestError": (("http://s0", "abort"), "aborted request: finish_reason=abort"),
    "UnknownWeightVersionError": (("http://s0", 4), "unknown weight version"),
    "WrongWeightVersionError": (("http://s0", "3", 4), "weight version 3, expected version 4"),
    "ServerLostError": (("http://s0",), "lost the server http://s0"),
}


def is_engine_error_subclass(value):
    return isinstance(value, type) and issubclass(value, EngineError) and value is not EngineError


def test_every_error_class_has_an_example():
    class_names = {
        name for name, value in vars(grpo.engines).items() if is_engine_error_subclass(value)
    }
    assert class_names == EXAMPLES.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_pickled_error_keeps_its_class_fields_and_message(name):
    fields, message = EXAMPLES[name]
    error = getattr(grpo.engines, name)(*fields)
    with pytest.raises(EngineError, match=message):
        raise error
    error.raised_on_all_ranks = True
    error.failed_rank = 3
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert copy.raised_on_all_ranks
    assert copy.failed_rank == 3
    assert is_dataclass(copy)
    assert astuple(copy) == fields
