"""``python -m h5traces``: the command line."""

import sys

if __name__ == "__main__":
    # ``-m`` puts the current folder in front, which may be that of a stranger's data.
    if not sys.flags.safe_path and f"{sys.path[0]}/h5traces/__main__.py" != __file__:
        del sys.path[0]

    from h5traces.cli.app import main

    main()
