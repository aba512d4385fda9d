"""LIBRARY FOLDER TEXTS.json OUT.npz: token vectors of texts by MultiVectorEncoder or ColBERT, in the peer's
environment."""

import json
import sys

import numpy as np


def main(library: str, folder: str, texts_file: str, out: str) -> None:
    with open(texts_file, encoding="utf-8") as file:
        texts = json.load(file)
    if library == "pylate":
        from pylate.models import ColBERT

        rows = ColBERT(folder, device="cpu").encode(texts, is_query=False)
    else:
        from sentence_transformers import MultiVectorEncoder

        rows = MultiVectorEncoder(folder, device="cpu").encode(texts)
    np.savez(out, **{f"rows_{n}": np.asarray(value, dtype=np.float32) for n, value in enumerate(rows)})


if __name__ == "__main__":
    main(*sys.argv[1:])
