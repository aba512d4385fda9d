"""SOURCE OUT TEXTS.json OUT.npz: a PyLate model with mLateOn's layers around an encoder, saved by PyLate, and
its token vectors; runs in the peer's environment."""

import json
import sys

import numpy as np
import torch


def main(source: str, out: str, texts_file: str, rows_file: str) -> None:
    from pylate.models import ColBERT, Dense
    from sentence_transformers.models import Transformer

    torch.manual_seed(7)
    encoder = Transformer(source)
    width = encoder.get_word_embedding_dimension()
    linear = {"bias": False, "activation_function": torch.nn.Identity()}
    layers = [
        Dense(width, 2 * width, use_residual=True, **linear),
        Dense(2 * width, width, use_residual=True, **linear),
        Dense(width, 8, **linear),
    ]
    model = ColBERT(
        modules=[encoder, *layers], device="cpu", query_prefix="", document_prefix="", skiplist_words=[]
    )
    model.save_pretrained(out)
    with open(texts_file, encoding="utf-8") as file:
        rows = ColBERT(out, device="cpu").encode(json.load(file), is_query=False)
    np.savez(rows_file, **{f"rows_{n}": np.asarray(value, dtype=np.float32) for n, value in enumerate(rows)})


if __name__ == "__main__":
    main(*sys.argv[1:])
