"""Bytes and files: codecs, chunks, HDF5, the index (footer), and files on servers."""
