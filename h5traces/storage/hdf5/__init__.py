"""The HDF5 part of an archive; the only package that imports h5py."""
