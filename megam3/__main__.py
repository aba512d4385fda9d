"""`python -m megam3`: the same as the `megam3` command."""

import sys

from megam3.cli import main

if __name__ == "__main__":
    sys.exit(main())
