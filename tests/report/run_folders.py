"""Run folders written by hand: small, with figures that a test can look for."""

import json
from pathlib import Path

RECIPE = """\
name: {name}
model:
  path: some/encoder
data:
  store_dir: {store}
  train:
  - name: pairs
optim:
  lr: {lr}
"""

LOG = """\
2026-01-01 10:00:00 INFO Memory of one of 1 ranks in GiB: zero0 (ZeRO 0), fp32
2026-01-01 10:00:00 INFO Heaviest step: texts up to 40 tokens
2026-01-01 10:00:00 INFO   weights                9.99
2026-01-01 10:00:00 INFO   peak                   9.99
2026-01-01 10:00:01 INFO peak memory after 3 steps: 8.88 GiB (the whole process); planned 9.99 GiB
2026-01-02 10:00:00 INFO Memory of one of 1 ranks in GiB: zero0 (ZeRO 0), fp32
2026-01-02 10:00:00 INFO   weights                2.25
2026-01-02 10:00:00 INFO   score matrices         0.75
2026-01-02 10:00:00 INFO   peak                   3.00
2026-01-02 10:00:01 INFO   not part of the plan   7.77
2026-01-02 10:00:02 INFO peak memory after 3 steps: 2.91 GiB (device allocations); planned 3.00 GiB
"""


def metrics_rows() -> list[dict[str, object]]:
    """Four steps; in the third the dense loss is no finite number."""
    return [
        {
            "step": step,
            "loss/total": 4.0 / step,
            "loss/dense": None if step == 3 else 8.5 / step,
            "accuracy/sum": 0.25 * step,
            "optim/grad_norm": 10.0**step,
            "optim/lr": 1e-5 * step,
            "speed/tokens_per_second": 1000.0 * step,
            "speed/matmul_peak_share": 0.125,
            "memory/peak_bytes": 1.5 * 2**30,
            "lexical/nonzero_share": 0.5,
            "data/samples": 8.0,
            "data/tokens": 640.0,
            "eval/heldout/All/ndcg@10": 0.5,
            **({"nonfinite": {"loss/dense": "nan"}} if step == 3 else {}),
        }
        for step in range(1, 5)
    ]


def evaluation(dataset: str, dense: float, bm25: float) -> dict[str, object]:
    """The content of a file in eval/: two modes, one language."""
    modes = {}
    for mode, ndcg in (("Dense", dense), ("BM25", bm25)):
        overall = {"ndcg@10": ndcg, "recall@100": 0.875, "mrr@10": 0.625}
        modes[mode] = {
            "overall": overall,
            "by_language": {"sw": {"queries": 11.0, **overall}},
            "by_length": {"1-128": {"queries": 11.0, **overall}},
        }
    sizes = {"num_queries": 11, "num_passages": 37, "num_tokens": 2541, "num_at_limit": 0, "seconds": 0.2}
    return {"dataset": dataset, **sizes, "modes": modes}


def manifest(name: str) -> dict[str, object]:
    """manifest.json of a store: Swahili and German records."""
    rules = {"language": "und", "query_instruction": "", "passage_instruction": ""}
    limits = {"query_max_tokens": 24, "passage_max_tokens": 40}
    spec = {**rules, **limits, "tokenizer": "t", "inputs": {}, "unit_bytes": 1, "units": []}
    totals = {"rows": 4321, "texts": 9000, "tokens": 765432, "truncated": 17, "rejected": 3}
    totals |= {"with_ids": 0, "with_scores": 0, "bytes": 1}
    return {
        "name": name,
        "kind": "pair",
        "spec": spec,
        "languages": ["de", "sw"],
        "shards": [],
        "totals": {**totals, "reasons": {}},
        "per_language": {"de": {"rows": 1321, "tokens": 1}, "sw": {"rows": 3000, "tokens": 1}},
        "length_histogram": [[128, 4000], [256, 321]],
        "fingerprint": "f",
    }


def write_run(folder: Path, name: str = "one", lr: str = "1e-5") -> Path:
    """A run folder with everything a report reads."""
    store = folder / "store"
    (folder / "eval").mkdir(parents=True)
    (store / "pairs").mkdir(parents=True)
    recipe = RECIPE.format(name=json.dumps(name), store=json.dumps(str(store)), lr=lr)
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    (folder / "log.txt").write_text(LOG, encoding="utf-8")
    (folder / "env.json").write_text('{"packages": {"torch": "9.8.7"}, "host": "node7"}', encoding="utf-8")
    lines = [json.dumps(row) + "\n" for row in metrics_rows()]
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    for step, dense in ((2, 0.331), (4, 0.432)):
        path = folder / "eval" / f"step-{step:06d}-heldout.json"
        path.write_text(json.dumps(evaluation("heldout", dense, 0.4)), encoding="utf-8")
    (store / "pairs" / "manifest.json").write_text(json.dumps(manifest("pairs")), encoding="utf-8")
    return folder
