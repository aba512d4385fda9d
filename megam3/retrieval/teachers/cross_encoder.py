"""Any Hugging Face cross-encoder with one or two labels as a teacher.

One label: its logit. Two labels (irrelevant, relevant): the difference of their logits, which is the logit of
the second label's probability, so that the same softmax over a group of passages fits both.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from megam3.errors import CheckpointError, ConfigError
from megam3.model.device import DTYPES, pick_device, pick_precision
from megam3.retrieval.teachers.base import Pair, num_positions, padded_batches


class CrossEncoder:
    """A sequence-classification model that reads query and passage together.

    Args:
        folder: model and tokenizer; foreign code is never run.
        device: None: CUDA when there is one.
        precision: auto: bf16 on CUDA (fp16 where bf16 is only emulated), fp32 elsewhere.
        max_tokens: of both texts together, the longer one is cut; None: what the tokenizer allows, at most
            512.
        batch_tokens: padded tokens scored at a time.

    Raises:
        CheckpointError: unreadable, or of more than two labels.
        ConfigError: a limit that the model has no positions for, an unknown precision, a device that is not
            there.
    """

    def __init__(
        self,
        folder: str,
        *,
        device: str | None = None,
        precision: str = "auto",
        max_tokens: int | None = None,
        batch_tokens: int = 16384,
    ):
        self.device, self.batch_tokens = pick_device(device), batch_tokens
        dtype = DTYPES[pick_precision(precision, self.device)]
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
            model = AutoModelForSequenceClassification.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True, dtype=dtype
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            rule = f"holds no cross-encoder that transformers can load ({str(error).partition(chr(10))[0]})"
            raise CheckpointError("--model", folder, rule, "check the folder") from error
        if model.config.num_labels not in (1, 2):
            rule = f"has {model.config.num_labels} labels; a re-ranker has one or two"
            raise CheckpointError("--model", folder, rule, "give a re-ranker")
        self.model = model.to(self.device).eval()
        self.max_tokens = self._limit(max_tokens)

    def _limit(self, max_tokens: int | None) -> int:
        most = min(num_positions(self.model.config), self.tokenizer.model_max_length)
        limit = min(512, most) if max_tokens is None else max_tokens
        if not 4 < limit <= most:
            rule = f"must be between 5 and {most}, what the model has positions for"
            raise ConfigError("--max-tokens", limit, rule, "lower it")
        return limit

    @torch.no_grad()
    def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        """float32 [n], in the order given."""
        if not pairs:
            return np.zeros(0, dtype=np.float32)
        encoded = self.tokenizer(
            [query for query, _ in pairs],
            [passage for _, passage in pairs],
            truncation="longest_first",
            max_length=self.max_tokens,
        )
        scores = np.zeros(len(pairs), dtype=np.float32)
        for batch in padded_batches([len(ids) for ids in encoded["input_ids"]], self.batch_tokens):
            inputs = self.tokenizer.pad(
                {name: [values[n] for n in batch] for name, values in encoded.items()}, return_tensors="pt"
            )
            logits_NL = self.model(**inputs.to(self.device)).logits.float()
            one = logits_NL[:, 0] if logits_NL.shape[1] == 1 else logits_NL[:, 1] - logits_NL[:, 0]
            scores[batch] = one.cpu().numpy()
        return scores
