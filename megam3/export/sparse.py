"""Why there is no folder for SparseEncoder of sentence-transformers: its own modules cannot compute the
lexical head.

The head gives a token the weight relu(w·h + b) and a text the maximum over a token's occurrences. Of the
modules in
sentence-transformers 6.2, SpladePooling reads one score per vocabulary entry and takes log(1 + relu) of it,
and
SparseStaticEmbedding reads a table and no hidden state. A class of our own in the folder would have to be
trusted
(`trust_remote_code`) by every reader, so that is refused rather than done silently.
"""

from __future__ import annotations

from megam3.errors import ConfigError


def refuse_sparse() -> ConfigError:
    """The error that `--format sparse` ends with."""
    rule = (
        "SparseEncoder's SpladePooling takes log(1 + relu) of scores over the whole vocabulary,"
        " and no other module "
        "of it weighs a text's own tokens, which is what the lexical head does"
    )
    return ConfigError("format", "sparse", rule, "use bge-m3 (FlagEmbedding, vLLM, M3Embedder) or onnx")
