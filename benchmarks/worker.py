"""The loop inside each measured process: build once, then run one timed step whenever the parent says so.

A side's file ends in `serve(build)`; `build(spec)` returns the step, a function that returns figures (its
loss, for instance). The parent alternates between the sides, so that a slow minute of the machine meets all
of them. Imports torch and nothing else.
"""

import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

Step = Callable[[], dict]


def serve(build: Callable[[dict], Step]) -> None:
    """Read the spec from the file named by argv[1], announce readiness, then answer each line on stdin with
    the figures of one step."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print; the parent reads answers only
    spec = json.loads(Path(sys.argv[1]).read_text())
    if spec.get("address_space_bytes"):
        resource.setrlimit(resource.RLIMIT_AS, (spec["address_space_bytes"],) * 2)
    torch.set_num_threads(spec.get("threads") or torch.get_num_threads())
    step = build(spec)
    gc.collect()
    ready = {"ready": True, "threads": torch.get_num_threads(), "idle_rss_bytes": current_rss_bytes()}
    answers.write(json.dumps(ready) + "\n")
    for _ in sys.stdin:
        started, cpu_started = time.perf_counter(), time.process_time()
        figures = step()
        figures.setdefault("seconds", time.perf_counter() - started)
        figures["cpu_seconds"] = time.process_time() - cpu_started
        answers.write(json.dumps({**figures, "peak_rss_bytes": peak_rss_bytes()}) + "\n")


def peak_rss_bytes() -> int:
    """Most memory this program ever held. Not `ru_maxrss`: that starts at what the parent held when it
    started us."""
    with open("/proc/self/status", encoding="ascii") as stream:
        return next(int(line.split()[1]) * 1024 for line in stream if line.startswith("VmHWM:"))


def current_rss_bytes() -> int:
    """Memory this process holds now: the program, its libraries and the loaded model, before the first
    step."""
    with open("/proc/self/statm", encoding="ascii") as stream:
        return int(stream.read().split()[1]) * resource.getpagesize()
