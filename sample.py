"""`python sample.py --bundle DIR --text "…" --modalities image` is `unitok sample`: interleaved generation."""

import sys

from unitok.cli import main

if __name__ == "__main__":
    main(["sample", *sys.argv[1:]])
