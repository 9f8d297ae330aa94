"""What every opcode of pickles does to a machine; those that would run code are rejected."""

from __future__ import annotations

import pickle
import re
import struct
from typing import TYPE_CHECKING, Any, Final

from h5traces.sources.pickle.source import contradict, reject

if TYPE_CHECKING:
    from collections.abc import Callable

    from h5traces.sources.pickle.machine import Machine

    Handler = Callable[[Machine], object]


HIGHEST_PROTOCOL = 5
# Enough for every int of a trace; int() of a text takes quadratic time.
_MAX_LONG_NBYTES = 1024
_MAX_NUMBER_CHARS = 2500
_MAX_NAME_NBYTES = 1024
_INTEGER = re.compile(rb"[+-]?[0-9]+L?")
_FLOAT = re.compile(rb"[+-]?([0-9.]+(e[+-]?[0-9]+)?|inf|nan)", re.IGNORECASE)
# What repr() of a str writes in Python 2; other escapes would need a real parser.
_PLAIN_STRING = re.compile(rb"""(['"])((?:[^\\]|\\[\\'"nrt]|\\x[0-9a-fA-F]{2})*)\1""", re.DOTALL)
_ESCAPE = re.compile(rb"""\\(x[0-9a-fA-F]{2}|.)""", re.DOTALL)
_ESCAPED = {b"n": b"\n", b"r": b"\r", b"t": b"\t"}
_double = struct.Struct(">d").unpack


def _integer(line: bytes) -> int:
    if not _INTEGER.fullmatch(line):
        contradict(f"the text of an int is {line[:40]!r}")
    return int(line.rstrip(b"L"))


def _proto(m: Machine) -> None:
    protocol = m.number(1)
    if protocol > HIGHEST_PROTOCOL:
        contradict(f"pickle protocol {protocol} is unknown, expected 0 to {HIGHEST_PROTOCOL}")


def _stop(m: Machine) -> None:
    m.result = m.stack.pop()
    if m.stack or m.meta:
        reject("the pickle stops and values are left on the stack")
    m.stopped = m.halted = True


def _mark(m: Machine) -> None:
    if len(m.meta) >= m.limits.max_mark_depth:
        m.exceed("marks open at the same time", "max_mark_depth")
    m.meta.append(m.stack)
    m.stack = []


def _pop(m: Machine) -> None:
    if m.stack:
        m.drop(m.stack.pop())
    else:
        m.pop_mark()


def _pop_mark(m: Machine) -> None:
    for value in m.pop_mark():
        m.drop(value)


# --- constants and numbers ---------------------------------------------------------------------


def _int(m: Machine) -> None:
    line = m.source.readline(_MAX_NUMBER_CHARS)
    if line in (b"00", b"01"):
        m.stack.append(line == b"01")
    else:
        m.stack.append(_integer(line))


def _long_of(m: Machine, num_bytes: int) -> None:
    if num_bytes > _MAX_LONG_NBYTES:
        reject(f"an int of {num_bytes:,} bytes, expected at most {_MAX_LONG_NBYTES:,}")
    m.stack.append(m.number(num_bytes, signed=True))


def _float(m: Machine) -> None:
    line = m.source.readline(_MAX_NUMBER_CHARS)
    if not _FLOAT.fullmatch(line):
        contradict(f"the text of a float is {line[:40]!r}")
    m.stack.append(float(line))


# --- strings and bytes -------------------------------------------------------------------------


def _unicode(m: Machine) -> None:
    line = m.source.readline(m.limits.max_string_nbytes)
    m.count_payload(len(line))
    m.stack.append(str(line, "raw-unicode-escape"))


def _string(m: Machine) -> None:
    line = m.source.readline(m.limits.max_string_nbytes)
    m.count_payload(len(line))
    match = _PLAIN_STRING.fullmatch(line)
    if match is None:
        contradict(f"the text of a Python 2 string is {line[:40]!r}")
    m.stack.append(m.ascii(_ESCAPE.sub(_unescape, match[2])))


def _unescape(match: re.Match[bytes]) -> bytes:
    code = match[1]
    return bytes([int(code[1:], 16)]) if code[:1] == b"x" else _ESCAPED.get(code, code)


# --- containers --------------------------------------------------------------------------------


def _push(m: Machine, value: Any) -> None:
    """Push a new list or dict."""
    m.stack.append(value)
    m.pushed()


def _dict(m: Machine) -> None:
    flat = m.pop_mark()
    m.stack.append({})
    m.set_items(flat)
    m.pushed()


def _setitem(m: Machine) -> None:
    value = m.stack.pop()
    key = m.stack.pop()
    m.set_items([key, value])


def _tuple(m: Machine) -> None:
    values = tuple(m.pop_mark())  # before `m.stack`, which it replaces
    m.stack.append(values)
    m.pushed(existing=True)


def _tuple_of(length: int) -> Handler:
    def handler(m: Machine) -> None:
        values = [m.stack.pop() for _ in range(length)]
        m.stack.append(tuple(reversed(values)))
        m.pushed(existing=True)

    return handler


# --- globals and calls -------------------------------------------------------------------------


def _global(m: Machine) -> None:
    module = str(m.source.readline(_MAX_NAME_NBYTES), "utf-8")
    m.stack.append(m.find(module, str(m.source.readline(_MAX_NAME_NBYTES), "utf-8")))


def _stack_global(m: Machine) -> None:
    name = m.stack.pop()
    module = m.stack.pop()
    m.stack.append(m.find(module, name))


def _reduce(m: Machine) -> None:
    args = m.stack.pop()
    function = m.stack.pop()
    m.call(function, args)


def _frozenset(m: Machine) -> None:
    values = m.pop_mark()
    m.check_keys(values, "an element of a set")
    m.stack.append(frozenset(values))


def _rejected(name: str, why: str) -> Handler:
    def handler(_m: Machine) -> None:
        reject(f"{name} {why}; batches of arrays never need it")

    return handler


def _unknown(m: Machine) -> None:
    contradict(
        f"byte 0x{m.opcode:02x} is no pickle opcode: this is no pickle, or bytes of it are missing"
    )


_BY_OPCODE: dict[bytes, Handler] = {
    pickle.PROTO: _proto,
    # Frames only help readers to buffer; the length is not needed, nor trusted.
    pickle.FRAME: lambda m: m.number(8),
    pickle.STOP: _stop,
    pickle.MARK: _mark,
    pickle.POP: _pop,
    pickle.POP_MARK: _pop_mark,
    pickle.DUP: lambda m: m.push_again(m.stack[-1]),
    pickle.NONE: lambda m: m.stack.append(None),
    pickle.NEWTRUE: lambda m: m.stack.append(True),
    pickle.NEWFALSE: lambda m: m.stack.append(False),
    pickle.INT: _int,
    pickle.LONG: lambda m: m.stack.append(_integer(m.source.readline(_MAX_NUMBER_CHARS))),
    pickle.BININT: lambda m: m.stack.append(m.number(4, signed=True)),
    pickle.BININT1: lambda m: m.stack.append(m.number(1)),
    pickle.BININT2: lambda m: m.stack.append(m.number(2)),
    pickle.LONG1: lambda m: _long_of(m, m.number(1)),
    pickle.LONG4: lambda m: _long_of(m, m.number(4)),
    pickle.FLOAT: _float,
    pickle.BINFLOAT: lambda m: m.stack.append(_double(m.source.read(8))[0]),
    pickle.UNICODE: _unicode,
    pickle.SHORT_BINUNICODE: lambda m: m.stack.append(m.take_text(m.number(1))),
    pickle.BINUNICODE: lambda m: m.stack.append(m.take_text(m.number(4))),
    pickle.BINUNICODE8: lambda m: m.stack.append(m.take_text(m.number(8))),
    pickle.STRING: _string,
    pickle.SHORT_BINSTRING: lambda m: m.stack.append(m.ascii(m.take_bytes(m.number(1)))),
    pickle.BINSTRING: lambda m: m.stack.append(m.ascii(m.take_bytes(m.number(4)))),
    pickle.SHORT_BINBYTES: lambda m: m.stack.append(m.take_bytes(m.number(1))),
    pickle.BINBYTES: lambda m: m.stack.append(m.take_bytes(m.number(4))),
    pickle.BINBYTES8: lambda m: m.stack.append(m.take_bytes(m.number(8))),
    pickle.BYTEARRAY8: lambda m: m.stack.append(m.take_buffer(m.number(8))),
    pickle.EMPTY_LIST: lambda m: _push(m, []),
    pickle.EMPTY_DICT: lambda m: _push(m, {}),
    pickle.EMPTY_TUPLE: lambda m: m.stack.append(()),
    pickle.LIST: lambda m: _push(m, m.pop_mark()),
    pickle.DICT: _dict,
    pickle.TUPLE: _tuple,
    pickle.TUPLE1: _tuple_of(1),
    pickle.TUPLE2: _tuple_of(2),
    pickle.TUPLE3: _tuple_of(3),
    pickle.APPEND: lambda m: m.extend([m.stack.pop()]),
    pickle.APPENDS: lambda m: m.extend(m.pop_mark()),
    pickle.SETITEM: _setitem,
    pickle.SETITEMS: lambda m: m.set_items(m.pop_mark()),
    pickle.MEMOIZE: lambda m: m.put(m.next_slot),
    pickle.PUT: lambda m: m.put(_integer(m.source.readline(_MAX_NUMBER_CHARS))),
    pickle.BINPUT: lambda m: m.put(m.number(1)),
    pickle.LONG_BINPUT: lambda m: m.put(m.number(4)),
    pickle.GET: lambda m: m.get(_integer(m.source.readline(_MAX_NUMBER_CHARS))),
    pickle.BINGET: lambda m: m.get(m.number(1)),
    pickle.LONG_BINGET: lambda m: m.get(m.number(4)),
    pickle.GLOBAL: _global,
    pickle.STACK_GLOBAL: _stack_global,
    pickle.REDUCE: _reduce,
    pickle.NEWOBJ: _reduce,
    pickle.BUILD: lambda m: m.build(m.stack.pop()),
    pickle.BINPERSID: lambda m: m.stack.append(m.persistent(m.stack.pop())),
    pickle.PERSID: _rejected("PERSID", "refers to an object outside of the pickle"),
    pickle.INST: _rejected("INST", "makes an instance of a class"),
    pickle.OBJ: _rejected("OBJ", "makes an instance of a class"),
    pickle.NEWOBJ_EX: _rejected("NEWOBJ_EX", "makes an instance of a class"),
    pickle.EXT1: _rejected("EXT1", "looks a class up in the extension registry"),
    pickle.EXT2: _rejected("EXT2", "looks a class up in the extension registry"),
    pickle.EXT4: _rejected("EXT4", "looks a class up in the extension registry"),
    pickle.NEXT_BUFFER: _rejected("NEXT_BUFFER", "refers to a buffer outside of the pickle"),
    pickle.READONLY_BUFFER: _rejected("READONLY_BUFFER", "refers to an outside buffer"),
    pickle.EMPTY_SET: lambda m: m.stack.append(set()),
    pickle.ADDITEMS: lambda m: m.add_items(m.pop_mark()),
    pickle.FROZENSET: _frozenset,
}
# By the byte of an opcode.
HANDLERS: Final = [_BY_OPCODE.get(bytes([code]), _unknown) for code in range(256)]
