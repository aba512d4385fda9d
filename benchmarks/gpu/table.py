"""The results of the pieces as one page of tables."""

from collections.abc import Iterable
from pathlib import Path

STEP_COLUMNS = {
    "queries": "queries a GPU",
    "tokens_per_second": "tokens/s, all GPUs",
    "peak_share": "share of the matmul peak",
    "peak_bytes": "peak memory, GB",
    "planned_bytes": "planned, GB",
}
PEER_COLUMNS = {
    "queries": "queries",
    "seconds": "a step, ms",
    "tokens_per_second": "tokens/s",
    "peak_bytes": "peak memory, GB",
    "loss": "loss of the first step",
}
MAXSIM_COLUMNS = {
    "forward_seconds": "forward, ms",
    "backward_seconds": "backward, ms",
    "peak_share": "share of the matmul peak",
}


def write_table(file: Path, entries: Iterable[dict], machine: str) -> Path:
    """Write `file` from the lines of the results; a piece without figures shows its reason."""
    entries = list(entries)
    peers = [entry for entry in entries if entry["name"].startswith("peer: ")]
    steps = [entry for entry in entries if not entry["name"].startswith(("MaxSim", "peer: "))]
    maxsim = [entry for entry in entries if entry["name"].startswith("MaxSim")]
    page = [f"# One node: {machine}", ""]
    page += _table("Unified steps, three heads", STEP_COLUMNS, steps)
    page += _table("Steps of other libraries on one GPU, the same model and texts", PEER_COLUMNS, peers)
    page += _table("MaxSim, forward and backward", MAXSIM_COLUMNS, maxsim)
    page += [
        "Shares count the model's arithmetic with attention, without recomputation, against the best of",
        "many square products in the same process. Peak memory: tensors on CUDA, the process on a CPU.",
    ]
    file.write_text("\n".join(page) + "\n")
    return file


def _table(title: str, columns: dict[str, str], entries: list[dict]) -> list[str]:
    if not entries:
        return []
    lines = [
        f"## {title}",
        "",
        f"| piece | {' | '.join(columns.values())} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for entry in entries:
        figures = entry.get("figures")
        if figures is None:
            lines.append(f"| {entry['name']} | {entry['failure']} |" + " |" * (len(columns) - 1))
        else:
            cells = [_cell(name, figures.get(name)) for name in columns]
            # time ended a batch that memory would have let grow
            if figures.get("ended_by") in ("time", "bound"):
                cells[0] = f"≥ {cells[0]}"
            lines.append(f"| {entry['name']} | {' | '.join(cells)} |")
    return [*lines, ""]


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    if name.endswith("_bytes"):
        return f"{value / 1e9:.2f}"
    if name.endswith("seconds"):
        return f"{value * 1e3:.2f}"
    if name == "loss":
        return f"{value:.4g}"
    return f"{value:.1%}" if name.endswith("_share") else f"{value:,.0f}"
