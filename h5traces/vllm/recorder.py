"""What the connector does that needs no vLLM: settings, requests, and a thread that writes."""

from __future__ import annotations

import atexit
import logging
import threading
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from h5traces.errors import ArchiveExistsError, ExtractionError, OptionError, TargetError
from h5traces.format import layout
from h5traces.format.dtypes import TypedArray
from h5traces.format.record import LayerArray, LayeredArrays, TraceRecord
from h5traces.writing.create import create
from h5traces.writing.options import PrecisionOptions, TargetOptions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from h5traces.writing.trace_writer import TraceWriter

# By which an engine finds the connector.
NAME: Final = "H5TracesConnector"
# In `kv_transfer_params`, of requests and of responses.
KEY: Final = "h5traces"
log: Final = logging.getLogger("h5traces.vllm")
_MAX_WAITING_NBYTES: Final = 512 * 2**20
_SETTINGS: Final = ("target", "layers", "dtype", "tier", "shard_samples", "max_waiting_nbytes")
# Instead of a target, for `h5traces extract`: a folder where the states of each request are left.
HANDOVER: Final = "handover"
_OUTPUT_IDS, _FINISH, _REQUEST = "output_ids", "finish_reason", "request_id"
_SAMPLING: Final = "sampling"


@dataclass(frozen=True)
class Settings:
    """What ``kv_connector_extra_config`` says.

    Attributes
    ----------
    target
        As for `h5traces.create`; ranks of a data-parallel group but the first add their number.
    layers
        Blocks to store, of those that vLLM captures; None for all.
    dtype, tier, shard_samples
        As in `PrecisionOptions` and `TargetOptions`.
    max_waiting_nbytes
        States that wait to be written; the engine waits while there are more.
    handover
        Instead of a target, the folder of a program that asked the engine, and takes the states of
        each request from there.
    """

    target: str = ""
    layers: tuple[int, ...] | None = None
    dtype: Any = None
    tier: Any = None
    shard_samples: int | None = None
    max_waiting_nbytes: int = _MAX_WAITING_NBYTES
    handover: str | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """The settings of an engine; OptionError names what is wrong."""
        if {*config} == {HANDOVER}:
            return cls(handover=str(config[HANDOVER]))
        wrong = [f"{each!r} is not a setting" for each in config if each not in _SETTINGS]
        target, layers = config.get("target"), config.get("layers")
        if not isinstance(target, str) or not target:
            wrong.append("'target' is missing" if target is None else f"target is {target!r}")
        if layers is not None and not (isinstance(layers, (list, tuple)) and _whole(*layers)):
            wrong.append(f"layers is {layers!r}, not a list of block numbers")
        for name in ("shard_samples", "max_waiting_nbytes"):
            if config.get(name) is not None and not _whole(config[name]):
                wrong.append(f"{name} is {config[name]!r}, not a whole number")
        if wrong:
            message = f"kv_connector_extra_config: {wrong[0]}; expected {', '.join(_SETTINGS)}"
            raise OptionError(message)
        found = {name: each for name, each in config.items() if each is not None}
        return cls(**{**found, "layers": None if layers is None else tuple(layers)})

    def of_rank(self, rank: int) -> str:
        """The target of a data-parallel rank: two engines cannot write one."""
        if not rank:
            return self.target
        path = Path(self.target)
        name = f"{path.name.removesuffix('.h5')}-rank{rank}"
        is_file = path.name.endswith(".h5")
        return f"{path.with_name(name)}{'.h5' if is_file else '/'}"


def _whole(*values: Any) -> bool:
    return all(type(each) is int and each >= 0 for each in values)


def slots_of(
    ids: Sequence[int], num_layers: int, layers: Sequence[int] | None
) -> dict[int, int | None]:
    """The block of every slot to store, None for the embedding.

    vLLM fills slots in the order of the sorted layer ids: id 0 is the embedding, id i the residual
    stream after block i - 1. It silently fills two slots with one layer if an id is beyond its
    model, so that is an error here, as is a block that it does not capture.

    Raises
    ------
    OptionError
        Ids are repeated or out of range, or `layers` names a block that is not captured.
    """
    wrong = sorted({each for each in ids if each > num_layers or each < 0 or ids.count(each) > 1})
    if wrong or not ids:
        message = (
            f"eagle_aux_hidden_state_layer_ids is {list(ids)}: {wrong or 'nothing'} is repeated or "
            f"out of range; expected different ids from 0 (the embedding) to {num_layers}"
        )
        raise OptionError(message)
    blocks = {slot: each - 1 if each else None for slot, each in enumerate(sorted(ids))}
    if layers is None:
        return blocks
    missing = [each for each in layers if each not in blocks.values()]
    if missing or len(set(layers)) < len(layers):
        message = (
            f"layers is {list(layers)}, but vLLM captures blocks "
            f"{[each for each in blocks.values() if each is not None]}; expected different ones of "
            "these, or block + 1 in eagle_aux_hidden_state_layer_ids"
        )
        raise OptionError(message)
    return {slot: block for slot, block in blocks.items() if block in layers}


@dataclass(frozen=True)
class Finished:
    """A request that ended: what the scheduler knows of it.

    ``tokens`` are those that were computed, so without the last that was generated.
    """

    request_id: str
    tokens: tuple[int, ...]
    prompt_len: int
    output_ids: tuple[int, ...]
    finish_reason: str
    block_ids: tuple[int, ...] = ()
    sample_id: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)


def asked_for(parameters: Any) -> tuple[str | None, dict[str, Any]]:
    """Sample id and fields that a request asks to be stored; OptionError names what is wrong."""
    asked = (parameters or {}).get(KEY) or {}
    expected = "expected {'sample_id': text, 'fields': {name: value}}"
    if not isinstance(asked, dict) or not {*asked} <= {"sample_id", "fields"}:
        message = f"kv_transfer_params[{KEY!r}] is {asked!r}; {expected}"
        raise OptionError(message)
    sample_id, fields = asked.get("sample_id"), asked.get("fields") or {}
    if not (sample_id is None or (isinstance(sample_id, str) and sample_id)):
        message = f"sample_id is {sample_id!r}; {expected}"
        raise OptionError(message)
    taken = {
        *layout.KINDS, layout.TOKENS, layout.TOKENS_DECODED, layout.QUESTION_ID,
        layout.PROMPT_LENGTH, _OUTPUT_IDS, _FINISH, _REQUEST, _SAMPLING,
    }  # fmt: skip
    if not isinstance(fields, dict) or any(not each or each in taken for each in fields):
        message = f"fields is {fields!r}; {expected}, with names that the archive has no use for"
        raise OptionError(message)
    return sample_id, fields


def record_of(
    request: Finished, states: TypedArray, slots: Mapping[int, int | None]
) -> TraceRecord:
    """The record of a request; `states` are ``(tokens, slots, hidden)``.

    Raises
    ------
    ExtractionError
        The states are not those of its tokens.
    """
    shape = states.shape
    if len(shape) != 3 or shape[0] != len(request.tokens) or shape[1] <= max(slots):
        message = (
            f"{request.request_id}: vLLM gave states of shape {shape}, expected "
            f"({len(request.tokens)} tokens, at least {max(slots) + 1} slots, hidden)"
        )
        raise ExtractionError(message)
    arrays = [
        LayerArray(
            layout.EMBEDDING if block is None else layout.layer_name(block),
            TypedArray(np.ascontiguousarray(states.values[:, slot]), states.dtype),
            site=layout.SITE_EMBEDDING if block is None else layout.SITE_BLOCK_OUTPUT,
        )
        for slot, block in slots.items()
    ]
    texts = {name: value for name, value in request.fields.items() if isinstance(value, str)}
    extra: dict[str, Any] = {
        **{name: value for name, value in request.fields.items() if name not in texts},
        _OUTPUT_IDS: list(request.output_ids),
        _FINISH: request.finish_reason,
        _REQUEST: request.request_id,
        _SAMPLING: request.sampling,
    }
    return TraceRecord(
        sample_id=request.sample_id or request.request_id,
        prompt_len=min(request.prompt_len, len(request.tokens)),
        fields=(
            layout.HIDDEN_STATES,
            layout.TOKENS,
            layout.QUESTION_ID,
            layout.PROMPT_LENGTH,
            *texts,
            *extra,
        ),
        tokens=np.array(request.tokens, dtype=np.int64),
        texts=texts,
        layered={layout.HIDDEN_STATES: LayeredArrays(tuple(arrays))},
        extra=extra,
    )


class Recorder:
    """Writes records in a thread; `put` waits while too much is waiting.

    A sample is durable when its file is in the spool. After an error nothing more is written, and
    the next `put` raises it: an engine stops rather than lose traces in silence. Where a program
    ends without closing it, what waits is written then.
    """

    def __init__(self, writer: TraceWriter, max_nbytes: int = _MAX_WAITING_NBYTES) -> None:
        self._writer, self._max_nbytes = writer, max_nbytes
        self._waiting: deque[tuple[TraceRecord, int]] = deque()
        self._nbytes = 0
        self._changed = threading.Condition()
        self._closing = False
        self._error: BaseException | None = None
        self._failure = ""
        self._thread = threading.Thread(target=self._write, name="h5traces", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @classmethod
    def of(cls, settings: Settings, rank: int = 0, **known: Any) -> Self:
        """A recorder of an engine; it goes on with what an earlier start left.

        Raises
        ------
        ArchiveExistsError
            The run is finished.
        ArchiveError
            Another engine writes the target, or it wrote with other settings.
        TargetError
            The target cannot be written.
        """
        target = settings.of_rank(rank)
        try:
            writer = create(
                target,
                precision=PrecisionOptions(tier=settings.tier, dtype=settings.dtype),
                target=TargetOptions(shard_samples=settings.shard_samples),
                **known,
            )
        except OSError as error:
            message = f"{target}: cannot be written: {error}; give the engine another target"
            raise TargetError(message) from error
        if writer.is_finished:
            message = f"{target}: holds a finished run; give the engine another target"
            raise ArchiveExistsError(message)
        return cls(writer, settings.max_waiting_nbytes)

    def take(self, request: Finished, states: TypedArray, slots: Mapping[int, int | None]) -> None:
        """Hand over what `record_of` takes; waits for room."""
        self.put(record_of(request, states, slots), states.values.nbytes)

    def put(self, record: TraceRecord, nbytes: int) -> None:
        """Hand over a record whose arrays have that many bytes; waits for room."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._error or not self._waiting or self._nbytes + nbytes <= self._max_nbytes
                )
            )
            self._check()
            self._waiting.append((record, nbytes))
            self._nbytes += nbytes
            self._changed.notify_all()

    def close(self) -> None:
        """Write what waits, and release the spool; 'h5traces finish' packs it."""
        atexit.unregister(self.close)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._writer.suspend()
        self._check()

    def _check(self) -> None:
        if self._error is not None:
            raise ExtractionError(self._failure) from self._error

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                # It counts until it is written.
                record, nbytes = self._waiting[0]
            try:
                self._writer.append(record)
            except BaseException as error:  # raised in the engine's thread
                self._failure = (
                    f"{record.sample_id}: the trace could not be stored: {error}; those stored "
                    "before are in the spool. Start the engine again when this is mended"
                )
                # No further request may come.
                log.exception(self._failure)
                self._error = error
            with self._changed:
                self._waiting.popleft()
                self._nbytes -= nbytes
                self._changed.notify_all()
                if self._error is not None:
                    return


class Handover:
    """Leaves the states of each request in a folder, in one step, for the program that asked."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def take(self, request: Finished, states: TypedArray, slots: Mapping[int, int | None]) -> None:
        """Write ``NUMBER.npy``, ``(tokens, slots, hidden)``; of requests with a number only.

        bfloat16 is written as the integers of its bits.
        """
        number = request.sample_id
        if number is None or not number.isdecimal():
            return
        part = self._folder / f"{number}.part"
        with part.open("wb") as file:
            np.save(file, states.values, allow_pickle=False)
        part.replace(handed_over(self._folder, int(number)))

    def close(self) -> None:
        """Nothing waits."""


def handed_over(folder: Path, number: int) -> Path:
    """The file of a request's states."""
    return folder / f"{number}.npy"
