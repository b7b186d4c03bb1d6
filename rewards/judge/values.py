"""Exchanges Python values between two processes that do not trust each other.

A value is sent as JSON and is read as values of the same exact types: builtin types, those of
`collections`, `datetime`, `decimal` and `fractions`, and numpy arrays. A subclass of one of them is
sent as its base, except for named tuples. So nothing that is read has code of the sender.

All other objects (functions, classes, instances, iterators) stay where they are. A reference to
them is sent instead.

The form of a sent value: `{"nodes": [...], "root": ITEM}`. An ITEM is a JSON scalar, or `[i]` for
node i. A node is `[TAG, CONSTANT, ITEMS]` and refers to earlier nodes only. For example, `([1], 2)`
is `{"nodes": [["list", null, [1]], ["tuple", null, [[0], 2]]], "root": [1]}`. The form is flat, so
that the depth of a value has no limit.

An instance of a class that both processes have can be sent with its attributes. Its node has no
items. `"attributes"` has a list `[i, {NAME: ITEM}]` for each instance, so that instances can refer
to each other in a circle.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

MAX_NODES = 5_000_000
MAX_INLINE_BITS = 8192  # an integer with more bits is sent as a node, in hexadecimal

Item = Any  # a JSON scalar or `[i]`
Sent = dict[str, Any]


class ExchangeError(Exception):
    """A value cannot be exchanged, or the received message contains no value."""


class Node(NamedTuple):
    """A node before its parts are sent: `Node("tuple", None, [1, 2])`.

    `attributes` are those of an instance. They are sent after all nodes.
    """

    tag: str
    constant: Any
    parts: list[Any]
    attributes: dict[str, Any] | None = None


# --- sending


def encode(value: Any, reference: Callable[[Any], Node]) -> Sent:
    """Returns a value in the form in which it is sent.

    Args:
        value: The value. Its depth has no limit.
        reference: Returns the node for an object that is not sent by value.

    Raises:
        ExchangeError: The value contains itself or has more than MAX_NODES parts.
    """
    encoder = _Encoder(reference)
    sent: Sent = {"root": encoder.item(value)}
    attributes = []
    for index, values_by_name in encoder.instances:  # grows while it is traversed
        items = {name: encoder.item(part) for name, part in values_by_name.items()}
        attributes.append([index, items])
    if attributes:
        sent["attributes"] = attributes
    sent["nodes"] = encoder.nodes
    return sent


class _Encoder:
    """Collects the nodes of values."""

    def __init__(self, reference: Callable[[Any], Node]) -> None:
        self.nodes: list[list[Any]] = []
        self.instances: list[tuple[int, dict[str, Any]]] = []  # index of the node, attributes
        self._reference = reference
        self._items: dict[int, Item] = {}  # by id of a value whose node is finished
        self._open_nodes: dict[int, Node] = {}  # by id of a value whose parts are being sent
        self._kept: list[Node] = []  # an id that is in use must not be used again
        self._num_parts = 0

    def item(self, value: Any) -> Item:
        """Adds the nodes of a value and returns its item."""
        stack = [value]
        while stack:
            current = stack[-1]
            key = id(current)
            if is_scalar(current) or key in self._items:
                stack.pop()
            elif key in self._open_nodes:
                stack.pop()
                self._finish(key)
            else:
                stack += self._open(current)
        return self._item_of_finished(value)

    def _open(self, value: Any) -> list[Any]:
        """Begins the node of a value. Returns its parts that need nodes, which come first."""
        node = _describe(value) or self._reference(value)
        self._kept.append(node)
        self._num_parts += 1 + len(node.parts)
        if self._num_parts > MAX_NODES:
            raise ExchangeError(f"a value with more than {MAX_NODES:,} parts")
        self._open_nodes[id(value)] = node
        parts = [part for part in node.parts if not is_scalar(part)]
        if any(id(part) in self._open_nodes for part in parts):
            raise ExchangeError("a value that contains itself")
        return parts

    def _finish(self, key: int) -> None:
        node = self._open_nodes.pop(key)
        if node.attributes is not None:
            self.instances.append((len(self.nodes), node.attributes))
        self._items[key] = [len(self.nodes)]
        parts = [self._item_of_finished(part) for part in node.parts]
        self.nodes.append([node.tag, node.constant, parts])

    def _item_of_finished(self, value: Any) -> Item:
        return value if is_scalar(value) else self._items[id(value)]


def is_scalar(value: Any) -> bool:
    """Returns whether JSON has the value."""
    kind = type(value)
    if kind is int:
        return bool(value.bit_length() <= MAX_INLINE_BITS)
    return kind is float or kind is str or kind is bool or value is None


def _describe(value: Any) -> Node | None:
    """Returns the node of a value, None if it is not sent by value."""
    for kind, describe in _DESCRIPTIONS:
        if isinstance(value, kind):
            return describe(value)
    if isinstance(value, type):
        name = _NAME_OF_TYPE.get(value)
        return None if name is None else Node("type", name, [])
    if type(value).__module__ == "numpy":
        return _describe_numpy(value)
    return None


def _describe_tuple(value: Any) -> Node:
    fields = getattr(type(value), "_fields", None)
    if type(fields) is tuple and len(fields) == tuple.__len__(value):
        name = type(value).__name__
        return Node("namedtuple", [name, *fields], list(tuple.__iter__(value)))
    return Node("tuple", None, list(tuple.__iter__(value)))


def _describe_dict(value: Any) -> Node:
    tag = "dict"
    for kind in (collections.Counter, collections.OrderedDict, collections.defaultdict):
        if isinstance(value, kind):
            tag = kind.__name__
    parts = []
    for key, item in dict.items(value):
        parts += [key, item]
    return Node(tag, None, parts)


def _describe_float(value: float) -> Node:
    return Node("float", float.__float__(value), [])


def _describe_int(value: int) -> Node:
    return Node("int", hex(int.__index__(value)), [])


def _describe_datetime(value: datetime.datetime) -> Node | None:
    if value.tzinfo is not None:
        return None
    return Node("datetime", [*value.timetuple()[:6], value.microsecond], [])


def _describe_time(value: datetime.time) -> Node | None:
    if value.tzinfo is not None:
        return None
    return Node("time", [value.hour, value.minute, value.second, value.microsecond], [])


def _describe_numpy(value: Any) -> Node | None:
    """Describes an array, and a scalar as a Python number."""
    if value.dtype.kind not in "biufc":
        return None
    if value.ndim == 0 and not hasattr(value, "__setitem__"):
        return Node("scalar", None, [value.item()])
    return Node("ndarray", [value.dtype.str, *value.shape], value.ravel().tolist())


# The first type that a value is an instance of decides how it is sent.
_DESCRIPTIONS: tuple[tuple[type, Callable[[Any], Node | None]], ...] = (
    (list, lambda value: Node("list", None, list(list.__iter__(value)))),
    (tuple, _describe_tuple),
    (dict, _describe_dict),
    (str, lambda value: Node("scalar", None, [str.__str__(value)])),
    (int, _describe_int),
    (float, _describe_float),
    (set, lambda value: Node("set", None, list(set.__iter__(value)))),
    (frozenset, lambda value: Node("frozenset", None, list(frozenset.__iter__(value)))),
    (bytes, lambda value: Node("bytes", bytes.hex(value), [])),
    (bytearray, lambda value: Node("bytearray", bytearray.hex(value), [])),
    (complex, lambda value: Node("complex", None, [value.real, value.imag])),
    (range, lambda value: Node("range", None, [value.start, value.stop, value.step])),
    (collections.deque, lambda value: Node("deque", None, [value.maxlen, *value])),
    (type({}.keys()), lambda value: Node("dict_keys", None, list(value))),
    (type({}.values()), lambda value: Node("dict_values", None, list(value))),
    (type({}.items()), lambda value: Node("dict_items", None, list(value))),
    (
        fractions.Fraction,
        lambda value: Node("Fraction", None, [value.numerator, value.denominator]),
    ),
    (decimal.Decimal, lambda value: Node("Decimal", decimal.Decimal.__str__(value), [])),
    (datetime.datetime, _describe_datetime),
    (datetime.date, lambda value: Node("date", [*value.timetuple()[:3]], [])),
    (datetime.time, _describe_time),
    (
        datetime.timedelta,
        lambda value: Node("timedelta", [value.days, value.seconds, value.microseconds], []),
    ),
    (slice, lambda value: Node("slice", None, [value.start, value.stop, value.step])),
    (type(...), lambda _: Node("ellipsis", None, [])),
)

# --- receiving


def decode(sent: Any, resolve: Callable[[str, Any, list[Any]], Any]) -> Any:
    """Returns the value of its sent form.

    Args:
        sent: The received message. The sender is not trusted.
        resolve: Returns the object of a reference, from the tag, constant and parts of its node.

    Raises:
        ExchangeError: It is no value.
    """
    try:
        values: list[Any] = []
        if len(sent["nodes"]) > MAX_NODES:
            raise ExchangeError(f"a value with more than {MAX_NODES:,} nodes")
        for tag, constant, items in sent["nodes"]:
            parts = [_part(item, values) for item in items]
            build = _BUILDERS.get(tag)
            if build is None:
                values.append(resolve(tag, constant, parts))
            else:
                values.append(build(constant, parts))
        for index, items_by_name in sent.get("attributes", []):
            if sent["nodes"][index][0] != "instance":
                raise ValueError("attributes of no instance")
            for name, item in items_by_name.items():
                _set_attribute(values[index], name, _part(item, values))
        return _part(sent["root"], values)
    except (
        ArithmeticError,
        AttributeError,
        ImportError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise ExchangeError(f"no value: {type(error).__name__}: {error}") from None


def _set_attribute(instance: Any, name: str, value: Any) -> None:
    if name.startswith("__") or callable(getattr(type(instance), name, None)):
        raise ValueError(f"the attribute {name} of an instance cannot be sent")
    object.__setattr__(instance, name, value)  # also of a frozen dataclass


def _part(item: Item, values: list[Any]) -> Any:
    if type(item) is list:
        (index,) = item
        if index < 0:
            raise IndexError(f"node {index}")
        return values[index]
    if type(item) is dict:
        raise TypeError("a dict is no item")
    return item


def _dict(parts: list[Any]) -> dict[Any, Any]:
    return dict(zip(parts[::2], parts[1::2], strict=True))


@functools.cache
def _namedtuple(name: str, fields: tuple[str, ...]) -> type[Any]:
    return collections.namedtuple(name, fields)


def _type_of_name(name: str) -> type:
    return _TYPE_OF_NAME[name]


def _ndarray(constant: list[Any], parts: list[Any]) -> Any:
    import numpy

    dtype, *shape = constant
    if numpy.dtype(dtype).kind not in "biufc":
        raise TypeError(f"an array of {dtype}")
    return numpy.array(parts, dtype=dtype).reshape(shape)


_BUILDERS: dict[str, Callable[[Any, list[Any]], Any]] = {
    "list": lambda _, parts: parts,
    "tuple": lambda _, parts: tuple(parts),
    "namedtuple": lambda names, parts: _namedtuple(names[0], tuple(names[1:]))(*parts),
    "dict": lambda _, parts: _dict(parts),
    "Counter": lambda _, parts: collections.Counter(_dict(parts)),
    "OrderedDict": lambda _, parts: collections.OrderedDict(_dict(parts)),
    "defaultdict": lambda _, parts: collections.defaultdict(None, _dict(parts)),
    "scalar": lambda _, parts: parts[0],
    "int": lambda digits, _: int(digits, 16),
    "float": lambda number, _: float(number),
    "set": lambda _, parts: set(parts),
    "frozenset": lambda _, parts: frozenset(parts),
    "bytes": lambda digits, _: bytes.fromhex(digits),
    "bytearray": lambda digits, _: bytearray.fromhex(digits),
    "complex": lambda _, parts: complex(*parts),
    "range": lambda _, parts: range(*parts),
    "deque": lambda _, parts: collections.deque(parts[1:], parts[0]),
    "dict_keys": lambda _, parts: dict.fromkeys(parts).keys(),
    "dict_values": lambda _, parts: dict(enumerate(parts)).values(),
    "dict_items": lambda _, parts: dict(parts).items(),
    "Fraction": lambda _, parts: fractions.Fraction(*parts),
    "Decimal": lambda digits, _: decimal.Decimal(digits),
    "datetime": lambda numbers, _: datetime.datetime(*numbers),
    "time": lambda numbers, _: datetime.time(*numbers),
    "date": lambda numbers, _: datetime.date(*numbers),
    "timedelta": lambda numbers, _: datetime.timedelta(*numbers),
    "slice": lambda _, parts: slice(*parts),
    "ellipsis": lambda _constant, _parts: ...,
    "type": lambda name, _: _type_of_name(name),
    "ndarray": _ndarray,
}


def _types_by_name() -> dict[str, type]:
    """Returns the types that are sent by name: those of values, and the builtin exceptions."""
    kinds: list[type] = [
        *(kind for kind, _ in _DESCRIPTIONS),
        collections.Counter,
        collections.OrderedDict,
        collections.defaultdict,
        bool,
        type(None),
        object,
        type,
        map,
        filter,
        zip,
        enumerate,
        reversed,
    ]
    for value in vars(sys.modules["builtins"]).values():
        if isinstance(value, type) and issubclass(value, BaseException):
            kinds.append(value)
    return {f"{kind.__module__}.{kind.__qualname__}": kind for kind in kinds}


_TYPE_OF_NAME: dict[str, type] = _types_by_name()
_NAME_OF_TYPE = {kind: name for name, kind in _TYPE_OF_NAME.items()}

# --- changes of arguments

MUTABLE = (list, dict, set, bytearray, collections.deque)
MUTABLE_TAGS = frozenset(
    (
        "list",
        "dict",
        "Counter",
        "OrderedDict",
        "defaultdict",
        "set",
        "bytearray",
        "deque",
        "ndarray",
    )
)


def write_back(original: Any, changed: Any) -> None:
    """Gives the containers in `original` the content that they have in `changed`.

    A container keeps its identity, if there is one of the same type at the same place.
    """
    pairs = [(original, changed)]
    done: set[int] = set()
    while pairs:
        old, new = pairs.pop()
        if id(old) not in done and type(old) is type(new):
            done.add(id(old))
            pairs += _replace_content(old, new)


def _replace_content(old: Any, new: Any) -> list[tuple[Any, Any]]:
    """Gives a container the content of another one of its type, and keeps the inner containers.

    Returns the pairs of containers of which it keeps the old one.
    """
    if isinstance(old, tuple):
        return list(zip(old, new, strict=False))
    if isinstance(old, dict):
        pairs = [(old[key], value) for key, value in new.items() if key in old]
        merged = {
            key: _merged(old[key], value) if key in old else value for key, value in new.items()
        }
        old.clear()
        old.update(merged)
        return pairs
    if isinstance(old, (list, collections.deque)):
        pairs = list(zip(old, new, strict=False))
        items = [*map(_merged, old, new), *list(new)[len(old) :]]
        old.clear()
        old.extend(items)
        return pairs
    if isinstance(old, set):
        old.clear()
        old.update(new)
    elif isinstance(old, bytearray):
        old[:] = new
    elif type(old).__module__ == "numpy" and old.shape == new.shape:
        old[...] = new
    return []


def _merged(old: Any, new: Any) -> Any:
    """Returns the old value if its content can be replaced, else the new one."""
    if type(old) is not type(new):
        return new
    is_array = type(old).__module__ == "numpy" and old.shape == new.shape
    return old if isinstance(old, MUTABLE) or is_array else new
