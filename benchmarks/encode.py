"""Encoding for inference beside FlagEmbedding and sentence-transformers, on texts of one's own.

    python -m benchmarks.encode MODEL TEXTS.jsonl [--count 384] [--repeats 3] [--max-tokens 512]

MODEL is a folder in the published layout (`megam3 export`, `megam3 import --new-heads`); TEXTS holds a text
under `text` a line. Texts are drawn evenly over the file, so languages and sections come as they lie there.
All three outputs are compared with `BGEM3FlagModel.encode`, the dense vector alone with
`SentenceTransformer.encode`; every side tokenises, runs fp32 and keeps its own default batch size, unless
`--batch-size` gives the peers another. Sides alternate, and each answers with sums over what it computed:
these must agree, or a side did other work.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.comparisons import Budget, Finding, Setting, ours, speed_finding
from benchmarks.environments import python_of
from benchmarks.measure import RESULTS, Measured, Side, machine, run_interleaved
from benchmarks.report import write_report

AIM = Budget(">=", 1.5)
PEER_BATCHES = {"flagembedding": 256, "sentence-transformers": 32}
"""Their own defaults on a CPU."""
_FIGURES = ("dense", "lexical", "multi_vector")
_TOLERANCE = 1e-3
"""Relative, of sums over thousands of fp32 values that cancel."""


def read_texts(path: Path, count: int) -> list[str]:
    """`count` texts, evenly spaced over the file; all of them where it holds fewer."""
    with path.open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file if line.strip()]
    if len(texts) <= count:
        return texts
    return [texts[i * len(texts) // count] for i in range(count)]


def agreement_finding(what: str, first: Measured, second: Measured) -> list[Finding]:
    """Largest relative difference of the sums both sides answered with; nothing when a side died."""
    if first.death or second.death:
        return []
    one, other = first.samples[0], second.samples[0]
    worst = max(
        abs(one[name] - other[name]) / max(abs(other[name]), 1.0)
        for name in _FIGURES
        if name in one and name in other
    )
    return [
        Finding(
            f"{what}: largest relative difference of sums", worst, f"{worst:.1e}", Budget("<=", _TOLERANCE)
        )
    ]


def compare(
    model: str, texts: Sequence[str], max_tokens: int, batch_size: int | None, repeats: int
) -> list[Setting]:
    """Three outputs against FlagEmbedding, then dense alone against sentence-transformers."""
    spec = {"model_folder": str(Path(model).resolve()), "texts": list(texts), "max_tokens": max_tokens}
    settings = []
    for peer, module, heads in (
        ("flagembedding", "flagembedding_encode", list(_FIGURES)),
        ("sentence-transformers", "sentence_transformers_encode", ["dense"]),
    ):
        size = batch_size or PEER_BATCHES[peer]
        sides = [
            ours("megam3", "megam3_encode", {**spec, "heads": heads}),
            Side(peer, module, {**spec, "batch_size": size}, python_of(peer)),
            ours("megam3-bf16", "megam3_encode", {**spec, "heads": heads, "precision": "bf16"}),
        ]
        ours_, theirs, in_bf16 = measured = run_interleaved(f"encode-{peer}", sides, repeats)
        what = f"encode {' + '.join(heads)}, megam3 against {peer}, its batch {size}"
        findings = speed_finding(what, theirs, ours_, AIM) + agreement_finding(what, ours_, theirs)
        # the peers turn a model on a CPU back to fp32, so this is a choice that only one side offers
        findings += speed_finding(f"{what}, megam3 in bf16", theirs, in_bf16, None)
        settings.append(Setting(f"{len(texts)} texts, {Path(model).name}", 0, measured, findings))
    return settings


def describe(lengths: Sequence[int]) -> str:
    """Quantiles of the texts' lengths in characters.

    >>> describe([1, 2, 3, 4, 5])
    'characters: 1 shortest, 2, 3, 4 at the quarters, 5 longest'
    """
    ordered = sorted(lengths)
    quarters = ", ".join(str(ordered[(len(ordered) - 1) * i // 4]) for i in (1, 2, 3))
    return f"characters: {ordered[0]} shortest, {quarters} at the quarters, {ordered[-1]} longest"


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.encode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("texts", metavar="TEXTS.jsonl", type=Path)
    parser.add_argument("--count", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=None, help="of the peers (default: their own)")
    given = parser.parse_args(argv)
    texts = read_texts(given.texts, given.count)
    print(f"{len(texts)} texts, {describe([len(text) for text in texts])}")
    settings = compare(given.model, texts, given.max_tokens, given.batch_size, given.repeats)
    print(write_report(RESULTS / "encode", {"encode": settings}, machine()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
