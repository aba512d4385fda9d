"""READER FOLDER TEXTS.json OUT.npz: what one reader of an exported folder computes of some texts, in the
reader's own environment. The last line printed names the versions that answered."""

import importlib.metadata
import json
import sys

import numpy as np

Arrays = dict[str, np.ndarray]


def flagembedding(folder: str, texts: list[str], method: str = "encode", **options: str) -> Arrays:
    """All three heads; lexical weights as the JSON of a list of {token: weight}."""
    import torch
    from FlagEmbedding import BGEM3FlagModel

    width = torch.load(f"{folder}/colbert_linear.pt", weights_only=True)["weight"].shape[0]
    model = BGEM3FlagModel(folder, use_fp16=False, devices="cpu", colbert_dim=width, **options)
    limit = min(model.tokenizer.model_max_length, 8192)
    encoded = getattr(model, method)(
        texts,
        return_dense=True,
        return_sparse=True,
        return_colbert_vecs=True,
        max_length=limit,
        batch_size=4,
    )
    lexical = [{token: float(w) for token, w in weights.items()} for weights in encoded["lexical_weights"]]
    return {"dense": encoded["dense_vecs"], "lexical": json.dumps(lexical), **_rows(encoded["colbert_vecs"])}


def flagembedding_query(folder: str, texts: list[str]) -> Arrays:
    """`encode_queries` with the arguments that the folder's card names."""
    return flagembedding(folder, texts, "encode_queries", **_instructions(folder))


def flagembedding_corpus(folder: str, texts: list[str]) -> Arrays:
    """`encode_corpus` with them."""
    return flagembedding(folder, texts, "encode_corpus", **_instructions(folder))


def _instructions(folder: str) -> dict[str, str]:
    with open(f"{folder}/config_sentence_transformers.json", encoding="utf-8") as file:
        prompts = json.load(file)["prompts"]
    return {
        "query_instruction_for_retrieval": prompts["query"],
        "passage_instruction_for_retrieval": prompts["document"],
    }


def sentence_transformers_dense(folder: str, texts: list[str]) -> Arrays:
    """`SentenceTransformer`."""
    from sentence_transformers import SentenceTransformer

    return {"dense": SentenceTransformer(folder, device="cpu").encode(texts, batch_size=4)}


def sentence_transformers_query(folder: str, texts: list[str]) -> Arrays:
    """`encode_query`, which puts the folder's prompt for queries before texts."""
    from sentence_transformers import SentenceTransformer

    return {"dense": SentenceTransformer(folder, device="cpu").encode_query(texts, batch_size=4)}


def sentence_transformers_document(folder: str, texts: list[str]) -> Arrays:
    """`encode_document`, with the prompt for passages."""
    from sentence_transformers import SentenceTransformer

    return {"dense": SentenceTransformer(folder, device="cpu").encode_document(texts, batch_size=4)}


def multi_vector_encoder(folder: str, texts: list[str]) -> Arrays:
    """`MultiVectorEncoder` of sentence-transformers 6."""
    from sentence_transformers import MultiVectorEncoder

    return _rows(MultiVectorEncoder(folder, device="cpu").encode(texts, batch_size=4))


def pylate(folder: str, texts: list[str]) -> Arrays:
    """`ColBERT`, passages."""
    from pylate.models import ColBERT

    return _rows(ColBERT(folder, device="cpu").encode(texts, is_query=False, batch_size=4))


def sparse_encoder(folder: str, texts: list[str]) -> Arrays:
    """`SparseEncoder`, whole rows over the vocabulary."""
    from sentence_transformers import SparseEncoder

    encoded = SparseEncoder(folder, device="cpu").encode(texts, batch_size=2)
    return {"lexical": encoded.to_dense().numpy()}


def auto_model(folder: str, texts: list[str]) -> Arrays:
    """transformers' encoder; the state of `<s>`, of length 1, is the dense vector."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        padded = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        state = model(**padded).last_hidden_state[:, 0]
    return {"dense": torch.nn.functional.normalize(state, dim=-1).numpy()}


def masked_lm(folder: str, texts: list[str]) -> Arrays:
    """Logits of transformers' masked-LM model, text by text, without padding."""
    import torch
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return _rows([model(**tokenizer(text, return_tensors="pt")).logits[0].numpy() for text in texts])


def _rows(values) -> Arrays:
    return {f"rows_{n}": np.asarray(value, dtype=np.float32) for n, value in enumerate(values)}


READERS = {
    "flagembedding": flagembedding,
    "flagembedding-query": flagembedding_query,
    "flagembedding-document": flagembedding_corpus,
    "dense": sentence_transformers_dense,
    "dense-query": sentence_transformers_query,
    "dense-document": sentence_transformers_document,
    "multi-vector": multi_vector_encoder,
    "pylate": pylate,
    "sparse-encoder": sparse_encoder,
    "auto-model": auto_model,
    "masked-lm": masked_lm,
}


def versions() -> str:
    """Of the packages that a reader may be."""
    found = []
    for name in ("FlagEmbedding", "pylate", "sentence-transformers", "transformers"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def main(reader: str, folder: str, texts_file: str, out: str) -> None:
    """See the module's docstring."""
    with open(texts_file, encoding="utf-8") as file:
        texts = json.load(file)
    np.savez(out, **READERS[reader](folder, texts))
    print(versions())


if __name__ == "__main__":
    main(*sys.argv[1:])
