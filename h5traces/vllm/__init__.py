"""vLLM: a connector that an engine finds by its name, and an engine for `extract_dataset`."""

from typing import TYPE_CHECKING

from h5traces.lazy import lazy_names
from h5traces.vllm.recorder import NAME

if TYPE_CHECKING:
    from h5traces.vllm.engine import VllmEngine


def register() -> None:
    """Make the connector known to vLLM, which calls this through an entry point."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, "h5traces.vllm.connector", NAME)


__all__ = ["NAME", "VllmEngine", "register"]

if not TYPE_CHECKING:
    __getattr__, _ = lazy_names(__name__, {"VllmEngine": "h5traces.vllm.engine"}, extra="extract")
