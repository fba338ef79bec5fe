"""`python -m cluster` is the `tandem` command."""

from cluster.cli import main

if __name__ == "__main__":
    main()
