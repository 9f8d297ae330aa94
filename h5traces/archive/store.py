"""What reading an archive file takes, whether from its footer or from its HDF5 part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from h5traces.format import layout

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from h5traces.errors import ArchiveError
    from h5traces.format.attributes import Attrs
    from h5traces.format.entries import SampleEntry
    from h5traces.storage.files import ByteFile


class Store(Protocol):
    """Read access to one archive file; samples are counted in the order of their names."""

    @property
    def file(self) -> ByteFile:
        """The bytes that chunk tables point into."""

    @property
    def root_attrs(self) -> Attrs:
        """Attributes of the root group."""

    @property
    def kinds(self) -> dict[str, Attrs]:
        """Attributes of the groups under ``/kinds``."""

    @property
    def num_samples(self) -> int:
        """Number of samples."""

    def sample(self, index: int) -> SampleEntry:
        """One sample and its objects."""

    def sample_attrs(self, index: int) -> Attrs:
        """Attributes of one sample."""

    def scales(self) -> SampleEntry | None:
        """The objects of ``/scales`` by their paths below the root; None where there are none."""

    def read(self, sample: SampleEntry, path: str) -> NDArray[Any]:
        """Values of one dataset in its carrier dtype; bfloat16 as bits."""

    def sizes(self) -> dict[str, StoredSize]:
        """Sizes of all datasets by the first part of their path."""


@dataclass(frozen=True, slots=True)
class StoredSize:
    """Sizes of several datasets.

    Attributes
    ----------
    num_datasets
        How many.
    raw_nbytes, stored_nbytes
        Bytes before and after compression.
    """

    num_datasets: int = 0
    raw_nbytes: int = 0
    stored_nbytes: int = 0

    def __add__(self, other: StoredSize) -> StoredSize:
        return StoredSize(
            self.num_datasets + other.num_datasets,
            self.raw_nbytes + other.raw_nbytes,
            self.stored_nbytes + other.stored_nbytes,
        )


# Of what lies in no sample.
NO_ORDINAL: Final = -1


def located(error: ArchiveError, file: str, ordinal: int, path: str) -> ArchiveError:
    """The error with file, sample and object in front."""
    what = str(error).removeprefix(f"{file}: ")
    return type(error)(f"{file}: {object_place(ordinal, path)}: {what}")


def object_place(ordinal: int, path: str) -> str:
    """Absolute path of an object of a sample, or of one outside of all samples."""
    return f"/{path}" if ordinal == NO_ORDINAL else f"{layout.sample_path(ordinal)}/{path}"
