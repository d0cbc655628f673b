"""`python -m dlzo` is the command `dlzo`."""

from dlzo.cli import main

if __name__ == "__main__":
    main()
