"""Pickles made to run code, to crash the reader or to exhaust memory or time.

Every attack must end in an error of ours within seconds, import nothing, and take little memory.
The attacks are written as raw opcodes: pickle.dumps would not write most of them.
"""

from __future__ import annotations

import gzip
import json
import pickle
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from h5traces.errors import ConversionError, UnsafePickleError
from h5traces.sources.pickle.stream import BatchStream

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_SECONDS = 20  # of which a slow machine needs a part; most attacks end within milliseconds
MAX_EXTRA_NBYTES = 300 << 20
MILLION = 1_000_000


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def raw(data: bytes) -> bytes:
    return b"B" + len(data).to_bytes(4, "little") + data


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def stack_named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def item(value: bytes) -> bytes:
    """A batch of one dict with that value."""
    return b"\x80\x04](}" + text("key") + value + b"se."


def call(function: bytes, *args: bytes) -> bytes:
    return function + b"(" + b"".join(args) + b"tR"


def dtype(code: bytes = text("f8"), state: bytes | None = None) -> bytes:
    state = state or b"(K\x03" + text("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"
    return call(named("numpy", "dtype"), code, b"\x89", b"\x88") + state + b"b"


def array(state: bytes) -> bytes:
    reconstruct = named("numpy.core.multiarray", "_reconstruct")
    return call(reconstruct, named("numpy", "ndarray"), b"K\x00\x85", raw(b"b")) + state + b"b"


def load_from_bytes(stream: bytes) -> bytes:
    return call(named("torch.storage", "_load_from_bytes"), raw(stream))


def torch_stream(storage: bytes, *, numel: int = 1, data: bytes = bytes(4)) -> bytes:
    persistent = b"(" + text("storage") + storage + text("0") + text("cpu")
    persistent += b"J" + numel.to_bytes(4, "little") + b"NtQ"
    return (
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
        + b"\x80\x02}"
        + text("little_endian")
        + b"\x88s.\x80\x02"
        + persistent
        + b".\x80\x02]"
        + text("0")
        + b"a."
        + numel.to_bytes(8, "little")
        + data
    )


def tensor(storage: bytes, size: bytes, stride: bytes, offset: bytes = b"K\x00") -> bytes:
    rebuild = named("torch._utils", "_rebuild_tensor_v2")
    return call(rebuild, storage, offset, size, stride, b"\x89", b"}")


def size_8(length: int) -> bytes:
    return length.to_bytes(8, "little")


OBJECTS = dtype(text("O8"), b"(K\x03" + text("|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?t")


def joblib_array(
    shape: bytes, of: bytes | None = None, subclass: bytes = b"cnumpy\nndarray\n"
) -> bytes:
    state = b"}(" + text("subclass") + subclass + text("shape") + shape
    state += text("order") + text("C") + text("dtype") + (of or dtype()) + b"u"
    return named("joblib.numpy_pickle", "NumpyArrayWrapper") + b")\x81" + state + b"b"


SYSTEM = text("echo executed > executed.txt")
STORAGE = named("torch", "FloatStorage")

# Name -> the pickle, and what the message says.
ATTACKS: dict[str, tuple[Callable[[], bytes], str]] = {
    # code
    "os.system by GLOBAL": (lambda: item(call(named("os", "system"), SYSTEM)), "'os' 'system'"),
    "posix.system": (lambda: item(call(named("posix", "system"), SYSTEM)), "'posix' 'system'"),
    "os.system by STACK_GLOBAL": (
        lambda: item(call(stack_named("os", "system"), SYSTEM)),
        "'os' 'system'",
    ),
    "os.system as the root": (lambda: call(named("os", "system"), SYSTEM) + b".", "'os' 'system'"),
    "dotted name": (
        lambda: item(call(stack_named("numpy", "core.multiarray.os.system"), SYSTEM)),
        "'numpy' 'core.multiarray.os.system'",
    ),
    "dotted name below an allowed one": (
        lambda: item(call(stack_named("numpy", "ndarray.__class__"), SYSTEM)),
        "'numpy' 'ndarray.__class__'",
    ),
    "allowed name with a space": (lambda: item(named("numpy", "dtype ")), "'dtype '"),
    "module that would be imported": (lambda: item(named("this", "s")), "'this' 's'"),
    "eval": (lambda: item(call(named("builtins", "eval"), text("1"))), "'builtins' 'eval'"),
    "exec": (lambda: item(call(named("__builtin__", "exec"), text("1"))), "'exec'"),
    "getattr": (
        lambda: item(call(named("builtins", "getattr"), named("numpy", "dtype"), text("x"))),
        "'builtins' 'getattr'",
    ),
    "numpy.load": (lambda: item(call(named("numpy", "load"), text("x.npy"))), "'load'"),
    "numpy.core.multiarray.fromfile": (
        lambda: item(named("numpy.core.multiarray", "fromfile")),
        "'fromfile'",
    ),
    "torch.load": (lambda: item(named("torch", "load")), "'torch' 'load'"),
    "STACK_GLOBAL with other types": (
        lambda: item(b"K\x01K\x02\x93"),
        "named by an int and an int",
    ),
    "STACK_GLOBAL with a list": (lambda: item(b"]]\x93"), "named by a list and a list"),
    "INST": (lambda: item(b"(" + SYSTEM + b"ios\nsystem\n"), "INST"),
    "OBJ": (lambda: item(b"(" + named("numpy", "dtype") + b"o"), "OBJ"),
    "NEWOBJ on a type": (lambda: item(text("x") + b")\x81"), "a str is called"),
    "NEWOBJ_EX": (lambda: item(named("numpy", "dtype") + b")}\x92"), "NEWOBJ_EX"),
    "REDUCE on an array": (
        lambda: item(array(b"(K\x01K\x01\x85" + dtype() + b"\x89" + raw(bytes(8)) + b"t") + b")R"),
        "a ndarray is called",
    ),
    "extension registry": (lambda: item(b"\x82\x01"), "EXT1.*extension registry"),
    "extension registry, wide": (lambda: item(b"\x84\x01\x00\x00\x00"), "EXT4"),
    "persistent id": (lambda: item(text("id") + b"Q"), "outside of itself"),
    "persistent id, text": (lambda: item(b"Pid\n"), "PERSID"),
    "out-of-band buffer": (lambda: item(b"\x97"), "NEXT_BUFFER"),
    "read-only buffer": (lambda: item(raw(b"x") + b"\x98"), "READONLY_BUFFER"),
    "set of lists": (lambda: item(b"\x8f(]\x90"), "an element of a set is a list"),
    # pickles inside of pickles
    "pickle inside a storage": (
        lambda: item(load_from_bytes(b"\x80\x02" + call(named("os", "system"), SYSTEM) + b".")),
        "'os' 'system'",
    ),
    "pickle inside the header of a storage": (
        lambda: item(load_from_bytes(torch_stream(call(named("os", "system"), SYSTEM)))),
        "'os' 'system'",
    ),
    "storage inside a storage": (
        lambda: item(load_from_bytes(torch_stream(load_from_bytes(torch_stream(STORAGE))))),
        "'torch.storage' '_load_from_bytes'",
    ),
    "allowed call inside a storage": (
        lambda: item(load_from_bytes(torch_stream(dtype()))),
        "'numpy' 'dtype'",
    ),
    "zip file inside a storage": (lambda: item(load_from_bytes(b"PK\x03\x04")), "PERSID"),
    "storage type that is called": (
        lambda: item(load_from_bytes(torch_stream(STORAGE + b")R"))),
        "torch.FloatStorage is called",
    ),
    "storage of a declared size": (
        lambda: item(load_from_bytes(torch_stream(STORAGE, numel=MILLION))),
        "needs 4,000,000 bytes, found 4",
    ),
    "storage as a value": (lambda: item(load_from_bytes(torch_stream(STORAGE))), "a Storage"),
    "tensor beyond its storage": (
        lambda: item(
            tensor(load_from_bytes(torch_stream(STORAGE)), b"K\x02\x85", b"M\xff\xff\x85")
        ),
        "reaches element 65,535",
    ),
    "tensor with stride 0": (
        lambda: item(
            tensor(
                load_from_bytes(torch_stream(STORAGE)),
                b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86",
                b"K\x00K\x00\x86",
            )
        ),
        "copies of .* would be made",
    ),
    "many tensors with stride 0": (
        lambda: item(
            b"("
            + tensor(load_from_bytes(torch_stream(STORAGE)), b"J\x00\x00\xa0\x00\x85", b"K\x00\x85")
            * 20
            + b"l"
        ),
        "copies of .* would be made",
    ),
    # forged states
    "dtype with an object field": (
        lambda: item(
            dtype(
                text("f8"),
                b"(K\x03"
                + text("|")
                + b"N"
                + text("a")
                + b"\x85}"
                + text("a")
                + text("O")
                + b"K\x00\x86sK\x08K\x08K\x3ft",
            )
        ),
        "names, fields",
    ),
    "dtype of objects": (lambda: item(dtype(text("O8"))), "unexpected flags"),
    "pointers in an array of objects": (
        lambda: item(array(b"(K\x01K\x01\x85" + OBJECTS + b"\x89" + raw(b"\x01" * 8) + b"t")),
        "has a bytes for its data, expected a list",
    ),
    "pointer as an object": (
        lambda: item(call(named("numpy.core.multiarray", "scalar"), OBJECTS, raw(b"\x01" * 8))),
        "the dtype of objects",
    ),
    "pointers in a buffer of objects": (
        lambda: item(
            call(
                named("numpy.core.numeric", "_frombuffer"),
                raw(b"\x01" * 8),
                OBJECTS,
                b"K\x01\x85",
                text("C"),
            )
        ),
        "has a bytes for its data, expected a list",
    ),
    "array of objects of a declared size": (
        lambda: item(
            array(b"(K\x01\x8a\x06" + size_8(1 << 40)[:6] + b"\x85" + OBJECTS + b"\x89]t")
        ),
        "of shape .* has 0 values",
    ),
    "array of objects that holds itself": (
        lambda: item(
            array(b"(K\x01K\x01\x85" + OBJECTS + b"\x89](h\x00et").replace(b"tR(K", b"tR\x94(K", 1)
        ),
        "without the state",
    ),
    "array of objects that hold a name": (
        lambda: item(
            array(b"(K\x01K\x01\x85" + OBJECTS + b"\x89](" + named("numpy", "dtype") + b"et")
        ),
        "an item holds the name numpy.dtype",
    ),
    "dtype of ml_dtypes as a value": (lambda: item(named("ml_dtypes", "bfloat16")), "the name ml_"),
    "dtype of ml_dtypes, forged": (
        lambda: item(
            dtype(named("ml_dtypes", "bfloat16"), b"(K\x03" + text("<") + b"NNNK\x08K\x02K\x40t")
        ),
        "unexpected element size",
    ),
    "class of ml_dtypes that is called": (
        lambda: item(named("ml_dtypes", "bfloat16") + b")R"),
        "ml_dtypes.bfloat16 is called",
    ),
    "array of joblib of a declared size": (
        lambda: item(joblib_array(b"\x8a\x06" + size_8(1 << 40)[:6] + b"\x85")),
        "max_payload_nbytes|only .* follow",
    ),
    "array of joblib of another class": (
        lambda: item(joblib_array(b"K\x01\x85", subclass=named("numpy", "dtype"))),
        "expected numpy.ndarray",
    ),
    "pickle behind an array of joblib": (
        lambda: item(
            joblib_array(b"K\x01\x85", OBJECTS) + call(named("os", "system"), SYSTEM) + b"."
        ),
        "'os' 'system'",
    ),
    "array of joblib behind an array of joblib": (
        lambda: item(joblib_array(b"K\x01\x85", OBJECTS) + joblib_array(b"K\x01\x85", OBJECTS)),
        "'joblib.numpy_pickle' 'NumpyArrayWrapper'",
    ),
    "array of dill of another function": (
        lambda: item(
            call(named("dill._dill", "_create_array"), named("builtins", "bytes"), b")", b")")
        ),
        "expected _reconstruct",
    ),
    "type of dill": (
        lambda: item(call(named("dill._dill", "_load_type"), text("FunctionType"))),
        "FunctionType",
    ),
    "function of dill": (lambda: item(named("dill._dill", "_create_function")), "written by dill"),
    # Python's own types
    "list that is called": (
        lambda: item(call(named("builtins", "list"), text("x"))),
        "list is called",
    ),
    "int that is called": (
        lambda: item(call(named("builtins", "int"), text("1" * 9))),
        "int is called",
    ),
    "object that is called": (
        lambda: item(named("builtins", "object") + b")\x81"),
        "object is called",
    ),
    "defaultdict of a function": (
        lambda: item(call(named("collections", "defaultdict"), named("_codecs", "encode"))),
        "a defaultdict makes the name _codecs.encode",
    ),
    "defaultdict of another function": (
        lambda: item(call(named("collections", "defaultdict"), named("os", "getcwd"))),
        "'os' 'getcwd'",
    ),
    "Counter of an endless range": (
        lambda: item(
            call(
                named("collections", "Counter"),
                call(named("builtins", "range"), b"K\x00", b"J\xff\xff\xff\x7f", b"K\x01"),
            )
        ),
        "is called with a range",
    ),
    "set of an endless range": (
        lambda: item(
            call(
                named("builtins", "set"),
                call(named("builtins", "range"), b"K\x00", b"J\xff\xff\xff\x7f", b"K\x01"),
            )
        ),
        "is called with a range",
    ),
    "decimal of a megabyte": (
        lambda: item(call(named("decimal", "Decimal"), text("9" * MILLION))),
        "the text of a number",
    ),
    "fraction of a huge number": (
        lambda: item(call(named("fractions", "Fraction"), text("1e999999999"))),
        "text of a fraction",
    ),
    "fraction of two floats": (
        lambda: item(call(named("fractions", "Fraction"), b"G" + bytes(8), b"K\x01")),
        "two ints",
    ),
    "UUID of a list": (lambda: item(named("uuid", "UUID") + b")\x81]b"), "state of a UUID"),
    "namespace of numbers": (
        lambda: item(named("types", "SimpleNamespace") + b")R}K\x01Nsb"),
        "expected a dict of names",
    ),
    "namespace that holds itself": (
        lambda: item(named("types", "SimpleNamespace") + b")R\x94}" + text("a") + b"h\x00sb"),
        "contains itself",
    ),
    "object of an unknown class, protocol 0": (
        lambda: item(
            call(
                named("copy_reg", "_reconstructor"),
                named("numpy", "dtype"),
                named("builtins", "int"),
                b"N",
            )
        ),
        "_reconstructor is called",
    ),
    "time zone of another kind": (
        lambda: item(call(named("datetime", "datetime"), raw(bytes(10)), text("UTC"))),
        "for its time zone",
    ),
    "date of wrong bytes": (
        lambda: item(call(named("datetime", "datetime"), raw(b"\xff" * 10))),
        "no valid pickle",
    ),
    "path with a NUL": (lambda: item(call(named("pathlib", "PosixPath"), text("a\0"))), "NUL"),
    "path of parts that are not text": (
        lambda: item(call(named("pathlib", "PosixPath"), b"K\x01")),
        "parts of a path",
    ),
    "tuple key that never ends": (
        lambda: item(b"})" + b"\x85" * MILLION + b"Ns"),
        "deeper than 4 levels",
    ),
    "tuple key that doubles": (
        lambda: item(b"})" + b"2\x86" * 3 + b"2\x862\x86Ns"),
        "deeper than 4",
    ),
    "wide tuple key": (lambda: item(b"}(" + b"K\x01" * 100 + b"tNs"), "more than 64 values"),
    "tuples that may collide": (
        lambda: item(
            b"}("
            + b"".join(b"M" + n.to_bytes(2, "little") + b"\x85N" for n in range(20_000))
            + b"u"
        ),
        "whose hashes may collide",
    ),
    "tuples that may collide, one by one": (
        lambda: item(
            b"}" + b"".join(b"M" + n.to_bytes(2, "little") + b"\x85Ns" for n in range(20_000))
        ),
        "whose hashes may collide",
    ),
    "fractions that may collide in a set": (
        lambda: item(
            b"\x8f("
            + named("fractions", "Fraction")
            + b"\x940"
            + b"".join(
                b"h\x00K\x01M" + n.to_bytes(2, "little") + b"\x86R" for n in range(1, 20_000)
            )
            + b"\x90"
        ),
        "whose hashes may collide",
    ),
    "dtype of records": (lambda: item(dtype(text("V8"))), "structures"),
    "dtype as a value without a state": (
        lambda: item(call(named("numpy", "dtype"), text("f8"), b"\x89", b"\x88")),
        "without the state",
    ),
    "dtype as a value": (lambda: item(dtype()), "which no trace holds"),
    "shim as a value": (lambda: item(named("numpy", "dtype")), "the name numpy.dtype"),
    "array of declared size": (
        lambda: item(
            array(b"(K\x01\x8a\x06" + size_8(1 << 40)[:6] + b"\x85" + dtype() + b"\x89C\x00t")
        ),
        "needs .* bytes, found 0",
    ),
    "array state with a list of objects": (
        lambda: item(array(b"(K\x01K\x01\x85" + dtype() + b"\x89]t")),
        "has a list for its data",
    ),
    "array without a state": (
        lambda: item(array(b"")[:-1]),
        "without the state",
    ),
    "array inside its own state": (
        lambda: item(array(b"2")),
        "without the state",
    ),
    "array built twice": (
        lambda: item(array(b"(K\x01K\x01\x85" + dtype() + b"\x89" + raw(bytes(8)) + b"t") + b"Nb"),
        "a state is given to a ndarray",
    ),
    "BUILD on a dict": (lambda: item(b"(}}" + text("a") + b"K\x01sbt"), "given to a dict"),
    "BUILD on a shim": (
        lambda: item(named("numpy", "dtype") + b"}" + text("__call__") + b"Nsb"),
        "given to the name numpy.dtype",
    ),
    "BUILD with a slot state": (
        lambda: item(named("numpy", "ndarray") + b"N}" + text("a") + b"Ns\x86b"),
        "given to the name numpy.ndarray",
    ),
    # memory
    "memo bomb": (lambda: item(b"K\x01r\xff\xff\xff\xff"), "memo bomb"),
    "memo bomb, text": (lambda: item(b"K\x01p99999999999\n"), "memo bomb"),
    "memo bomb, negative": (lambda: item(b"K\x01p-1\n"), "memo bomb"),
    "huge bytes": (lambda: item(b"\x8e" + size_8(1 << 62)), "max_payload_nbytes"),
    "large bytes": (lambda: item(b"\x8e" + size_8(3 << 30)), "only .* follow"),
    "huge bytearray": (lambda: item(b"\x96" + size_8(1 << 62)), "max_payload_nbytes"),
    "large bytearray": (lambda: item(b"\x96" + size_8(3 << 30)), "only .* follow"),
    "huge text": (lambda: item(b"\x8d" + size_8(1 << 62)), "max_string_nbytes"),
    "large text": (lambda: item(b"\x8d" + size_8(400 << 20)), "only .* follow"),
    "huge frame": (lambda: b"\x80\x04\x95" + b"\xff" * 8 + item(b"K\x01")[2:-1], "no end"),
    "bytes(n)": (
        lambda: item(call(named("builtins", "bytes"), b"J\xff\xff\xff\x7f")),
        "called with 1 argument",
    ),
    "bytearray(n)": (
        lambda: item(call(named("builtins", "bytearray"), b"J\xff\xff\xff\x7f")),
        "called with an int",
    ),
    "strings decoded again and again": (
        lambda: item(
            text("x" * MILLION)
            + b"\x94"
            + (named("_codecs", "encode") + b"h\x00" + text("latin1") + b"\x86R\x94") * 200
        ),
        "copies of .* would be made",
    ),
    "one array, shared by many": (
        lambda: item(
            array(b"(K\x01J\x00\x00\x04\x00\x85" + dtype() + b"\x89" + raw(bytes(8 << 18)) + b"t")
            + b"\x940]("
            + b"h\x00" * 200
            + b"e"
        ),
        "unfold to more than",
    ),
    "one buffer, shared by many arrays": (
        lambda: item(
            raw(bytes(8 << 18))
            + b"\x940"
            + dtype()
            + b"\x940("
            + array(b"(K\x01J\x00\x00\x04\x00\x85h\x01\x89h\x00t") * 200
            + b"l"
        ),
        "unfold to more than",
    ),
    "huge long": (lambda: item(b"\x8b\xff\xff\xff\x7f"), "an int of 2,147,483,647 bytes"),
    "negative long": (lambda: item(b"\x8b\xff\xff\xff\xff"), "an int of 4,294,967,295 bytes"),
    "long of a megabyte": (
        lambda: item(b"\x8b" + MILLION.to_bytes(4, "little") + b"\x7f" * MILLION),
        "an int of 1,000,000 bytes",
    ),
    "long text": (lambda: item(b"L" + b"9" * 10 * MILLION + b"L\n"), "longer than"),
    "int of 4301 digits": (lambda: item(b"I" + b"9" * 4301 + b"\n"), "longer than"),
    "text of a float": (lambda: item(b"F" + b"9" * MILLION + b"\n"), "longer than"),
    "endless name": (lambda: item(b"c" + b"x" * MILLION), "longer than"),
    # structure
    "list that contains itself": (
        lambda: item(b"]\x94h\x00a"),
        "contains itself",
    ),
    "item that contains itself": (
        lambda: b"\x80\x04](}\x94" + text("key") + b"h\x00se.",
        "contains itself",
    ),
    "batch that contains itself": (
        lambda: b"\x80\x04]\x94(}" + text("key") + b"h\x00se.",
        "uses the root list as a value",
    ),
    "nested tuples": (lambda: item(b")" + b"\x85" * MILLION), "deeper than 64"),
    "nested lists": (lambda: item(b"]" * 500_000 + b"a" * 499_999), "deeper than 64"),
    "nested dicts": (
        lambda: item((b"}K\x01") * 300_000 + b"N" + b"s" * 300_000),
        "deeper than 64",
    ),
    "nested tuple as an encoding": (
        lambda: item(call(named("_codecs", "encode"), text("x"), b")" + b"\x85" * 100_000)),
        "and a tuple",
    ),
    "nested tuple as the root": (lambda: b"\x80\x04)" + b"\x85" * MILLION + b".", "found a tuple"),
    "tuples that double": (lambda: item(b")" + b"2\x86" * 60), "unfolds to more than"),
    "lists that double": (
        lambda: item(b"](NNe" + b"".join(b"\x942" + b"\x86" for _ in range(60))),
        "unfolds to more than",
    ),
    "tuples that double, in a message": (
        lambda: item(call(named("_codecs", "encode"), text("x"), b")" + b"2\x86" * 60)),
        "and a tuple",
    ),
    "nested marks": (lambda: item(b"(" * MILLION), "max_mark_depth"),
    "flood of None": (lambda: item(b"(" + b"N" * 3 * MILLION), "max_item_opcodes"),
    "flood of dicts": (lambda: item(b"(" + b"}" * 3 * MILLION), "max_item_opcodes"),
    "flood of memo entries": (lambda: item(b"(" + b"}\x94" * 2 * MILLION), "max_item_"),
    "flood of duplicates": (lambda: item(b"(N" + b"2" * 3 * MILLION), "max_item_opcodes"),
    "flood of marks": (lambda: item(b"(1" * 2 * MILLION), "max_item_opcodes"),
    "flood of protocols": (lambda: b"\x80\x04" * 3 * MILLION, "max_item_opcodes"),
    "flood of items": (
        lambda: b"\x80\x04](" + b"}" * 3 * MILLION + b"e.",
        "max_portion_items",
    ),
    "keys that collide": (
        lambda: item(
            b"}("
            + b"".join(
                b"\x8a\x20" + (number * ((1 << 61) - 1) + 1).to_bytes(32, "little") + b"N"
                for number in range(1, 20_000)
            )
            + b"u"
        ),
        "a key of a dict is a larger int",
    ),
    "list key": (lambda: item(b"(}]Nst"), "a key of a dict is a list"),
    "odd number of items": (lambda: item(b"}(Nu"), "odd number"),
    "memo slot that was never written": (lambda: item(b"h\x07"), "never written"),
    "memo slot that was never written, wide": (
        lambda: item(b"j\xff\xff\xff\xff"),
        "never written",
    ),
    "empty stack": (lambda: b"\x80\x040.", "needs a mark"),
    "empty stack for a tuple": (lambda: b"\x80\x04\x87.", "stack is empty"),
    "pop below a mark": (lambda: b"\x80\x04K\x01(\x85.", "stack is empty"),
    "tuple without a mark": (lambda: b"\x80\x04t.", "needs a mark"),
    "APPENDS without a list": (lambda: b"\x80\x04(Ne.", "stack is empty"),
    "append to a dict": (lambda: item(b"}Na"), "appended to a dict"),
    "append to a shim": (lambda: item(named("numpy", "dtype") + b"Na"), "appended to the name"),
    "set items of a list": (lambda: item(b"]NNs"), "items are set in a list"),
    "item that is popped": (
        lambda: b"\x80\x04](}}00e.",
        "uses the item that was handed out",
    ),
    "item in a tuple after it was handed out": (
        lambda: b"\x80\x04](}}\x86e.",
        "is a tuple",
    ),
    "item that is stored after it was handed out": (
        lambda: b"\x80\x04](}}0\x94e.",
        "uses the item that was handed out",
    ),
    "item that is doubled after it was handed out": (
        lambda: b"\x80\x04](}}02e.",
        "uses the item that was handed out",
    ),
    "marks left open": (lambda: b"\x80\x04](}(.", "stack is empty"),
    "items left on the stack": (lambda: b"\x80\x04]}}.", "left on the stack"),
    "no opcode": (lambda: item(b"\xff"), "0xff is not a pickle opcode"),
    "unknown protocol": (lambda: b"\x80\xff](}e.", "protocol 255"),
    "text that is not UTF-8": (lambda: item(b"X\x01\x00\x00\x00\xff"), "no valid pickle"),
}


def read(path: Path) -> None:
    with BatchStream(path) as batch:
        for _ in batch:
            pass


# Inside gzip, too, where that is another way to read; floods take as long either way.
WAYS = [
    pytest.param(name, compressed, id=f"{name}-{'gzip' if compressed else 'plain'}")
    for name in ATTACKS
    for compressed in (False, True)
    if not (compressed and name.startswith("flood"))
]


@pytest.mark.parametrize(("name", "compressed"), WAYS)
def test_attack(
    name: str, compressed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    build, message = ATTACKS[name]
    path = tmp_path / "batch.pkl"
    data = build()
    path.write_bytes(gzip.compress(data, 1) if compressed else data)
    started = time.perf_counter()
    with pytest.raises(ConversionError, match=message) as caught:
        read(path)
    assert time.perf_counter() - started < MAX_SECONDS
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert not Path("executed.txt").exists()


def test_refusals_are_told_from_damage(tmp_path: Path) -> None:
    path = tmp_path / "batch.pkl"
    path.write_bytes(item(call(named("os", "system"), SYSTEM)))
    with pytest.raises(UnsafePickleError, match=r"byte 24 \(GLOBAL\), item 0: .*nothing was imp"):
        read(path)


def test_attacks_in_a_later_item_and_behind_a_shared_one(tmp_path: Path) -> None:
    path = tmp_path / "batch.pkl"
    honest = b"}\x94" + text("a") + b"Ns"
    hidden = b"}" + text("a") + named("os", "system")
    path.write_bytes(b"\x80\x04](" + honest + honest + b"h\x00" + hidden + b"e.")
    with pytest.raises(UnsafePickleError, match=r"item 3: .*'os' 'system'"):
        read(path)


def test_attack_in_a_container(tmp_path: Path) -> None:
    path = tmp_path / "batch.pkl"
    traces = b"\x80\x04}(" + text("traces") + b"](](" + named("os", "system") + b"ee"
    path.write_bytes(traces + b"u.")
    with pytest.raises(UnsafePickleError, match="'os' 'system'"):
        read(path)
    path.write_bytes(
        b"\x80\x04}(" + text("traces") + b"]" + text("labels") + b")" + b"\x85" * MILLION + b"u."
    )
    with pytest.raises(UnsafePickleError, match="deeper than"):
        read(path)


@pytest.mark.parametrize("opcode", [b"\x8e", b"\x96", b"\x8d"], ids=["bytes", "bytearray", "text"])
def test_gzip_bomb(tmp_path: Path, opcode: bytes) -> None:
    path = tmp_path / "batch.pkl.gz"
    with gzip.open(path, "wb", compresslevel=6) as file:
        file.write(b"\x80\x04](}" + text("key") + opcode + size_8(300 << 20))
        for _ in range(150):
            file.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(UnsafePickleError, match="gzip bomb"):
        read(path)


def test_nothing_is_imported_and_memory_stays_low(tmp_path: Path) -> None:
    """All attacks one after the other in a fresh process."""
    pytest.importorskip("resource", reason="measures with getrusage")
    script = """
        import json, resource, sys
        sys.path.insert(0, sys.argv[1])
        import test_pickles
        from pathlib import Path

        unit = 1 if sys.platform == "darwin" else 1024
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        path = Path("batch.pkl")
        build = None
        for build, message in test_pickles.ATTACKS.values():
            build()  # the attacks themselves are up to 10 MB
        modules = set(sys.modules)
        before = peak()
        grown = {}
        for name, (build, message) in test_pickles.ATTACKS.items():
            path.write_bytes(build())
            start = peak()
            try:
                test_pickles.read(path)
            except test_pickles.ConversionError:
                pass
            else:
                raise SystemExit(name)
            grown[name] = peak() - start
        print(json.dumps({
            "grown": max(grown.items(), key=lambda pair: pair[1]),
            "total": peak() - before,
            "modules": sorted(set(sys.modules) - modules),
            "all": [name for name in ("this", "torch", "isal.nothing") if name in sys.modules],
        }))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(Path(__file__).parent)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["modules"] == []
    assert found["all"] == []
    assert found["total"] < MAX_EXTRA_NBYTES, found
    assert not (tmp_path / "executed.txt").exists()


def test_the_attacks_work_on_pickle_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(ATTACKS["os.system by GLOBAL"][0]())
    assert Path("executed.txt").exists()
