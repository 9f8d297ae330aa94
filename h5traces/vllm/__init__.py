"""Recording inside vLLM: a connector that an engine finds by its name, `H5TracesConnector`."""

from typing import Final

NAME: Final = "H5TracesConnector"


def register() -> None:
    """Make the connector known to vLLM, which calls this through an entry point."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(NAME, "h5traces.vllm.connector", NAME)


__all__ = ["NAME", "register"]
