"""Archives in object stores and on web servers, read by ranges through fsspec."""
