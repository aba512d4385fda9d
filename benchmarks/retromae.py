"""One RetroMAE step beside FlagEmbedding's own collator and model: time, peak memory, tokens that are masked.

    python -m benchmarks.retromae SOURCE [--tokens 512 2048 8192] [--hidden 128] [--layers 2] [--repeats 1]

SOURCE is the unpacked source distribution of FlagEmbedding 1.2.11, the last release with `retromae_pretrain`
(`pip download --no-deps --no-binary :all: FlagEmbedding==1.2.11`). Both sides tokenize, mask and train the
same text with the same encoder weights in fp32; the sides run one after the other, for their memory. A step
is collator, forward, backward and AdamW; memory is the process's peak above the loaded model.
"""

import argparse
import random
import sys

from benchmarks.environments import python_of
from benchmarks.measure import RESULTS, Measured, Side, machine, run_interleaved
from benchmarks.models import ModelSize, make_model_folder
from benchmarks.texts import make_text

MIB = 1 << 20


def compare(tokens: int, size: ModelSize, source: str, threads: int, repeats: int) -> list[Measured]:
    """Both sides on one text of `tokens` tokens."""
    folder = make_model_folder(RESULTS / "models", size)
    spec = {
        "model_folder": str(folder),
        "texts": [make_text(random.Random(0), tokens, size.vocab_size)],
        "max_tokens": tokens,
        "source": source,
        "threads": threads,
    }
    sides = [
        Side("megam3", "megam3_retromae", spec, sys.executable),
        Side("megam3 + bags", "megam3_retromae", spec | {"bag_of_words_weight": 0.1}, sys.executable),
        Side("FlagEmbedding", "flagembedding_retromae", spec, python_of("flagembedding")),
    ]
    return run_interleaved(f"retromae-{tokens}", sides, repeats, 0, one_at_a_time=True)


def row(measured: Measured) -> str:
    """One line of the table."""
    if not measured.samples:
        return f"| {measured.side.name} | died: {measured.death} |"
    last = measured.samples[-1]
    numbers = (last[name] for name in ("tokens", "hidden", "decoded"))
    seconds = (measured.median(name) for name in ("seconds", "collate_seconds", "cpu_seconds"))
    cells = [*(f"{x:.2f}" for x in seconds), f"{measured.step_memory_bytes / MIB:.0f}", *map(str, numbers)]
    return f"| {measured.side.name} | {' | '.join(cells)} |"


def main() -> None:
    """Print a table per length."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    for name, default in (
        ("hidden", 128),
        ("layers", 2),
        ("vocabulary", 16_000),
        ("threads", 1),
        ("repeats", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    size = ModelSize(options.vocabulary, options.layers, options.hidden, max(options.tokens))
    print(f"{size.label}; {machine()}")
    for tokens in options.tokens:
        found = compare(tokens, size, options.source, options.threads, options.repeats)
        print(f"{tokens} tokens\n| side | s | s of it masking | CPU s | MiB | tokens | told | decoded |")
        print("|---|---|---|---|---|---|---|---|")
        print("\n".join(map(row, found)), flush=True)


if __name__ == "__main__":
    main()
