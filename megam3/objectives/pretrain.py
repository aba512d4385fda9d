"""Pretraining on documents: RetroMAE (arXiv 2205.12035), plain masked LM where `decoder` is false, and
DupMAE's bag-of-words term (arXiv 2211.08769) where it has a weight.

The loss of a step is, for the encoder and the decoder each, (Σ cross-entropy over masked tokens) / (their
number over all ranks and all accumulated batches), and for bags of words the same with texts. How the texts
of a step are spread over ranks, accumulated batches and chunks therefore changes no gradient:

    batch 0 hides 3 tokens, batch 1 hides 1     loss = (l0 + l1 + l2 + l3) / 4,
                                                not the mean of (l0 + l1 + l2) / 3 and l3 / 1

The masks are chosen and counted over ranks before the first forward pass, so a batch splits into chunks of
texts without a gradient cache. How many tokens they hide only the device knows: a step waits for it once, for
the counts of all texts of all its batches, and cuts chunks by them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megam3.batch import Progress, TextBatch
from megam3.config.objective import PretrainConfig
from megam3.config.schema import ModelConfig
from megam3.cost import plan_chunks
from megam3.dist import comm
from megam3.encoders import EncoderShape
from megam3.errors import CheckpointError
from megam3.model.bag_of_words import distinct_ids
from megam3.model.masking import (
    VocabularyTables,
    mask_tokens,
    order_in_halves,
    sum_by_text,
    vocabulary_tables,
)
from megam3.model.pretrained import load_tokenizer_of, read_special_ids
from megam3.model.retromae import RetroMAE, load_retromae
from megam3.objectives.base import Objective, Trainee
from megam3.packed_texts import PackedTexts, map_tensors, pack_texts

_FILLER_IDS = (0, 0)


@dataclass(frozen=True, kw_only=True)
class _MaskedTexts:
    """A chunk, and what is hidden in it."""

    texts: PackedTexts
    masked_ids_T: Tensor
    hidden_M: Tensor
    order_T: Tensor
    decoded_T: Tensor
    bag_2Z: Tensor | None
    counts: tuple[int, int, int]
    """Tokens the encoder tells, tokens the decoder tells, texts with a bag of words."""


@dataclass(frozen=True, kw_only=True)
class _Masks:
    """What is hidden in a whole batch, on the device; how much of it, the host does not know yet."""

    texts: PackedTexts
    masked_ids_T: Tensor
    hidden_T: Tensor
    order_T: Tensor
    decoded_T: Tensor
    bag_2T: Tensor | None
    """See `distinct_ids`."""
    counts_3N: Tensor
    """Of each text: tokens the encoder tells, tokens the decoder tells, distinct ids."""

    def cut(self, chunk_tokens: int | None, counts: Sequence[Sequence[int]]) -> list[_MaskedTexts]:
        """Chunks of at most `chunk_tokens`; `counts` is `counts_3N` on the host."""
        texts = self.texts
        plan = plan_chunks(texts.lengths, texts.num_tokens if chunk_tokens is None else chunk_tokens)
        hidden_M = torch.nonzero_static(self.hidden_T, size=sum(counts[0])).squeeze(1)
        chunks = []
        # tokens, and the three counts, of the chunks before this one
        before = [0, 0, 0, 0]
        for start, stop in plan:
            after = [
                first + sum(of_texts[start:stop]) for first, of_texts in zip(before, (texts.lengths, *counts))
            ]
            tokens, hidden, _, ids = (slice(a, b) for a, b in zip(before, after))
            bag_2Z = None
            if self.bag_2T is not None:
                text_Z, id_Z = self.bag_2T[:, ids]
                bag_2Z = torch.stack([text_Z - start, id_Z])
            chunks.append(
                _MaskedTexts(
                    texts=texts.select(start, stop),
                    masked_ids_T=self.masked_ids_T[tokens],
                    hidden_M=hidden_M[hidden] - before[0],
                    order_T=self.order_T[tokens] - before[0],
                    decoded_T=self.decoded_T[tokens],
                    bag_2Z=bag_2Z,
                    counts=(
                        after[1] - before[1],
                        after[2] - before[2],
                        sum(count > 0 for count in counts[2][start:stop]),
                    ),
                )
            )
            before = after
        return chunks


@dataclass(frozen=True, kw_only=True)
class _MaskedBatch:
    """One accumulated batch of this rank, ready to run."""

    chunks: list[_MaskedTexts]
    """As many on every rank."""
    counted: tuple[float, float, float]
    """What the sums of encoder, decoder and bags are multiplied by: W · accumulated batches / global count
    (`megam3.dist.gather` derives W; the engine divides by the batches)."""


class PretrainObjective(Objective[PretrainConfig]):
    """The objective for TextBatch."""

    section_type = PretrainConfig

    def __init__(self, section: PretrainConfig, chunk_tokens: int | None = None):
        super().__init__(section, chunk_tokens)
        # a constant of the model's folder, read with it
        self._tables: VocabularyTables | None = None

    def load_model(self, config: ModelConfig, dtype: torch.dtype) -> RetroMAE:
        """See `megam3.objectives.base.Objective`."""
        model = load_retromae(config.path, config, has_decoder=self.section.decoder, dtype=dtype)
        self._tables = read_vocabulary_tables(config.path, model.encoder.config.vocab_size)
        return model

    def shape(self, model: nn.Module) -> EncoderShape:
        """See `megam3.objectives.base.Objective`; the decoder and the vocabulary's products are not
        counted."""
        assert isinstance(model, RetroMAE)
        config = model.encoder.config
        return EncoderShape(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
        )

    def is_head_parameter(self, name: str) -> bool:
        """See `megam3.objectives.base.Objective`: the masked-LM head and the decoder."""
        return name.startswith(("lm_head.", "decoder."))

    def prepare(self, batches: Sequence[TextBatch], progress: Progress) -> list[_MaskedBatch]:
        """Mask all batches of a step, and count over them and over ranks what the losses divide by: one wait
        for the device and one collective a step."""
        masks = [self._mask(batch, progress.step) for batch in batches]
        sizes = [batch.texts.num_texts for batch in batches]
        # one copy for all batches: each would wait for all that is queued on the device
        counts = torch.cat([each.counts_3N for each in masks], 1).cpu().split(sizes, 1)
        masked = [each.cut(self.chunk_tokens, its.tolist()) for each, its in zip(masks, counts, strict=True)]
        own = [sum(counts) for counts in zip((0, 0, 0), *(c.counts for chunks in masked for c in chunks))]
        columns = list(zip(*comm.all_gather_ints([*own, *map(len, masked)])))
        factor = comm.world_size() * len(batches)
        encoder, decoder, bags = (factor / max(1, sum(column)) for column in columns[:3])
        prepared = []
        for batch, chunks, lengths in zip(batches, masked, columns[3:], strict=True):
            # ZeRO gathers and reduces in every pass: a rank that is short runs passes without a loss
            if missing := max(1, *lengths) - len(chunks):
                has_bags = self.section.bag_of_words_weight > 0
                chunks += [_hidden_nowhere(batch.texts.input_ids_T.device, has_bags)] * missing
            prepared.append(_MaskedBatch(chunks=chunks, counted=(encoder, decoder, bags)))
        return prepared

    def run(self, engine: Trainee, batch: _MaskedBatch, progress: Progress) -> dict[str, Tensor]:
        """See `megam3.objectives.base.Objective`."""
        weights = (1.0, self.section.decoder_weight, self.section.bag_of_words_weight)
        scales = tuple(weight * counted for weight, counted in zip(weights, batch.counted))
        # loss, and the sums of encoder, decoder and bags
        sums_4 = torch.zeros(4, dtype=torch.float64, device=batch.chunks[0].hidden_M.device)
        for index, chunk in enumerate(batch.chunks):
            loss, *parts = engine.forward(
                chunk.texts.input_ids_T,
                chunk.masked_ids_T,
                chunk.texts.position_ids_T,
                chunk.texts.cu_seqlens_N1,
                chunk.texts.lengths,
                chunk.hidden_M,
                chunk.order_T,
                chunk.decoded_T,
                chunk.counts[1],
                chunk.bag_2Z,
                self.section.decoder_mask_share,
                scales,
            )
            engine.backward(loss, index == len(batch.chunks) - 1)
            sums_4 += torch.stack([loss, *parts]).detach()
        total, *sums = sums_4.unbind()
        encoder, decoder, bags = (part * counted for part, counted in zip(sums, batch.counted))
        figures = {"loss/total": total, "loss/encoder": encoder}
        if self.section.decoder:
            figures["loss/decoder"] = decoder
        if self.section.bag_of_words_weight:
            figures["loss/bag_of_words"] = bags
        return figures

    def _mask(self, batch: TextBatch, step: int) -> _Masks:
        """A sequence is named by its first document's row: the plan packs the same documents at every
        resume."""
        assert self._tables is not None, "load_model reads the vocabulary"
        texts, device = batch.texts, batch.texts.input_ids_T.device
        tables = self._tables = self._tables.to(device)
        section, text_ids_T = self.section, texts.text_ids_T()
        row_T = comm.copy_pinned(batch.rows[batch.document_offsets_N1[:-1]], device)[text_ids_T]
        masked = mask_tokens(
            texts.input_ids_T,
            text_ids_T,
            row_T,
            texts.position_ids_T,
            tables,
            num_texts=texts.num_texts,
            share=section.encoder_mask_share,
            replace=(section.mask_token_share, section.random_token_share),
            seed=section.mask_seed,
            step=step,
        )
        decoded_T = torch.zeros_like(texts.input_ids_T, dtype=torch.bool)
        ordinary_T = ~tables.special_V[texts.input_ids_T]
        if section.decoder:
            decoded_T = ordinary_T & (texts.position_ids_T > 0)
        bag_2T, num_ids_N = None, text_ids_T.new_zeros(texts.num_texts)
        if section.bag_of_words_weight:
            bag_2T, num_ids_N = distinct_ids(
                texts.input_ids_T, text_ids_T, ordinary_T, len(tables.special_V), texts.num_texts
            )
        told = [sum_by_text(flags_T, text_ids_T, texts.num_texts) for flags_T in (masked.hidden_T, decoded_T)]
        return _Masks(
            texts=texts,
            masked_ids_T=masked.input_ids_T,
            hidden_T=masked.hidden_T,
            order_T=order_in_halves(
                text_ids_T, row_T, texts.position_ids_T, seed=section.mask_seed, step=step
            ),
            decoded_T=decoded_T,
            bag_2T=bag_2T,
            counts_3N=torch.stack([*told, num_ids_N]),
        )


def _hidden_nowhere(device: torch.device, has_bags: bool) -> _MaskedTexts:
    """A chunk that takes part in every collective and whose loss is exactly 0."""
    texts = map_tensors(pack_texts([_FILLER_IDS]), lambda tensor: comm.copy_pinned(tensor, device))
    return _MaskedTexts(
        texts=texts,
        masked_ids_T=texts.input_ids_T,
        hidden_M=texts.input_ids_T.new_zeros(0),
        order_T=torch.arange(texts.num_tokens, device=device),
        decoded_T=torch.zeros_like(texts.input_ids_T, dtype=torch.bool),
        bag_2Z=texts.input_ids_T.new_zeros(2, 0) if has_bags else None,
        counts=(0, 0, 0),
    )


def read_vocabulary_tables(path: str, vocab_size: int) -> VocabularyTables:
    """The tables of the tokenizer in folder `path`; embedding rows without a piece count as special.

    Raises:
        CheckpointError: no readable tokenizer, or one without a mask token.
    """
    tokenizer = load_tokenizer_of(path)
    if tokenizer.mask_token_id is None:
        rule = "its tokenizer has no mask token, which masked-language modelling needs"
        raise CheckpointError("model.path", path, rule, "use a masked-language model's tokenizer")
    pieces = list(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
    unused: Iterable[int] = range(len(pieces), vocab_size)
    padded = [*pieces, *("" for _ in unused)]
    return vocabulary_tables(padded, (*read_special_ids(path), *unused), tokenizer.mask_token_id)
