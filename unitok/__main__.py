"""`python -m unitok` is the `unitok` command."""

from unitok.cli import main

if __name__ == "__main__":
    main()
