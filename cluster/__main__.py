"""`python -m cluster` is the `tandem` command."""

import sys


def main() -> None:
    """Entry point of the console script and of `python -m cluster`."""
    try:
        from cluster.cli.app import main as run  # it takes a moment, and Ctrl-C in it deserves no traceback
    except KeyboardInterrupt:
        sys.exit("error: interrupted; nothing was started")
    run()


if __name__ == "__main__":
    main()
