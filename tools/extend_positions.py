"""More position rows for an encoder: the same as `megam3 extend-positions`
(megam3/commands/extend_positions.py)."""

import sys

from megam3.cli import report_user_errors
from megam3.commands.extend_positions import main

if __name__ == "__main__":
    sys.exit(report_user_errors(main, sys.argv[1:]))
