"""The package's version; the format has its own, in `h5traces.format.layout`."""

__version__ = "0.1.0"
