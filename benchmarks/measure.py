"""Start the sides of a comparison, alternate between them, and reduce what they answer to medians, spreads
and ratios."""

import contextlib
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Side:
    """One measured process."""

    name: str
    module: str
    """Runs as `python -m benchmarks.sides.MODULE`."""
    spec: dict
    """What its `build` receives."""
    python: str
    """The interpreter of its environment."""
    environment: dict = field(default_factory=dict)
    """Variables on top of the parent's."""


@dataclass
class Measured:
    """What one side answered."""

    side: Side
    idle_rss_bytes: int = 0
    threads: int = 0
    samples: list[dict] = field(default_factory=list)
    death: str = ""
    """Why the side ended before its last step; empty when it did not."""

    def median(self, figure: str = "seconds") -> float:
        """Median over the kept steps."""
        return statistics.median(sample[figure] for sample in self.samples)

    @property
    def peak_rss_bytes(self) -> int:
        """Most memory the process held."""
        return max((sample["peak_rss_bytes"] for sample in self.samples), default=0)

    @property
    def step_memory_bytes(self) -> int:
        """Peak beyond the loaded model: activations, gradients, optimizer state, scores."""
        return self.peak_rss_bytes - self.idle_rss_bytes


class _Process:
    """A side's process and the pipes to it."""

    def __init__(self, measured: Measured, folder: Path):
        side = measured.side
        folder.mkdir(parents=True, exist_ok=True)
        spec, self._log = folder / f"{side.name}.json", folder / f"{side.name}.log"
        spec.write_text(json.dumps(side.spec))
        command = [side.python, "-m", f"benchmarks.sides.{side.module}", str(spec)]
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "DS_ACCELERATOR": "cpu",
            **side.environment,
        }
        with open(self._log, "w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
            )
        self.measured = measured

    def answer(self) -> dict | None:
        """The next line; None when the process has died, and then the reason is noted."""
        for line in self._process.stdout:
            if line.startswith("{"):  # some libraries print while they are imported
                return json.loads(line)
        code = self._process.wait()
        lines = [x for x in self._log.read_text(errors="replace").splitlines() if x.strip()]
        self.measured.death = f"exit code {code}: {lines[-1] if lines else 'no message'}"
        return None

    def ready(self) -> None:
        """Wait until the side is built."""
        answer = self.answer()
        if answer:
            self.measured.idle_rss_bytes, self.measured.threads = answer["idle_rss_bytes"], answer["threads"]

    def step(self) -> dict | None:
        """One timed step; None when the side died in it or before."""
        if self.measured.death:
            return None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("\n")
        return self.answer()

    def stop(self) -> None:
        """End this process."""
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def say_at_once(line: str) -> None:
    """Print without buffering: a comparison takes minutes."""
    print(line, flush=True)


def run_interleaved(
    name: str,
    sides: Sequence[Side],
    repeats: int,
    warmups: int = 1,
    *,
    one_at_a_time: bool = False,
    say: Callable[[str], None] = say_at_once,
) -> list[Measured]:
    """Steps in the order A B A B …; the first `warmups` rounds only warm up (and count for peak memory).

    one_at_a_time: run the sides one after another instead, for sides too large to be in memory together.
    """
    groups = [[side] for side in sides] if one_at_a_time else [list(sides)]
    measured = []
    for group in groups:
        processes = [_Process(Measured(side), RESULTS / "logs" / name) for side in group]
        for process in processes:
            process.ready()
        for round_index in range(warmups + repeats):
            for process in processes:
                sample = process.step()
                if sample is None:
                    continue
                if round_index >= warmups:
                    process.measured.samples.append(sample)
                say(
                    f"  {name} · {process.measured.side.name}: {sample['seconds']:.3f} s"
                    + ("" if round_index >= warmups else " (warm-up)")
                )
        for process in processes:
            process.stop()
            if process.measured.death:
                say(f"  {name} · {process.measured.side.name} died: {process.measured.death}")
        measured += [process.measured for process in processes]
    return measured


@dataclass(frozen=True)
class Ratio:
    """slower / faster over repeats of the same round."""

    median: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{self.median:.2f}× ({self.lowest:.2f}–{self.highest:.2f})"


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """Median and range of the per-round quotients: neighbours in time, so that slow spells of the machine
    cancel."""
    quotients = sorted(a / b for a, b in zip(numerator, denominator))
    return Ratio(statistics.median(quotients), quotients[0], quotients[-1])


def machine() -> str:
    """What the numbers were measured on."""
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    return f"{os.cpu_count()} cores, load average {load}, {time.strftime('%Y-%m-%d %H:%M')}"
