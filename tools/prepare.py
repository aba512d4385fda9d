"""Tokenise a recipe's data into its store: the same as `megam3 prepare` (megam3/commands/prepare.py)."""

import sys

from megam3.cli import report_user_errors
from megam3.commands.prepare import main

if __name__ == "__main__":
    sys.exit(report_user_errors(main, sys.argv[1:]))
