"""Calls between the judge and the program's process, in both directions.

Each process has a `Peer`. It sends references to its own objects and represents the objects of the
other process by `RemoteObject`s. A process can only use the objects to which it has a reference,
and only by the operations of `_OPERATIONS`.

The program may send anything, at any time. It can only choose the values that its own objects
return. The judge compares values itself; a comparison is sent only if both sides are objects of the
program.

A request is `{"op": "call", "value": SENT}`, where the value is the list of the operation's
arguments. The reply is `{"value": SENT}`, `{"error": SENT}` or `{"unreadable": reason}`. While a
process waits for a reply, a request can arrive: the call of a function that was an argument.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from grpo.rewards.judge.values import (
    MUTABLE_TAGS,
    ExchangeError,
    Node,
    Sent,
    decode,
    encode,
    write_back,
)
from grpo.rewards.workers.inside import frames

MAX_NESTED_REQUESTS = 200
MAX_ITERATED = 1_000_000  # items of one iterator
# The first items of an iterator are fetched one by one, as a `for` loop does, then many at a time.
MAX_SINGLE_ITEMS = 100
MAX_BATCH = 1000
KINDS = ("function", "class", "exception", "object", "iterator")
# Python's operations on one object that are passed on.
UNARY: dict[str, Callable[[Any], Any]] = {
    "len": len,
    "iter": iter,
    "hash": hash,
    "str": str,
    "bool": bool,
    "int": int,
    "float": float,
    "abs": abs,
    "neg": operator.neg,
}
# Python's operations on two objects that are passed on if both are objects of the other process. A
# value is never passed on, because it can be the expected one: in `abs(f(x) - 3) < 1e-6`, an object
# could return 0.
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "truediv": operator.truediv,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
}
# They lead to everything else in a process.
NEVER_SHARED = (types.ModuleType, types.FrameType, types.CodeType, types.TracebackType)


class RemoteObject:
    """An object of the other process: a function, class, instance or iterator.

    Attributes, calls and the operations of UNARY and BINARY are passed on. It is never equal to a
    value.
    """

    def __init__(self, peer: Peer, kind: str, handle: int, type_name: str, /) -> None:
        """Represents the object with a handle. `Peer` calls it."""
        set_field = object.__setattr__
        set_field(self, "_peer", peer)
        set_field(self, "_kind", kind)
        set_field(self, "_handle", handle)
        set_field(self, "_type_name", type_name)
        set_field(self, "_batch", [])
        set_field(self, "_num_iterated", 0)

    _peer: Peer
    _kind: str
    _handle: int
    _type_name: str
    _batch: list[Any]
    _num_iterated: int

    def __getattr__(self, name: str, /) -> Any:
        """Returns an attribute of the object."""
        if name == "__name__" and self._kind in ("function", "class"):
            return self._type_name
        if name.startswith("__"):  # asked by Python itself: copy, pickle, numpy
            raise AttributeError(name)
        return self._peer.request("getattr", self, name)

    def __setattr__(self, name: str, value: Any, /) -> None:
        """Sets an attribute of the object."""
        self._peer.request("setattr", self, name, value)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Calls the object. Containers in the arguments get the content that the call leaves."""
        result, changed = self._peer.request("call", self, args, kwargs)
        if changed is not None:
            write_back((args, kwargs), changed)
        return result

    def __iter__(self) -> Iterator[Any]:
        """Returns the iterator of the object."""
        if self._kind == "iterator":
            return self
        iterator: Iterator[Any] = self._peer.request("unary", "iter", self)
        return iterator

    def __next__(self) -> Any:
        """Returns the next item of an iterator."""
        if self._kind != "iterator":
            raise TypeError(f"{self!r} is no iterator")
        if not self._batch:
            self._fetch_items()
        return self._batch.pop()

    def _fetch_items(self) -> None:
        if self._num_iterated >= MAX_ITERATED:
            raise ValueError(f"an iterator with more than {MAX_ITERATED:,} items")
        count = 1 if self._num_iterated < MAX_SINGLE_ITEMS else MAX_BATCH
        items = self._peer.request("next", self, count)
        if type(items) is not list or len(items) > count:
            self._peer.end_exchange("its iterator returned no items")
        if not items:
            raise StopIteration
        object.__setattr__(self, "_num_iterated", self._num_iterated + len(items))
        object.__setattr__(self, "_batch", items[::-1])

    def __getitem__(self, key: Any) -> Any:
        """Returns an item of the object."""
        return self._peer.request("getitem", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Sets an item of the object."""
        self._peer.request("setitem", self, key, value)

    def __delitem__(self, key: Any) -> None:
        """Deletes an item of the object."""
        self._peer.request("delitem", self, key)

    def __contains__(self, value: Any) -> bool:
        """Returns whether an item of the object equals a value, which the object does not see."""
        return any(item is value or item == value for item in self)

    def __repr__(self) -> str:
        """Returns a description. It is not that of the object."""
        return f"<{self._kind} {self._type_name} of another process>"

    def __eq__(self, other: object) -> bool:
        """Returns whether the other process has two equal objects."""
        if self is other:
            return True
        return isinstance(other, RemoteObject) and bool(
            self._peer.request("binary", "eq", self, other)
        )

    def __hash__(self) -> int:
        """Returns the hash of the object."""
        return int(self._peer.request("unary", "hash", self))

    def __instancecheck__(self, instance: object) -> bool:
        """Returns whether an object is an instance of this remote class."""
        is_remote = self._kind == "class" and isinstance(instance, RemoteObject)
        return is_remote and bool(self._peer.request("isinstance", instance, self))

    def __subclasscheck__(self, subclass: object) -> bool:
        """Returns whether a remote class is derived from this one."""
        is_remote = self._kind == "class" and isinstance(subclass, RemoteObject)
        return is_remote and bool(self._peer.request("issubclass", subclass, self))

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Raises TypeError: the object is in another process."""
        raise TypeError(f"{self!r} cannot be copied")


def _define_operators() -> None:
    """Gives RemoteObject the methods for the operations of UNARY and BINARY."""

    def unary(name: str) -> Callable[[RemoteObject], Any]:
        return lambda self: self._peer.request("unary", name, self)

    def binary(name: str) -> Callable[[RemoteObject, object], Any]:
        def operate(self: RemoteObject, other: object) -> Any:
            if not isinstance(other, RemoteObject):
                return NotImplemented
            return self._peer.request("binary", name, self, other)

        return operate

    for name in UNARY:
        if f"__{name}__" not in RemoteObject.__dict__:
            setattr(RemoteObject, f"__{name}__", unary(name))
    for name in BINARY:
        if f"__{name}__" not in RemoteObject.__dict__:
            setattr(RemoteObject, f"__{name}__", binary(name))


_define_operators()


class Peer:
    """One side of the exchange."""

    def __init__(
        self,
        descriptor: int,
        *,
        is_judge: bool,
        shared_classes: dict[str, type],
        on_lost: Callable[[str, bool], NoReturn],
    ) -> None:
        """Uses a socket to the other process.

        Args:
            descriptor: Its file descriptor.
            is_judge: Whether the other process is not trusted. Then it can use few attributes of
                this process's objects, because most lead to everything else.
            shared_classes: Classes by name that both processes have. The judge receives what a
                function of the program returns of such a class as instances of its own class.
            on_lost: Called with the reason if the other process has ended (True) or has sent
                something wrong (False). It ends this process, so that no test can catch the error
                and continue.
        """
        self._descriptor = descriptor
        self._is_judge = is_judge
        self._shared_classes = shared_classes
        self._on_lost = on_lost
        self._local_objects: list[Any] = []  # by handle
        self._handles: dict[int, int] = {}  # by id of a local object
        self._remote_objects: dict[int, RemoteObject] = {}  # by handle
        self._remote_exceptions: dict[int, type[BaseException]] = {}  # by handle
        self._num_nested = 0
        self._namespace: dict[str, Any] = {}
        self.num_requests = 0  # to the other process

    def end_exchange(self, reason: str) -> NoReturn:
        """Ends this process, because the other one has sent something wrong."""
        self._on_lost(reason, False)

    def request(self, operation: str, *arguments: Any) -> Any:
        """Asks the other process for an operation and returns its result.

        Raises:
            Exception: The operation raised it.
        """
        self.num_requests += 1
        self._send({"op": operation, "value": self._encode(list(arguments))})
        while True:
            message = self._receive()
            if "op" in message:
                self._serve(message)
                continue
            if "unreadable" in message:
                self.end_exchange(str(message["unreadable"])[:200])
            if "error" in message:
                error = self._exception(message["error"])
                if isinstance(error, StopIteration):  # it would end a loop of the tests early
                    raise RuntimeError("the program raised StopIteration")
                raise error
            return self._decode(message.get("value"))

    def reply_unreadable(self, reason: str) -> None:
        """Answers the next request with a reason why nothing can be asked for."""
        self._receive()
        self._send({"unreadable": reason})

    def serve(self, namespace: dict[str, Any]) -> NoReturn:
        """Answers requests until the other process has ended.

        Args:
            namespace: The names that it may ask for.
        """
        self._namespace = namespace
        while True:
            message = self._receive()
            if "op" not in message:
                self.end_exchange("a reply without a request")
            self._serve(message)

    def _serve(self, message: dict[str, Any]) -> None:
        self._num_nested += 1
        if self._num_nested > MAX_NESTED_REQUESTS:
            self.end_exchange("too many nested calls")
        try:
            arguments = self._decode(message.get("value"))
            reply: dict[str, Any] = {"value": self._perform(message["op"], arguments)}
        except ExchangeError as error:
            reply = {"unreadable": str(error)}
        except Exception as error:
            reply = {"error": self._encode_exception(error)}
        self._num_nested -= 1
        self._send(reply)

    def _perform(self, operation: Any, arguments: Any) -> Sent:
        """Returns the result of an operation in its sent form."""
        if type(operation) is not str or operation not in _OPERATIONS:
            raise ExchangeError(f"unknown operation {operation!r}")
        if type(arguments) is not list:
            raise ExchangeError("the arguments are no list")
        result = _OPERATIONS[operation](self, *arguments)
        if operation == "call" and not self._is_judge:
            return encode(result, self._instance_or_reference)
        return self._encode(result)

    def require_shared(self, target: Any) -> None:
        """Raises ExchangeError unless the other process has a reference to an object."""
        handle = self._handles.get(id(target))
        if handle is None or self._local_objects[handle] is not target:
            raise ExchangeError("the other process has no reference to this object")

    def require_accessible(self, target: Any, name: Any) -> None:
        """Raises ExchangeError unless the other process may use an attribute.

        The program may use no attributes of the judge's functions and iterators, and none that
        begin with an underscore: they lead to the tests.
        """
        self.require_shared(target)
        if type(name) is not str or name.startswith("_" if self._is_judge else "__"):
            raise ExchangeError(f"the attribute {name!r} is not accessible")
        if self._is_judge and _kind_of(target) != "object":
            raise ExchangeError("the attributes of a function are not accessible")

    def require_assignable(self, target: Any, name: Any) -> None:
        """Raises ExchangeError unless the other process may assign to an attribute.

        The program may assign to the data of the judge's objects, not to their methods.
        """
        self.require_accessible(target, name)
        if self._is_judge and (not hasattr(target, name) or callable(getattr(target, name))):
            raise ExchangeError(f"the attribute {name!r} cannot be assigned to")

    def named_objects(self, names: Any) -> dict[str, Any]:
        """Returns those of the names that the namespace has, with their objects."""
        return {name: self._namespace[name] for name in names if name in self._namespace}

    def snapshot(self, args: Any, kwargs: Any) -> Sent | None:
        """Returns the content of arguments, None if they have no containers that can change."""
        sent = self._encode((args, kwargs))
        num_mutable = sum(tag in MUTABLE_TAGS for tag, _, _ in sent["nodes"])
        return sent if num_mutable > 1 else None  # kwargs is one

    # --- values

    def _encode(self, value: Any) -> Sent:
        return encode(value, self._reference)

    def _decode(self, sent: Any) -> Any:
        try:
            return decode(sent, self._resolve)
        except ExchangeError as error:
            self.end_exchange(str(error)[:200])

    def _instance_or_reference(self, value: Any) -> Node:
        """Returns the node for an object. An instance of a shared class is sent by value."""
        name = type(value).__name__
        if type(value) is self._shared_classes.get(name):
            return Node("instance", name, [], _attributes(value))
        return self._reference(value)

    def _reference(self, value: Any) -> Node:
        """Returns the node for an object that is not sent by value."""
        if isinstance(value, RemoteObject):
            return Node("local", value._handle, [])
        for exception_handle, exception in self._remote_exceptions.items():
            if value is exception:
                return Node("local", exception_handle, [])
        if isinstance(value, NEVER_SHARED):
            raise ExchangeError(f"a {type(value).__name__} cannot be exchanged")
        handle = self._handles.get(id(value), len(self._local_objects))
        if handle == len(self._local_objects):
            self._local_objects.append(value)
            self._handles[id(value)] = handle
        kind = _kind_of(value)
        name = str(getattr(value, "__name__", None) or type(value).__name__)
        bases = [value.__base__] if kind == "exception" else []
        return Node("remote", [kind, handle, name], bases)

    def _resolve(self, tag: Any, constant: Any, parts: list[Any]) -> Any:
        """Returns the object of a reference. Raises an error that `decode` knows if it is wrong."""
        if tag == "local":
            if type(constant) is not int or constant < 0:
                raise TypeError("a wrong handle")
            return self._local_objects[constant]
        if tag == "instance" and self._is_judge:
            return object.__new__(self._shared_classes[constant])
        if tag != "remote":
            raise ValueError(f"unknown tag {tag!r}")
        kind, handle, name = constant
        if kind not in KINDS or type(handle) is not int or type(name) is not str:
            raise ValueError("a wrong reference")
        if kind == "exception":
            return self._exception_class(handle, name, *parts)
        if handle not in self._remote_objects:
            self._remote_objects[handle] = RemoteObject(self, kind, handle, name)
        return self._remote_objects[handle]

    def _exception_class(self, handle: int, name: str, base: Any) -> type[BaseException]:
        """Returns a class that stands for an exception class of the other process."""
        if handle not in self._remote_exceptions:
            if not isinstance(base, type) or not issubclass(base, Exception):
                base = Exception
            self._remote_exceptions[handle] = type(name, (base,), {})
        return self._remote_exceptions[handle]

    def _encode_exception(self, error: Exception) -> Sent:
        try:
            return self._encode([type(error), *error.args])
        except ExchangeError:
            return self._encode([type(error), str(error)])

    def _exception(self, sent: Any) -> Exception:
        """Returns the exception of an error reply."""
        received = self._decode(sent)
        if type(received) is not list or not received:
            self.end_exchange("an error without a class")
        kind, *args = received
        if not isinstance(kind, type) or not issubclass(kind, Exception):
            self.end_exchange("an error that is no exception")
        try:
            error = kind(*args)
        except Exception:
            error = Exception.__new__(kind)
            error.args = tuple(args)
        return error

    # --- messages

    def _send(self, message: dict[str, Any]) -> None:
        try:
            frames.send(self._descriptor, message)
        except frames.ClosedError as error:
            self._on_lost(str(error), True)
        except (frames.FrameError, MemoryError) as error:
            self.end_exchange(str(error))

    def _receive(self) -> dict[str, Any]:
        try:
            message = frames.receive(self._descriptor)
        except frames.ClosedError as error:
            self._on_lost(str(error), True)
        except frames.FrameError as error:
            self.end_exchange(str(error))
        if type(message) is not dict:
            self.end_exchange("a message that is no request and no reply")
        return message


def _kind_of(value: Any) -> str:
    if isinstance(value, type):
        return "exception" if issubclass(value, BaseException) else "class"
    if hasattr(type(value), "__next__"):
        return "iterator"
    is_function = hasattr(value, "__name__") and callable(value)
    return "function" if is_function else "object"


def _attributes(instance: Any) -> dict[str, Any]:
    """Returns the attributes of an instance, with or without `__slots__`."""
    attributes = dict(getattr(instance, "__dict__", {}))
    for kind in type(instance).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            if hasattr(instance, name):
                attributes[name] = getattr(instance, name)
    return attributes


# --- operations


def _names(peer: Peer, names: Any) -> dict[str, Any]:
    return peer.named_objects(names)


def _call(peer: Peer, function: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Returns the result of a call, and its arguments if the call has changed them, else None."""
    peer.require_shared(function)
    before = peer.snapshot(args, kwargs)
    result = function(*args, **kwargs)
    if before is None or peer.snapshot(args, kwargs) == before:
        return (result, None)
    return (result, (args, kwargs))


def _getattr(peer: Peer, target: Any, name: Any) -> Any:
    peer.require_accessible(target, name)
    return getattr(target, name)


def _setattr(peer: Peer, target: Any, name: Any, value: Any) -> None:
    peer.require_assignable(target, name)
    setattr(target, name, value)


def _next(peer: Peer, iterator: Any, count: Any) -> list[Any]:
    peer.require_shared(iterator)
    items: list[Any] = []
    for item in iterator:
        items.append(item)
        if len(items) >= count:
            break
    return items


def _getitem(peer: Peer, target: Any, key: Any) -> Any:
    peer.require_shared(target)
    return target[key]


def _setitem(peer: Peer, target: Any, key: Any, value: Any) -> None:
    peer.require_shared(target)
    target[key] = value


def _delitem(peer: Peer, target: Any, key: Any) -> None:
    peer.require_shared(target)
    del target[key]


def _unary(peer: Peer, name: Any, target: Any) -> Any:
    peer.require_shared(target)
    return UNARY[name](target)


def _binary(peer: Peer, name: Any, first: Any, second: Any) -> Any:
    peer.require_shared(first)
    peer.require_shared(second)
    return BINARY[name](first, second)


def _isinstance(peer: Peer, instance: Any, kind: Any) -> bool:
    peer.require_shared(instance)
    return isinstance(instance, kind)


def _issubclass(peer: Peer, subclass: Any, kind: Any) -> bool:
    peer.require_shared(subclass)
    return issubclass(subclass, kind)


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "names": _names,
    "call": _call,
    "getattr": _getattr,
    "setattr": _setattr,
    "getitem": _getitem,
    "setitem": _setitem,
    "delitem": _delitem,
    "next": _next,
    "unary": _unary,
    "binary": _binary,
    "isinstance": _isinstance,
    "issubclass": _issubclass,
}
