"""`python -m graftage._cli` is the `graftage` command."""

from graftage._cli.app import main

if __name__ == "__main__":
    main()
