"""What a run holds in memory, counted before it starts: the same as `megam3 plan-memory`
(megam3/commands/plan_memory.py)."""

import sys

from megam3.cli import report_user_errors
from megam3.commands.plan_memory import main

if __name__ == "__main__":
    sys.exit(report_user_errors(main, sys.argv[1:]))
