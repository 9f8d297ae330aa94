"""The opcodes of a pickle, one function each, and the table that dispatches on them.

The functions move values between the stack and the machine; every decision about what is allowed
is a method of the machine.
"""

from __future__ import annotations

import pickle
import re
import struct
from typing import TYPE_CHECKING, Any

from h5traces.sources.pickle.source import MalformedError, RefusedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from h5traces.sources.pickle.machine import Machine

    Handler = Callable[[Machine], None]

HIGHEST_PROTOCOL = 5
# Enough for every int that belongs into a trace; int() of text takes quadratic time.
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

TABLE: list[Handler] = []


def _integer(line: bytes) -> int:
    if not _INTEGER.fullmatch(line):
        message = f"the text of an int is {line[:40]!r}"
        raise MalformedError(message)
    return int(line.rstrip(b"L"))


def _proto(m: Machine) -> None:
    protocol = m.number(1)
    if protocol > HIGHEST_PROTOCOL:
        message = f"pickle protocol {protocol} is unknown, expected 0 to {HIGHEST_PROTOCOL}"
        raise MalformedError(message)


def _frame(m: Machine) -> None:
    # Frames only help readers to buffer. Reading on regardless needs no trust in the length.
    m.number(8)


def _stop(m: Machine) -> None:
    m.result = m.stack.pop()
    if m.stack or m.meta:
        message = "the pickle stops and values are left on the stack"
        raise RefusedError(message)
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


def _dup(m: Machine) -> None:
    m.push_again(m.stack[-1])


# --- constants and numbers ---------------------------------------------------------------------


def _none(m: Machine) -> None:
    m.stack.append(None)


def _true(m: Machine) -> None:
    m.stack.append(True)


def _false(m: Machine) -> None:
    m.stack.append(False)


def _int(m: Machine) -> None:
    line = m.line(_MAX_NUMBER_CHARS)
    if line in (b"00", b"01"):
        m.stack.append(line == b"01")
    else:
        m.stack.append(_integer(line))


def _long(m: Machine) -> None:
    m.stack.append(_integer(m.line(_MAX_NUMBER_CHARS)))


def _binint(m: Machine) -> None:
    m.stack.append(int.from_bytes(m.source.read(4), "little", signed=True))


def _binint1(m: Machine) -> None:
    m.stack.append(m.source.read(1)[0])


def _binint2(m: Machine) -> None:
    m.stack.append(int.from_bytes(m.source.read(2), "little"))


def _long_of(m: Machine, num_bytes: int) -> None:
    if num_bytes > _MAX_LONG_NBYTES:
        message = f"an int of {num_bytes:,} bytes, expected at most {_MAX_LONG_NBYTES:,}"
        raise RefusedError(message)
    m.stack.append(int.from_bytes(m.source.read(num_bytes), "little", signed=True))


def _float(m: Machine) -> None:
    line = m.line(_MAX_NUMBER_CHARS)
    if not _FLOAT.fullmatch(line):
        message = f"the text of a float is {line[:40]!r}"
        raise MalformedError(message)
    m.stack.append(float(line))


def _binfloat(m: Machine) -> None:
    m.stack.append(_double(m.source.read(8))[0])


# --- strings and bytes -------------------------------------------------------------------------


def _unicode(m: Machine) -> None:
    line = m.line(m.limits.max_string_nbytes)
    m.count_payload(len(line))
    m.stack.append(str(line, "raw-unicode-escape"))


def _string(m: Machine) -> None:
    line = m.line(m.limits.max_string_nbytes)
    m.count_payload(len(line))
    match = _PLAIN_STRING.fullmatch(line)
    if match is None:
        message = f"the text of a Python 2 string is {line[:40]!r}"
        raise MalformedError(message)
    m.stack.append(m.ascii(_ESCAPE.sub(_unescape, match[2])))


def _unescape(match: re.Match[bytes]) -> bytes:
    code = match[1]
    return bytes([int(code[1:], 16)]) if code[:1] == b"x" else _ESCAPED.get(code, code)


def _text(width: int) -> Handler:
    def handler(m: Machine) -> None:
        m.stack.append(m.take_text(int.from_bytes(m.source.read(width), "little")))

    return handler


def _bytes(width: int) -> Handler:
    def handler(m: Machine) -> None:
        m.stack.append(m.take_bytes(int.from_bytes(m.source.read(width), "little")))

    return handler


def _old_text(width: int) -> Handler:
    def handler(m: Machine) -> None:
        m.stack.append(m.ascii(m.take_bytes(int.from_bytes(m.source.read(width), "little"))))

    return handler


def _bytearray8(m: Machine) -> None:
    m.stack.append(m.take_buffer(m.number(8)))


# --- containers --------------------------------------------------------------------------------


def _empty_list(m: Machine) -> None:
    m.stack.append([])
    m.pushed()


def _empty_dict(m: Machine) -> None:
    m.stack.append({})
    m.pushed()


def _list(m: Machine) -> None:
    values = m.pop_mark()
    m.stack.append(values)
    m.pushed()


def _dict(m: Machine) -> None:
    flat = m.pop_mark()
    new: dict[Any, Any] = {}
    m.set_items(new, flat)
    m.stack.append(new)
    m.pushed()


def _append(m: Machine) -> None:
    value = m.stack.pop()
    m.extend(m.stack[-1], [value])


def _appends(m: Machine) -> None:
    values = m.pop_mark()
    m.extend(m.stack[-1], values)


def _setitem(m: Machine) -> None:
    value = m.stack.pop()
    key = m.stack.pop()
    m.set_items(m.stack[-1], [key, value])


def _setitems(m: Machine) -> None:
    flat = m.pop_mark()
    m.set_items(m.stack[-1], flat)


def _empty_tuple(m: Machine) -> None:
    m.stack.append(())


def _tuple(m: Machine) -> None:
    values = tuple(m.pop_mark())
    m.stack.append(values)


def _tuple1(m: Machine) -> None:
    stack = m.stack
    stack[-1] = (stack[-1],)


def _tuple2(m: Machine) -> None:
    stack = m.stack
    second = stack.pop()
    stack[-1] = (stack[-1], second)


def _tuple3(m: Machine) -> None:
    stack = m.stack
    third = stack.pop()
    second = stack.pop()
    stack[-1] = (stack[-1], second, third)


# --- memo --------------------------------------------------------------------------------------


def _memoize(m: Machine) -> None:
    m.put(m.next_slot)


def _put(m: Machine) -> None:
    m.put(_integer(m.line(_MAX_NUMBER_CHARS)))


def _binput(m: Machine) -> None:
    m.put(m.source.read(1)[0])


def _long_binput(m: Machine) -> None:
    m.put(m.number(4))


def _get(m: Machine) -> None:
    m.get(_integer(m.line(_MAX_NUMBER_CHARS)))


def _binget(m: Machine) -> None:
    m.get(m.source.read(1)[0])


def _long_binget(m: Machine) -> None:
    m.get(m.number(4))


# --- globals and calls -------------------------------------------------------------------------


def _global(m: Machine) -> None:
    module = str(m.line(_MAX_NAME_NBYTES), "utf-8")
    m.stack.append(m.find(module, str(m.line(_MAX_NAME_NBYTES), "utf-8")))


def _stack_global(m: Machine) -> None:
    name = m.stack.pop()
    module = m.stack.pop()
    m.stack.append(m.find(module, name))


def _reduce(m: Machine) -> None:
    args = m.stack.pop()
    function = m.stack.pop()
    m.call(function, args)


def _build(m: Machine) -> None:
    state = m.stack.pop()
    m.build(m.stack[-1], state)


def _binpersid(m: Machine) -> None:
    value = m.persistent(m.stack.pop())
    m.stack.append(value)


def _refused(name: str, why: str) -> Handler:
    def handler(_m: Machine) -> None:
        message = f"{name} {why}; batches of arrays never need it"
        raise RefusedError(message)

    return handler


def _unknown(m: Machine) -> None:
    message = f"byte 0x{m.opcode:02x} is no pickle opcode, so this is no pickle or a damaged one"
    raise MalformedError(message)


_HANDLERS: dict[bytes, Handler] = {
    pickle.PROTO: _proto,
    pickle.FRAME: _frame,
    pickle.STOP: _stop,
    pickle.MARK: _mark,
    pickle.POP: _pop,
    pickle.POP_MARK: _pop_mark,
    pickle.DUP: _dup,
    pickle.NONE: _none,
    pickle.NEWTRUE: _true,
    pickle.NEWFALSE: _false,
    pickle.INT: _int,
    pickle.LONG: _long,
    pickle.BININT: _binint,
    pickle.BININT1: _binint1,
    pickle.BININT2: _binint2,
    pickle.LONG1: lambda m: _long_of(m, m.number(1)),
    pickle.LONG4: lambda m: _long_of(m, m.number(4)),
    pickle.FLOAT: _float,
    pickle.BINFLOAT: _binfloat,
    pickle.UNICODE: _unicode,
    pickle.SHORT_BINUNICODE: _text(1),
    pickle.BINUNICODE: _text(4),
    pickle.BINUNICODE8: _text(8),
    pickle.STRING: _string,
    pickle.SHORT_BINSTRING: _old_text(1),
    pickle.BINSTRING: _old_text(4),
    pickle.SHORT_BINBYTES: _bytes(1),
    pickle.BINBYTES: _bytes(4),
    pickle.BINBYTES8: _bytes(8),
    pickle.BYTEARRAY8: _bytearray8,
    pickle.EMPTY_LIST: _empty_list,
    pickle.EMPTY_DICT: _empty_dict,
    pickle.EMPTY_TUPLE: _empty_tuple,
    pickle.LIST: _list,
    pickle.DICT: _dict,
    pickle.TUPLE: _tuple,
    pickle.TUPLE1: _tuple1,
    pickle.TUPLE2: _tuple2,
    pickle.TUPLE3: _tuple3,
    pickle.APPEND: _append,
    pickle.APPENDS: _appends,
    pickle.SETITEM: _setitem,
    pickle.SETITEMS: _setitems,
    pickle.MEMOIZE: _memoize,
    pickle.PUT: _put,
    pickle.BINPUT: _binput,
    pickle.LONG_BINPUT: _long_binput,
    pickle.GET: _get,
    pickle.BINGET: _binget,
    pickle.LONG_BINGET: _long_binget,
    pickle.GLOBAL: _global,
    pickle.STACK_GLOBAL: _stack_global,
    pickle.REDUCE: _reduce,
    pickle.NEWOBJ: _reduce,
    pickle.BUILD: _build,
    pickle.BINPERSID: _binpersid,
    pickle.PERSID: _refused("PERSID", "refers to an object outside of the pickle"),
    pickle.INST: _refused("INST", "makes an instance of a class"),
    pickle.OBJ: _refused("OBJ", "makes an instance of a class"),
    pickle.NEWOBJ_EX: _refused("NEWOBJ_EX", "makes an instance of a class"),
    pickle.EXT1: _refused("EXT1", "looks a class up in the extension registry"),
    pickle.EXT2: _refused("EXT2", "looks a class up in the extension registry"),
    pickle.EXT4: _refused("EXT4", "looks a class up in the extension registry"),
    pickle.NEXT_BUFFER: _refused("NEXT_BUFFER", "refers to a buffer outside of the pickle"),
    pickle.READONLY_BUFFER: _refused("READONLY_BUFFER", "refers to an outside buffer"),
    pickle.EMPTY_SET: _refused("EMPTY_SET", "makes a set"),
    pickle.ADDITEMS: _refused("ADDITEMS", "fills a set"),
    pickle.FROZENSET: _refused("FROZENSET", "makes a set"),
}
TABLE.extend(_HANDLERS.get(bytes([code]), _unknown) for code in range(256))
