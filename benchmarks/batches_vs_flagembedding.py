"""Batches of megam3 and of FlagEmbedding's same-dataset loader on the same pairs: padding, spread of tokens
per step, imbalance of ranks.

    python benchmarks/batches_vs_flagembedding.py MODEL_FOLDER DATA.jsonl… --flagembedding PYTHON [--queries
    64] [--ranks 4]

PYTHON is the interpreter of an environment with FlagEmbedding 1.4. It runs the real
`AbsEmbedderSameDatasetTrainDataset` for one epoch and hands back which texts each rank gets at each step;
both sides are then measured with the same tokenizer and the same cost of attention.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from megam3.config.schema import BatchConfig, DataConfig, DatasetConfig
from megam3.cost import text_cost
from megam3.data.dataset import open_training_data
from megam3.data.tokenizer import Tokenizer, load_tokenizer

# runs in the peer's environment: prints, per step, the (queries, passages) of each rank
PEER = """
import json, sys, types
from FlagEmbedding.abc.finetune.embedder.AbsDataset import AbsEmbedderSameDatasetTrainDataset as Dataset
paths, cache, size, ranks, out = json.loads(sys.argv[1])
fields = dict(train_data=paths, shuffle_ratio=0.0, small_threshold=0, drop_threshold=0, cache_path=cache,
train_group_size=1,
              max_example_num_per_dataset=10**8, knowledge_distillation=False,
              query_instruction_for_retrieval="", query_instruction_format="{}{}",
              passage_instruction_for_retrieval=None, passage_instruction_format="{}{}")
args = types.SimpleNamespace(**fields)
loaders = [Dataset(args, size // ranks, 42, None, rank, ranks) for rank in range(ranks)]
with open(out, "w") as stream:
    for step in range(len(loaders[0].batch_datas)):
        stream.write(json.dumps([list(loader[step][:2]) for loader in loaders]) + "\\n")
"""


def peer_steps(
    python: str, paths: list[str], queries: int, ranks: int, tokenizer: Tokenizer
) -> list[list[list[np.ndarray]]]:
    """Per step and rank: token counts of queries and of passages."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "steps.jsonl"
        subprocess.run(
            [python, "-c", PEER, json.dumps([paths, folder, queries, ranks, str(out)])],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        steps = [json.loads(line) for line in out.read_text().splitlines()]

    def lengths(texts: list[str], limit: int) -> np.ndarray:
        return np.array([len(ids) for ids in tokenizer.encode(texts, limit)[0]])

    return [
        [[lengths(queries, 512), lengths(passages, 8192)] for queries, passages in step] for step in steps
    ]


def own_steps(
    paths: list[str], batch: BatchConfig, ranks: int, tokenizer: Tokenizer
) -> list[list[list[np.ndarray]]]:
    """The same for megam3."""
    train = [DatasetConfig(name=Path(path).stem, paths=[path]) for path in paths]
    config = DataConfig(train=train, batch=batch, passages_per_query=1, num_workers=0)
    with tempfile.TemporaryDirectory() as folder:
        data = open_training_data(config, tokenizer, folder, 42)
        assembler = data.assembler()
        steps = []
        for number in range(data.num_batches_per_epoch):
            drafts = [assembler.draft(number, rank, ranks) for rank in range(ranks)]
            counts = [np.array([len(text) for text in draft.texts]) for draft in drafts]
            steps.append([list(np.split(count, [len(draft.rows)])) for count, draft in zip(counts, drafts)])
    return steps


def measure(steps: list[list[list[np.ndarray]]]) -> dict[str, float]:
    """One line of the table."""
    real = np.array([sum(part.sum() for rank in step for part in rank) for step in steps])
    # FlagEmbedding pads queries and passages of a rank each to their longest; megam3 pads nothing: this is
    # what its batches WOULD waste
    padded = np.array([sum(len(part) * part.max() for rank in step for part in rank) for step in steps])
    loads = np.array([[sum(text_cost(part).sum() for part in rank) for rank in step] for step in steps])
    waits = np.array(
        [
            [sum(text_cost(np.full(len(part), part.max())).sum() for part in rank) for rank in step]
            for step in steps
        ]
    )
    return {
        "steps": len(steps),
        "rows served": sum(len(rank[0]) for step in steps for rank in step),
        "padding if padded": 1 - real.sum() / padded.sum(),
        "tokens a step, mean": real.mean(),
        "tokens a step, std/mean": real.std() / real.mean(),
        "busiest rank over mean, packed": float((loads.max(1) / loads.mean(1)).mean() - 1),
        "busiest rank over mean, padded": float((waits.max(1) / waits.mean(1)).mean() - 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("data", nargs="+")
    parser.add_argument("--flagembedding", default=sys.executable)
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=4)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.model)
    peer = peer_steps(arguments.flagembedding, arguments.data, arguments.queries, arguments.ranks, tokenizer)
    rows = {"FlagEmbedding": measure(peer)}

    def add_own(name: str, batch: BatchConfig) -> None:
        rows[name] = measure(own_steps(arguments.data, batch, arguments.ranks, tokenizer))

    add_own("megam3", BatchConfig(global_queries=arguments.queries))
    # a budget bounds the tokens of a step whose texts all have their bucket's full length: twice the mean
    # comes near the mean
    add_own("by tokens", BatchConfig(global_tokens=2 * round(rows["megam3"]["tokens a step, mean"])))
    print(f"{'':<34}" + "".join(f"{name:>16}" for name in rows))
    for key in next(iter(rows.values())):
        values = [row[key] for row in rows.values()]
        print(
            f"{key:<34}"
            + "".join(f"{value:>16,.0f}" if value >= 2 else f"{value:>16.2%}" for value in values)
        )


if __name__ == "__main__":
    main()
