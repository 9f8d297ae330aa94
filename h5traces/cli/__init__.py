"""The command line: wiring only; every command calls one public function."""

from h5traces.cli.app import main

__all__ = ["main"]
