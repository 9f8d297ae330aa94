"""Moves batches to a device, the next one while the model computes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from h5traces.arguments import checked, shown
from h5traces.errors import DatasetError, OptionError


@checked
def to_device(batch: Any, device: torch.device | str, *, non_blocking: bool = True) -> Any:
    """A batch with all its tensors on a device.

    Parameters
    ----------
    batch
        A tensor, anything with a method ``to`` (graphs of PyTorch Geometric), or mappings, lists
        and tuples of these; other values stay as they are.
    device
        The device.
    non_blocking
        Do not wait for copies from pinned memory (``DataLoader(pin_memory=True)``).

    Raises
    ------
    OptionError
        torch knows no such device.
    DatasetError
        A tensor cannot be moved there.
    """
    return _moved(batch, _device(device), non_blocking=non_blocking)


def _device(device: torch.device | str) -> torch.device:
    try:
        return torch.device(device)
    except RuntimeError as error:
        message = f"device is {shown(device)}: {str(error).splitlines()[0]}"
        raise OptionError(message) from error


def _moved(batch: Any, device: torch.device, *, non_blocking: bool) -> Any:
    if hasattr(batch, "to") and not isinstance(batch, type):
        try:
            return batch.to(device, non_blocking=non_blocking)
        # An AssertionError where torch was built without that device.
        except (RuntimeError, AssertionError, TypeError) as error:
            message = f"a {type(batch).__name__} cannot be moved to {device}: {error}"
            raise DatasetError(message) from error
    if isinstance(batch, Mapping):
        return {
            key: _moved(value, device, non_blocking=non_blocking) for key, value in batch.items()
        }
    if isinstance(batch, (list, tuple)):
        moved = [_moved(each, device, non_blocking=non_blocking) for each in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch


class DeviceLoader:
    """A loader whose batches are on a device; the next one is copied while the last is in use.

    On CUDA, copies run in a separate stream; with ``pin_memory=True`` in the loader they and
    the model do not wait for each other. On other devices batches are moved one by one.

    Its ``state_dict`` is the loader's, as of the batch returned last, so that nothing is lost on
    resuming although one more batch was read.

    Parameters
    ----------
    loader
        A `torch.utils.data.DataLoader`, or any iterable of batches.
    device
        The device.
    """

    @checked
    def __init__(self, loader: Iterable[Any], device: torch.device | str) -> None:
        self._loader = loader
        self.device = _device(device)
        self._state: Any = None

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]  # TypeError if the loader has none

    def __iter__(self) -> Iterator[Any]:
        if self.device.type != "cuda":
            for batch in self._loader:
                yield _moved(batch, self.device, non_blocking=True)
            return
        yield from self._on_cuda()

    def _on_cuda(self) -> Iterator[Any]:
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]  # torch leaves it so
        self._state = self._loader_state()
        batches = iter(self._loader)
        copied = self._copied_in(stream, batches)
        while copied is not None:
            (batch, self._state), current = copied, torch.cuda.current_stream(self.device)
            # The model waits for its copy, and the memory is not reused before the model is done.
            current.wait_stream(stream)
            for tensor in _tensors_of(batch):
                tensor.record_stream(current)
            copied = self._copied_in(stream, batches)
            yield batch
        self._state = None

    def _copied_in(self, stream: torch.cuda.Stream, batches: Iterator[Any]) -> Any:
        """The next batch, being copied, and the loader's state after it; None at the end."""
        try:
            batch = next(batches)
        except StopIteration:
            return None
        state = self._loader_state()
        with torch.cuda.stream(stream):
            return _moved(batch, self.device, non_blocking=True), state

    def _loader_state(self) -> Any:
        if not hasattr(self._loader, "state_dict"):
            return None
        return copy.deepcopy(self._loader.state_dict())

    def state_dict(self) -> Any:
        """The loader's state after the batch that was returned last.

        Raises
        ------
        DatasetError
            The loader has none.
        """
        found = self._loader_state() if self._state is None else self._state
        if found is None:
            message = (
                f"{type(self._loader).__name__} has no state_dict; use "
                "torchdata.stateful_dataloader.StatefulDataLoader, or ShardSampler.state_at"
            )
            raise DatasetError(message)
        return found

    def load_state_dict(self, state: Any) -> None:
        """Let the loader continue from a state."""
        self._state = None
        self._loader.load_state_dict(state)  # type: ignore[attr-defined]  # as the loader has it


def _tensors_of(batch: Any) -> Iterator[torch.Tensor]:
    """All tensors of a batch, those of graphs included."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors_of(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _tensors_of(value)
    elif hasattr(batch, "to_dict"):
        yield from _tensors_of(batch.to_dict())
