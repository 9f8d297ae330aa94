"""Files that others wrote, read as records without executing them."""
