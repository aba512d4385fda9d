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

from megam3.checkpoint.find import (
    check_resumable,
    clear_partials,
    consolidated_weights,
    list_steps,
    newest_complete,
    read_state,
    set_aside,
    was_started_by,
    write_started_by,
)
from megam3.checkpoint.folders import find_problem
from megam3.checkpoint.save import Retention, save_checkpoint
from megam3.checkpoint.state import RunState, has_same_layout

__all__ = [
    "Retention",
    "RunState",
    "check_resumable",
    "clear_partials",
    "consolidated_weights",
    "find_problem",
    "has_same_layout",
    "list_steps",
    "newest_complete",
    "read_state",
    "save_checkpoint",
    "set_aside",
    "was_started_by",
    "write_started_by",
]
