"""The engines' errors: their messages, and that they reach other ranks whole."""

import pickle
from dataclasses import astuple, is_dataclass

import pytest

import grpo.engines
from grpo.engines import EngineError

EXAMPLES = {
    "EngineTimeoutError": (("the engine did not answer `x`", 5.0, "its log: f"), "within 5 s; its"),
    "EngineDiedError": (("generate", -9, "f"), r"killed by SIGKILL \(out of memory\?"),
    "ProcessNotEndedError": (("process 7", 10.0), "process 7 did not end within 10 s"),
    "NoResponseError": (("http://s0", "/health", "ConnectError"), "/health at http://s0: Conn"),
    "ServerError": (("http://s0", "/pause", 500, "oh"), "/pause at http://s0: 500 oh"),
    "RefusedError": (("http://s0", "/pause", 404, "no"), "/pause at http://s0: 404 no"),
    "EngineDeadError": (("http://s0", "/health", 503, ""), "/health at http://s0: 503"),
    "MalformedResponseError": (("http://s0", "/x", "no JSON"), "cannot be decoded: no JSON"),
    "IncompleteResponseError": (("http://s0", 1, 3), "incomplete response: 1 of 3 completions"),
    "AbortedRequestError": (("http://s0", "abort"), "aborted request: finish_reason=abort"),
    "UnknownWeightVersionError": (("http://s0", 4), "unknown weight version"),
    "WrongWeightVersionError": (("http://s0", "3", 4), "weight version 3, expected version 4"),
    "ServerLostError": (("http://s0",), "http://s0 was lost"),
}


def test_every_error_has_an_example_here():
    classes = {
        name
        for name, value in vars(grpo.engines).items()
        if isinstance(value, type) and issubclass(value, EngineError) and value is not EngineError
    }
    assert classes == EXAMPLES.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_error_keeps_its_fields_and_its_message_when_it_is_sent_to_another_rank(name):
    fields, message = EXAMPLES[name]
    error = getattr(grpo.engines, name)(*fields)
    with pytest.raises(EngineError, match=message):
        raise error
    error.known_to_all_ranks = True
    error.failed_rank = 3
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and str(copy) == str(error) and copy.known_to_all_ranks
    assert copy.failed_rank == 3
    assert is_dataclass(copy) and astuple(copy) == fields
