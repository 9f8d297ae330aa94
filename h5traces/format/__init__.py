"""The pydantic models that are the single source of the format's metadata."""
