"""Text in, representations out: the trained model for inference.

    embedder = M3Embedder("runs/demo/export")
    encoded = embedder.encode(["what is a heading?", "A heading names a section."])
    embedder.encode("what is a heading?", heads=["dense"], dense_dim=256).dense_vecs   # one text
    embedder.score([("what is a heading?", "A heading names a section.")])["sum"]
    embedder.encode(texts, device=["cuda:0", "cuda:1"])          # a process for each
    with embedder.on_devices(["cuda:0", "cuda:1"]) as several:   # the processes stay for several calls
        several.encode(texts)

Texts are sorted by length and packed up to a token budget; results come back in the order given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import tokenizers
import torch
from transformers import PreTrainedTokenizerBase

from megam3.batch import Representations
from megam3.config.weights import HEADS, HeadWeights
from megam3.data.tokenizer import Tokenizer, check_vocabulary
from megam3.embedder_processes import EncodingProcesses, encoding_processes
from megam3.errors import ConfigError, DataError
from megam3.instructions import Instructions, read_instructions
from megam3.model.device import Precision, PrecisionWish, pick_device, pick_precision
from megam3.model.encoded import Encoded, encoded_batch, lexical_match, truncate_dense
from megam3.model.folder import model_folder
from megam3.model.inference import load_model, offered_heads, represent_batches, suited_batch_tokens
from megam3.model.m3 import M3Model, max_model_tokens
from megam3.model.pretrained import load_tokenizer_of, refuse_missing_heads
from megam3.obs.progress import encoding_progress

_PAIRS_AT_ONCE = 1024
_TEXTS_PER_CALL = 1024
"""Texts that go to the tokenizer in one call, which uses all cores; what it returns beside ids is dropped."""


class M3Embedder:
    """An M3 model and its tokenizer, without gradients.

    Args:
        path: a folder that `megam3 export` wrote or of the published layout, or the id of one on the hub.
            Heads without weights in it are not offered (`heads`).
        device: None: CUDA when there is one.
        precision: auto: bf16 on CUDA (fp16 where bf16 is only emulated), fp32 elsewhere.

    Raises:
        ConfigError, CheckpointError: the folder cannot be served, its tokenizer belongs to another model, or
            the device is not there.
    """

    def __init__(
        self, path: str, *, device: str | torch.device | None = None, precision: PrecisionWish = "auto"
    ):
        target = pick_device(device)
        own = pick_precision(precision, target)
        path = model_folder(path)
        model = load_model(path, target, own)
        self._take(model, load_tokenizer_of(path))
        check_vocabulary(self._text_tokenizer, model.encoder.config.vocab_size, path)
        self._source = (path, own)
        self.instructions = read_instructions(path)

    @classmethod
    def from_model(cls, model: M3Model, tokenizer: PreTrainedTokenizerBase) -> M3Embedder:
        """Around a model that is in memory already (evaluation during training); the model is not copied."""
        embedder = cls.__new__(cls)
        embedder._take(model, tokenizer)
        return embedder

    instructions = Instructions()
    """What the folder says stands before queries and passages; `encode_queries` and `encode_passages` put it
    there."""
    _source: tuple[str, Precision] | None = None
    """Where processes read the same model; None: it is in this one alone."""
    _processes: EncodingProcesses | None = None
    """Those that encode instead of this one."""

    def _take(self, model: M3Model, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_tokens = min(8192, max_model_tokens(model), tokenizer.model_max_length)
        """Longest text, special tokens included."""
        # what training data is prepared with; a copy, because limits set on the original would change it
        backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._text_tokenizer = Tokenizer(backend, {})

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads that are offered; dense vectors need no weights and always are."""
        return offered_heads(self.model)

    @property
    def default_batch_tokens(self) -> int:
        """Tokens encoded at a time unless a caller says otherwise: what suits the device."""
        return suited_batch_tokens([self.device])

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.encoder.parameters()).device

    def to(self, device: str | torch.device) -> M3Embedder:
        """Move the model; returns itself."""
        self.model.to(pick_device(device))
        return self

    @contextmanager
    def on_devices(self, devices: Sequence[str | torch.device]) -> Iterator[M3Embedder]:
        """The same embedder whose `encode` and `score` use a process for each of `devices`, until the block
        ends; each holds the model. `["cpu"] * 4` are four processes that share the cores.

        Batches are those of one process, so results are equal to it, to the bit where threads are as many.

        Raises:
            ConfigError: no device, one that is not there, or a model that was not read from a folder.
        """
        if not devices or isinstance(devices, str):
            raise ConfigError("devices", devices, "must be a list of devices", 'write ["cuda:0", "cuda:1"]')
        if self._source is None:
            rule = "needs a model that other processes can read, and this one is in memory alone"
            raise ConfigError("devices", list(map(str, devices)), rule, "load it by M3Embedder(folder)")
        several = copy.copy(self)
        with encoding_processes(*self._source, [pick_device(device) for device in devices]) as processes:
            several._processes = processes
            yield several

    def token_arrays(self, texts: Sequence[str], *, max_tokens: int | None = None) -> list[np.ndarray]:
        """int32 ids of each text, special tokens included, cut at `max_tokens` (None: what the model takes).

        Raises:
            ConfigError: a limit the model has no positions for.
            DataError: something that is not a string.
        """
        limit = self.max_tokens if max_tokens is None else max_tokens
        if not 2 < limit <= self.max_tokens:
            raise ConfigError(
                "max_tokens",
                limit,
                f"must be between 3 and {self.max_tokens}, what the model has positions for",
                "lower it",
            )
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"texts[{index}]", text, "is not a string", "pass a list of strings")
        arrays: list[np.ndarray] = []
        for start in range(0, len(texts), _TEXTS_PER_CALL):
            arrays += self._text_tokenizer.encode(texts[start : start + _TEXTS_PER_CALL], limit)[0]
        return arrays

    def token_ids(self, texts: Sequence[str], *, max_tokens: int | None = None) -> list[list[int]]:
        """As `token_arrays`, as lists."""
        return [ids.tolist() for ids in self.token_arrays(texts, max_tokens=max_tokens)]

    def token_offsets(self, texts: Sequence[str], *, max_tokens: int) -> list[list[tuple[int, int]]]:
        """Characters start … stop-1 of each token of `token_arrays`; (0, 0) for special ones."""
        return self._text_tokenizer.offsets(texts, max_tokens)

    def represent_ids(
        self,
        token_ids: Sequence[Sequence[int] | np.ndarray],
        *,
        batch_tokens: int | None = None,
        heads: Sequence[str] | None = None,
    ) -> Iterator[tuple[list[int], Representations]]:
        """Batches of (positions in `token_ids`, Representations on the device), see `length_batches`.

        Args:
            batch_tokens: None: 4096 on a CPU, 32768 on a GPU.
            heads: which to compute; None: all that the model has. The dense vectors always come.
        """
        heads = self.model.heads if heads is None else heads
        batch_tokens = self.default_batch_tokens if batch_tokens is None else batch_tokens
        yield from represent_batches(self.model, token_ids, batch_tokens, heads)

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        heads: Sequence[str] | None = None,
        max_tokens: int | None = None,
        batch_tokens: int | None = None,
        dense_dim: int | None = None,
        normalize: bool = True,
        output: Literal["numpy", "torch"] = "numpy",
        device: str | torch.device | Sequence[str | torch.device] | None = None,
        show_progress: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Encoded:
        """Representations of one text or of many, on the host.

        Args:
            texts: a list of texts; or one text, which gives its single entries instead of lists of one.
            heads: which of dense, lexical and multi_vector to bring back; the others are None in the result.
                None: all that the model has.
            max_tokens: longer texts are cut; None: as many as the model takes.
            batch_tokens: tokens encoded at a time; None: what suits the device.
            dense_dim: keep this many dimensions of the dense vector (of models trained for it: Matryoshka).
            normalize: scale a shortened dense vector to length 1 again; whole ones have length 1 anyway.
            output: kind of the arrays.
            device: move the model there first; a list of several: a process for each, see `on_devices`.
            show_progress: a bar on stderr.
            progress: called with the number of texts each batch finished.

        Raises:
            ConfigError: an unknown output, or a head, limit or dimension the model does not have.
            DataError: something that is not a string.
        """
        options: dict[str, Any] = dict(
            heads=heads,
            max_tokens=max_tokens,
            batch_tokens=batch_tokens,
            dense_dim=dense_dim,
            normalize=normalize,
            output=output,
        )
        if isinstance(texts, str):
            return self.encode([texts], device=device, **options).first()
        heads = self.heads if heads is None else heads
        self._check_output(heads, dense_dim, output)
        if isinstance(device, list | tuple):
            with self.on_devices(device) as several:
                return several.encode(texts, show_progress=show_progress, progress=progress, **options)
        if device is not None:
            self.to(device)  # type: ignore[arg-type]
        dense = np.zeros((len(texts), self.model.encoder.config.hidden_size), dtype=np.float32)
        lexical: list[dict[str, float]] = [{} for _ in texts]
        multi: list[np.ndarray] = [np.zeros((0, 0), dtype=np.float32) for _ in texts]
        token_ids = self.token_arrays(texts, max_tokens=max_tokens)
        with encoding_progress(len(texts), show_progress, progress) as report:
            for indices, part in self._parts(token_ids, heads, batch_tokens):
                if "dense" in heads:
                    dense[indices] = part.dense_vecs
                for place, index in enumerate(indices):
                    if "lexical" in heads:
                        lexical[index] = part.lexical_weights[place]
                    if "multi_vector" in heads:
                        multi[index] = part.colbert_vecs[place]
                report(len(indices))
        convert: Callable[[np.ndarray], Any] = torch.from_numpy if output == "torch" else np.asarray
        return Encoded(
            convert(truncate_dense(dense, dense_dim, normalize)) if "dense" in heads else None,
            lexical if "lexical" in heads else None,
            [convert(rows) for rows in multi] if "multi_vector" in heads else None,
        )

    def encode_queries(self, texts: str | Sequence[str], **options: Any) -> Encoded:
        """`encode` of texts that search, with the model's instruction before each; `options` are its
        arguments."""
        return self.encode(_instructed(self.instructions.query, texts), **options)

    def encode_passages(self, texts: str | Sequence[str], **options: Any) -> Encoded:
        """`encode` of texts to be found, with the model's instruction before each; `options` are its
        arguments."""
        return self.encode(_instructed(self.instructions.passage, texts), **options)

    def _parts(
        self, token_ids: Sequence[np.ndarray], heads: Sequence[str], batch_tokens: int | None
    ) -> Iterator[tuple[list[int], Encoded]]:
        """(positions in `token_ids`, what is encoded of them) batch by batch, here or in the processes."""
        if self._processes is not None:
            yield from self._processes.encode(token_ids, heads, batch_tokens)
            return
        for indices, batch in self.represent_ids(token_ids, batch_tokens=batch_tokens, heads=heads):
            yield indices, encoded_batch(batch, heads)

    def _check_output(self, heads: Sequence[str], dense_dim: int | None, output: str) -> None:
        for head in [heads] if isinstance(heads, str) else heads:
            if isinstance(heads, str) or head not in HEADS:
                raise ConfigError(
                    "heads", heads, f"must be a list of {', '.join(HEADS)}", "check the spelling"
                )
        self.require_heads(heads, "heads")
        width = self.model.encoder.config.hidden_size
        if dense_dim is not None and not 0 < dense_dim <= width:
            raise ConfigError(
                "dense_dim", dense_dim, f"must be between 1 and the model's {width}", "lower it"
            )
        if output not in ("numpy", "torch"):
            raise ConfigError("output", output, "must be numpy or torch", "leave it at numpy")

    def require_heads(self, heads: Sequence[str], field: str) -> None:
        """Refuse heads that the model does not have; `field` is where they were asked for.

        Raises:
            ConfigError: the first of them.
        """
        refuse_missing_heads(self.heads, heads, field)

    def score(
        self,
        pairs: Sequence[tuple[str, str]] | tuple[str, str],
        *,
        weights: HeadWeights | None = None,
        max_tokens: int | None = None,
        batch_tokens: int | None = None,
    ) -> dict[str, Any]:
        """Scores of (query, passage) pairs: `dense`, `lexical`, `multi_vector` and `sum`, each float32 [n].

        Texts are read as they stand, without the model's instructions. `multi_vector` is a mean over query
        tokens; `sum` weighs them 1 / 0.3 / 1, unless weights are given (arXiv 2402.03216, section 4). One
        pair of strings gives one number for each name. A head that the model does not have gives no score,
        and then there is a sum only by weights that leave it out.

        Raises:
            ConfigError: weights for a head that the model does not have.
            DataError: something that is not a pair of strings.
        """
        if len(pairs) == 2 and all(isinstance(text, str) for text in pairs) and not isinstance(pairs, str):
            one = self.score([pairs], weights=weights, max_tokens=max_tokens, batch_tokens=batch_tokens)  # type: ignore[list-item]
            return {name: float(values[0]) for name, values in one.items()}
        _check_pairs(pairs)
        if weights is not None:
            self.require_heads([head for head in HEADS if getattr(weights, head) > 0], "weights")
        scores = {head: np.zeros(len(pairs), dtype=np.float32) for head in self.heads}
        for start in range(0, len(pairs), _PAIRS_AT_ONCE):
            block = pairs[start : start + _PAIRS_AT_ONCE]
            texts = list(dict.fromkeys(text for pair in block for text in pair))
            row = {text: i for i, text in enumerate(texts)}
            encoded = self.encode(texts, max_tokens=max_tokens, batch_tokens=batch_tokens)
            for i, (query, passage) in enumerate(block, start):
                q, p = row[query], row[passage]
                scores["dense"][i] = encoded.dense_vecs[q] @ encoded.dense_vecs[p]
                if "lexical" in scores:
                    scores["lexical"][i] = lexical_match(
                        encoded.lexical_weights[q], encoded.lexical_weights[p]
                    )
                if "multi_vector" in scores:
                    products_KL = encoded.colbert_vecs[q] @ encoded.colbert_vecs[p].T
                    scores["multi_vector"][i] = products_KL.max(axis=1).mean()
        if weights is not None or len(scores) == len(HEADS):
            weights = weights or HeadWeights(dense=1.0, lexical=0.3, multi_vector=1.0)
            total = sum(getattr(weights, head) * values for head, values in scores.items())
            scores["sum"] = np.asarray(total, dtype=np.float32)
        return scores


def _instructed(instruction: str, texts: str | Sequence[str]) -> str | Sequence[str]:
    if not instruction:
        return texts
    if isinstance(texts, str):
        return instruction + texts
    # what is no text is refused by `token_arrays`, which knows its place
    return [instruction + text if isinstance(text, str) else text for text in texts]


def _check_pairs(pairs: Sequence[Any]) -> None:
    remedy = "pass a list of (query, passage), or one such pair"
    if isinstance(pairs, str):
        raise DataError("pairs", pairs, "is one text, not a pair of texts", remedy)
    for index, pair in enumerate(pairs):
        # a string of two letters would pass as a pair of texts
        if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(f"pairs[{index}]", pair, "is not a pair of strings", remedy)
