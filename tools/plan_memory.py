"""What a run holds in memory, before anything is started; see megam3/plan_memory.py.

python tools/plan_memory.py RECIPE [key=value…] --gpus 8 --gpu-memory 80
"""

import sys

from megam3.cli import report_user_errors
from megam3.commands.plan_memory import main

if __name__ == "__main__":
    sys.exit(report_user_errors(main, sys.argv[1:]))
