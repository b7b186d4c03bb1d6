"""The exchange of values between judge and program: exact types, any depth, no code."""

import collections
import enum
import json
import math

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.rewards.judge import values
from grpo.rewards.judge.values import ExchangeError, Node, decode, encode, write_back

Point = collections.namedtuple("Point", ["x", "y"])


def refuse(value):
    raise ExchangeError(f"no value: {value!r}")


def refuse_reference(tag, constant, parts):
    raise ValueError(f"unknown tag {tag}")


def exchange(value):
    """Returns a value after it was sent and received."""
    return decode(json.loads(json.dumps(encode(value, refuse))), refuse_reference)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=1 << 8190, max_value=1 << 9000),
    st.floats(allow_nan=False),
    st.complex_numbers(allow_nan=False),
    st.text(),
    st.binary(),
    st.fractions(),
    st.decimals(allow_nan=False),
    st.dates(),
    st.datetimes(),
    st.timedeltas(),
)
HASHABLE = st.recursive(
    SCALARS,
    lambda parts: st.one_of(st.tuples(parts, parts), st.frozensets(parts, max_size=3)),
    max_leaves=8,
)
VALUES = st.recursive(
    HASHABLE,
    lambda parts: st.one_of(
        st.lists(parts, max_size=4),
        st.dictionaries(HASHABLE, parts, max_size=4),
        st.sets(HASHABLE, max_size=4),
        st.tuples(parts, parts, parts),
    ),
    max_leaves=12,
)


def types_of(value):
    """Returns a value's type with the types of its parts."""
    if isinstance(value, dict):
        return type(value), [(types_of(key), types_of(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [types_of(part) for part in value]
    return type(value)


@given(VALUES)
def test_a_value_is_received_as_it_was_sent(value):
    received = exchange(value)
    assert received == value
    assert types_of(received) == types_of(value)


@pytest.mark.parametrize(
    "value",
    [
        -0.0,
        math.inf,
        "\ud800 lone surrogate",
        bytearray(b"x"),
        range(1, 10**30, 7),
        collections.Counter("abca"),
        collections.OrderedDict([("b", 1), ("a", 2)]),
        collections.defaultdict(None, {"a": [1]}),
        collections.deque([1, 2], maxlen=5),
        {1: None}.keys(),
        {(1, 2): 3}.items(),
        Point(1, [2]),
        int,
        type(None),
        ValueError,
        slice(1, None, (2,)),
        ...,
    ],
    ids=repr,
)
def test_the_other_types_keep_their_values(value):
    received = exchange(value)
    assert received == value
    assert repr(received) == repr(value)
    assert isinstance(received, type(value)) or isinstance(value, Point)


def test_not_a_number_and_views_of_values_keep_their_content():
    assert math.isnan(exchange(math.nan))
    assert list(exchange({"a": 1, "b": 1}.values())) == [1, 1]
    received = exchange(Point(1, 2))
    assert (received.x, received.y, received) == (1, 2, (1, 2))


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint64", "float32", "float64", "complex128"])
def test_arrays_keep_their_type_and_shape(dtype):
    array = numpy.arange(6).reshape(2, 3).astype(dtype)
    received = exchange(array)
    assert received.dtype == array.dtype
    assert (received == array).all()
    assert exchange(array[1, 2]) == array[1, 2].item()


def test_subclasses_become_their_base():
    class Number(int):
        def __eq__(self, other):
            return True

        __hash__ = int.__hash__

        def __index__(self):
            return 7

    class Names(list):
        def __iter__(self):
            return iter("attack")

    assert type(exchange(Number(3))) is int
    assert exchange(Number(3)) == 3
    assert exchange(enum.IntEnum("Color", "RED")(1)) == 1
    received = exchange(Names([1, 2]))
    assert type(received) is list
    assert received == [1, 2]


def test_shared_parts_stay_shared_and_cycles_are_refused():
    shared = [1]
    received = exchange([shared, shared])
    received[0].append(2)
    assert received == [[1, 2], [1, 2]]

    value = []
    for _ in range(60):  # 2^60 lists if they were not shared
        value = [value, value]
    assert len(encode(value, refuse)["nodes"]) == 61

    cycle = {}
    cycle["self"] = [cycle]
    with pytest.raises(ExchangeError, match="contains itself"):
        encode(cycle, refuse)


def test_the_depth_of_a_value_has_no_limit():
    value = []
    for _ in range(100_000):
        value = [value]
    received = exchange(value)
    depth = 0
    while received:
        (received,) = received
        depth += 1
    assert depth == 100_000


def test_a_value_with_too_many_parts_is_refused(monkeypatch):
    monkeypatch.setattr(values, "MAX_NODES", 1000)
    with pytest.raises(ExchangeError, match="more than 1,000 parts"):
        encode(list(range(1001)), refuse)
    with pytest.raises(ExchangeError, match="more than 1,000 nodes"):
        decode({"nodes": [["list", None, []]] * 1001, "root": [0]}, refuse_reference)


@pytest.mark.parametrize(
    "sent",
    [
        None,
        7,
        "text",
        [],
        {},
        {"nodes": [], "root": [0]},
        {"nodes": [], "root": [-1]},
        {"nodes": [], "root": {}},
        {"nodes": [], "root": [0, 1]},
        {"nodes": [], "root": ["x"]},
        {"nodes": 5, "root": 1},
        {"nodes": [1], "root": 1},
        {"nodes": [["list", None, [[0]]]], "root": [0]},
        {"nodes": [["list", None, [[1]]], ["list", None, []]], "root": [0]},
        {"nodes": [["eval", "1", []]], "root": [0]},
        {"nodes": [[["list"], None, []]], "root": [0]},
        {"nodes": [["dict", None, [1]]], "root": [0]},
        {"nodes": [["list", None, []], ["dict", None, [[0], 1]]], "root": [1]},
        {"nodes": [["int", "zz", []]], "root": [0]},
        {"nodes": [["bytes", "0", []]], "root": [0]},
        {"nodes": [["type", "os.system", []]], "root": [0]},
        {"nodes": [["range", None, [1, 2, 0]]], "root": [0]},
        {"nodes": [["Fraction", None, [1, 0]]], "root": [0]},
        {"nodes": [["Decimal", "x", []]], "root": [0]},
        {"nodes": [["namedtuple", ["A", "x y"], [1]]], "root": [0]},
        {"nodes": [["namedtuple", ["A", "class"], [1]]], "root": [0]},
        {"nodes": [["namedtuple", ["A", "x"], []]], "root": [0]},
        {"nodes": [["datetime", [2000, 13, 1], []]], "root": [0]},
        {"nodes": [["ndarray", ["O", 1], [1]]], "root": [0]},
        {"nodes": [["ndarray", ["<f8", 3], [1]]], "root": [0]},
        {"nodes": [["deque", None, []]], "root": [0]},
        {"nodes": [["scalar", None, []]], "root": [0]},
        {"nodes": [["list", None, []]], "attributes": [[0, {"x": 1}]], "root": [0]},
        {"nodes": [], "attributes": [[0, {"x": 1}]], "root": 1},
        {"nodes": [], "attributes": 5, "root": 1},
    ],
)
def test_what_is_no_value_is_an_error(sent):
    with pytest.raises(ExchangeError):
        decode(sent, refuse_reference)


def test_objects_that_are_no_values_are_sent_as_references():
    marker = object()
    sent = encode([marker, len], lambda value: Node("remote", type(value).__name__, []))
    received = decode(sent, lambda tag, constant, parts: (tag, constant))
    assert received == [("remote", "object"), ("remote", "builtin_function_or_method")]


def test_changed_arguments_are_written_into_the_same_containers():
    inner = [1]
    original = ([inner, 5], {"a": {1}, "b": bytearray(b"x")}, numpy.zeros(2), "text")
    rows, table, array, _ = original
    write_back(
        original,
        ([[1, 2], 6, 7], {"a": {3}, "c": 1}, numpy.ones(2), "text"),
    )
    assert rows == [[1, 2], 6, 7]
    assert rows[0] is inner
    assert table == {"a": {3}, "c": 1}
    assert array.tolist() == [1, 1]

    other = [1]
    write_back(other, {"a": 1})  # another type
    assert other == [1]
