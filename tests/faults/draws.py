"""What is drawn, what must follow, and the table of what did."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from tests.faults.inject import FILE_PHASES

# how often a place is passed in a start of some twenty steps: a fault is drawn among these times
OCCURRENCES = {
    "store": 8, "write": 24, "rename": 4, "retention": 12, "data": 15, "forward": 15,
    "update": 15, "log": 15, "save": 4, "snapshot": 8, "evaluate": 2, "start": 1,
}  # fmt: skip
SILENT = "is silent since|does not answer|never reported|did not meet there|did not answer"
"""What is said of a rank that stands still; the last two before and while the ranks meet."""
TARGETS = ("this rank", "other rank", "worker", "launcher", "all")


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One fault of the campaign."""

    phase: str
    action: str
    target: str
    actor: int
    occurrence: int
    delay_seconds: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a fault led to."""

    drawn: Drawn
    step: int
    """Steps done when it struck, as far as the actor knew."""
    code: int
    end_seconds: float
    """From the fault to the end of the last process."""
    resumed_step: int
    """Where the next start will go on."""
    message: str
    """The line of the log that says what happened; empty where nobody was left to say it."""


def draw(rng: random.Random, can_mount: bool) -> Drawn:
    """A fault; those that need a file system of their own only where one can be mounted."""
    actions = ["kill"] * 9 + ["stop"] * 4 + ["slow", "clock on", "clock back", "damage", "damage"]
    if can_mount:
        actions += ["disk full", "disk full", "read-only", "shared memory full"]
    action = rng.choice(actions)
    phase = rng.choice(list(OCCURRENCES))
    target = rng.choice(TARGETS) if action in ("kill", "stop") else "-"
    if action == "stop" and target in ("launcher", "all"):
        target = "this rank"  # a stopped launcher leaves its ranks at work: nothing to recover from
    if action in ("damage", "shared memory full"):
        phase = "start"
    if action in ("disk full", "read-only") and phase in ("start", "store"):
        phase = "write"
    if action == "slow" and phase in FILE_PHASES:
        phase = "forward"
    return Drawn(
        phase=phase,
        action=action,
        target=target,
        actor=0 if phase in ("store", "rename", "retention") else rng.randrange(2),
        occurrence=rng.randrange(OCCURRENCES[phase]),
        delay_seconds=rng.uniform(0.0, 2.5),
    )


@dataclass(frozen=True)
class Ended:
    """A run that has ended."""

    code: int
    text: str
    """Its log."""
    seconds: float
    """From the fault to the end; 0 when it did not strike."""


def judge(drawn: Drawn, ended: Ended, is_done: bool) -> str:
    """The message that a fault led to; fails when there is none, or none that a user could act on."""
    expected = {
        ("kill", "this rank"): "another rank has ended|rank . ended with code -9",
        ("kill", "other rank"): "another rank has ended|rank . ended with code -9",
        ("kill", "worker"): "was killed by SIGKILL before it answered",
        ("stop", "this rank"): SILENT,
        ("stop", "other rank"): SILENT,
        ("stop", "worker"): "waiting for rank|never reported|this process stands|can still speak",
        ("disk full", "-"): "No space left on device|and its disk has",
        ("read-only", "-"): "Operation not permitted",
    }.get((drawn.action, drawn.target))
    lines = ended.text.splitlines()
    assert "Traceback (most recent call last)" not in ended.text, f"{drawn}\n{ended.text[-6000:]}"
    if drawn.action in ("slow", "clock on", "clock back"):
        assert (ended.code, is_done) == (0, True), f"{drawn}\n{ended.text[-6000:]}"
    if expected is None or (ended.code == 0 and is_done):
        return "went on to the end" if is_done else ""
    found = [line for line in lines if re.search(expected, line)]
    assert found, f"{drawn}: code {ended.code}, no message like {expected!r}\n{ended.text[-6000:]}"
    return found[0]


def table(outcomes: Sequence[Outcome]) -> str:
    """How many faults, by place (rows) and kind (columns), and the slowest end of each place."""
    kinds: dict[str, None] = {}
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for outcome in outcomes:
        kind = outcome.drawn.action + (f" {outcome.drawn.target}" if outcome.drawn.target != "-" else "")
        kinds[kind] = None
        counts[outcome.drawn.phase][kind] += 1
    columns = sorted(kinds)
    lines = [f"| place | {' | '.join(columns)} | all | slowest end, s | most steps again |"]
    lines += ["|" + "---|" * (len(columns) + 4)]
    for phase, row in sorted(counts.items()):
        own = [outcome for outcome in outcomes if outcome.drawn.phase == phase]
        again = max(outcome.step - outcome.resumed_step for outcome in own)
        cells = [str(row.get(kind, "")) for kind in columns]
        slowest = max(outcome.end_seconds for outcome in own)
        lines += [f"| {phase} | {' | '.join(cells)} | {len(own)} | {slowest:.1f} | {max(0, again)} |"]
    return "\n".join(lines)
