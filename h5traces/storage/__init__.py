"""Bytes: HDF5, codecs, chunks and the footer."""
