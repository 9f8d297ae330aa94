"""Reading legacy batches without executing them."""
