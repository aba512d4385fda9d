"""The optimizer step: schedule, parameter groups, activation memory, and the one file that talks to
DeepSpeed's engine."""

import os

from megam3.dist.env import prepare_environment

# DeepSpeed looks for an accelerator while it is imported, and says on standard output, where `--json` prints,
# that it found none
prepare_environment(os.environ)
