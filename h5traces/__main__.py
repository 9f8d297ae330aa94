"""``python -m h5traces``: the command line."""

from h5traces.cli.app import main

if __name__ == "__main__":
    main()
