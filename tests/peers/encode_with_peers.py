"""FOLDER TEXTS.json OUT.npz COLBERT_DIM: encode texts with FlagEmbedding and sentence-transformers. Runs in
the peers' environment."""

import json
import sys

import numpy as np
from FlagEmbedding import BGEM3FlagModel
from sentence_transformers import SentenceTransformer


def main(folder: str, texts_file: str, out: str, colbert_dim: str) -> None:
    with open(texts_file, encoding="utf-8") as file:
        texts = json.load(file)
    model = BGEM3FlagModel(folder, use_fp16=False, devices="cpu", colbert_dim=int(colbert_dim))
    encoded = model.encode(
        texts, return_dense=True, return_sparse=True, return_colbert_vecs=True, max_length=256
    )
    lexical = [
        {token: float(weight) for token, weight in weights.items()} for weights in encoded["lexical_weights"]
    ]
    arrays = {f"colbert_{n}": rows for n, rows in enumerate(encoded["colbert_vecs"])}
    arrays["sentence_transformers"] = SentenceTransformer(folder, device="cpu").encode(texts)
    np.savez(out, dense=encoded["dense_vecs"], lexical=json.dumps(lexical), **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
