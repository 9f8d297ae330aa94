"""Reading legacy batches without executing them."""

from h5traces.legacy.stream import BatchStream, ContainerItem, is_pickle, open_batch

__all__ = ["BatchStream", "ContainerItem", "is_pickle", "open_batch"]
