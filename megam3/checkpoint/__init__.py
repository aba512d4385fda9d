"""Checkpoints on disk: on the disk before they are visible, verified when read, never unpickled.

    checkpoints/
      step-000500/        engine/…        DeepSpeed's files, one per rank
                          state.json      progress, world size, ZeRO stage, fingerprints of data and model
                          model/…         config.json and tokenizer: with them an exporter needs no other
                          folder
                          manifest.json   size and CRC-32 of every file above
                          COMPLETE        the manifest's own CRC-32; written last
      latest              name of the newest complete one

The order that survives a power loss at any moment: every rank flushes the files it wrote, then manifest,
COMPLETE and their folder
are flushed, the folder gets its name, the name is flushed, and only then is an older checkpoint removed. What
lies in `checkpoints/`
besides is listed in `folders.py`.
"""

from megam3.checkpoint.evaluations import Evaluations
from megam3.checkpoint.find import (
    check_resumable,
    clear_partials,
    consolidated_weights,
    list_steps,
    load_weights,
    newest_complete,
    read_state,
    set_aside,
    was_started_by,
    write_started_by,
)
from megam3.checkpoint.folders import find_problem
from megam3.checkpoint.rollbacks import read_rollbacks, roll_back, skipped_ranges
from megam3.checkpoint.save import Retention, save_checkpoint
from megam3.checkpoint.state import RunState, has_same_layout
from megam3.checkpoint.writer import CheckpointWriter, SaveClock

__all__ = [
    "CheckpointWriter",
    "Evaluations",
    "Retention",
    "RunState",
    "SaveClock",
    "check_resumable",
    "clear_partials",
    "consolidated_weights",
    "find_problem",
    "has_same_layout",
    "list_steps",
    "load_weights",
    "newest_complete",
    "read_rollbacks",
    "read_state",
    "roll_back",
    "save_checkpoint",
    "set_aside",
    "skipped_ranges",
    "was_started_by",
    "write_started_by",
]
