"""The batches of any step as text: the same as `megam3 inspect-batch` (megam3/commands/inspect_batch.py)."""

import sys

from megam3.cli import report_user_errors
from megam3.commands.inspect_batch import main

if __name__ == "__main__":
    sys.exit(report_user_errors(main, sys.argv[1:]))
