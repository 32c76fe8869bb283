"""`python -m graftage` is the command `graftage`."""

from graftage._cli.app import main

if __name__ == "__main__":
    main()
