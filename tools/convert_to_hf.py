"""A training checkpoint → a Hugging Face folder: the same as `megam3 export` (megam3/commands/export.py)."""

import sys

from megam3.cli import report_user_errors
from megam3.commands.export import main

if __name__ == "__main__":
    sys.exit(report_user_errors(main, sys.argv[1:]))
