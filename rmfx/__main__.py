"""`python -m rmfx` is the command `rmfx`."""

import sys

from rmfx.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
