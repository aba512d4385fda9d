"""Pretraining on documents: RetroMAE (arXiv 2205.12035), plain masked LM where `decoder` is false, and
DupMAE's bag-of-words term (arXiv 2211.08769) where it has a weight.

The loss of a step is, for the encoder and the decoder each, (Σ cross-entropy over masked tokens) / (their
number over all ranks and all accumulated batches), and for bags of words the same with texts. How the texts
of a step are spread over ranks, accumulated batches and chunks therefore changes no gradient:

    batch 0 hides 3 tokens, batch 1 hides 1     loss = (l0 + l1 + l2 + l3) / 4,
                                                not the mean of (l0 + l1 + l2) / 3 and l3 / 1

The masks are chosen and counted over ranks before the first forward pass, so a batch splits into chunks of
texts without a gradient cache.
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
from megam3.model.masking import VocabularyTables, mask_tokens, order_in_halves, vocabulary_tables
from megam3.model.pretrained import load_tokenizer_of, read_special_ids
from megam3.model.retromae import RetroMAE, load_retromae
from megam3.objectives.base import Objective, Trainee
from megam3.packed_texts import PackedTexts, pack_texts

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

    def counts(self) -> tuple[int, int, int]:
        """Tokens the encoder tells, tokens the decoder tells, texts with a bag of words."""
        bags = 0 if self.bag_2Z is None else len(self.bag_2Z[0].unique())
        return len(self.hidden_M), int(self.decoded_T.sum()), bags


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
        """Mask all batches of a step, and count over them and over ranks what the losses divide by: one
        collective a step."""
        masked = [self._mask_chunks(batch, progress.step) for batch in batches]
        own = [sum(counts) for counts in zip((0, 0, 0), *(c.counts() for chunks in masked for c in chunks))]
        columns = list(zip(*comm.all_gather_ints([*own, *map(len, masked)])))
        factor = comm.world_size() * len(batches)
        encoder, decoder, bags = (factor / max(1, sum(column)) for column in columns[:3])
        prepared = []
        for batch, chunks, lengths in zip(batches, masked, columns[3:], strict=True):
            filler = _hidden_nowhere(batch.texts.input_ids_T.device, self.section.bag_of_words_weight > 0)
            # ZeRO gathers and reduces in every pass: a rank that is short runs passes without a loss
            chunks += [filler] * (max(1, *lengths) - len(chunks))
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
                chunk.bag_2Z,
                self.section.decoder_mask_share,
                scales,
            )
            engine.backward(loss, index == len(batch.chunks) - 1)
            sums_4 += torch.stack([loss, *parts]).detach()
        total, encoder, decoder, bags = sums_4 * sums_4.new_tensor([1.0, *batch.counted])
        figures = {"loss/total": total, "loss/encoder": encoder}
        if self.section.decoder:
            figures["loss/decoder"] = decoder
        if self.section.bag_of_words_weight:
            figures["loss/bag_of_words"] = bags
        return figures

    def _mask_chunks(self, batch: TextBatch, step: int) -> list[_MaskedTexts]:
        """A sequence is named by its first document's row: the plan packs the same documents at every
        resume."""
        texts = batch.texts
        budget = texts.num_tokens if self.chunk_tokens is None else self.chunk_tokens
        rows_N = batch.rows[batch.document_offsets_N1[:-1]].to(texts.input_ids_T.device)
        plan = plan_chunks(texts.lengths, budget) if texts.num_texts else []
        return [self._mask(texts.select(start, stop), rows_N[start:stop], step) for start, stop in plan]

    def _mask(self, texts: PackedTexts, rows_N: Tensor, step: int) -> _MaskedTexts:
        assert self._tables is not None, "load_model reads the vocabulary"
        tables = self._tables = self._tables.to(texts.input_ids_T.device)
        section, text_ids_T = self.section, texts.text_ids_T()
        row_T = rows_N[text_ids_T]
        masked = mask_tokens(
            texts.input_ids_T,
            text_ids_T,
            row_T,
            texts.position_ids_T,
            tables,
            share=section.encoder_mask_share,
            replace=(section.mask_token_share, section.random_token_share),
            seed=section.mask_seed,
            step=step,
        )
        decoded_T = torch.zeros_like(texts.input_ids_T, dtype=torch.bool)
        ordinary_T = ~tables.special_V[texts.input_ids_T]
        if section.decoder:
            decoded_T = ordinary_T & (texts.position_ids_T > 0)
        bag_2Z = None
        if section.bag_of_words_weight:
            bag_2Z = distinct_ids(texts.input_ids_T, text_ids_T, ordinary_T, len(tables.special_V))
        return _MaskedTexts(
            texts=texts,
            masked_ids_T=masked.input_ids_T,
            hidden_M=masked.hidden_M,
            order_T=order_in_halves(
                text_ids_T, row_T, texts.position_ids_T, seed=section.mask_seed, step=step
            ),
            decoded_T=decoded_T,
            bag_2Z=bag_2Z,
        )


def _hidden_nowhere(device: torch.device, has_bags: bool) -> _MaskedTexts:
    """A chunk that takes part in every collective and whose loss is exactly 0."""
    texts = pack_texts([_FILLER_IDS]).to(device)
    return _MaskedTexts(
        texts=texts,
        masked_ids_T=texts.input_ids_T,
        hidden_M=texts.input_ids_T.new_zeros(0),
        order_T=torch.arange(texts.num_tokens, device=device),
        decoded_T=torch.zeros_like(texts.input_ids_T, dtype=torch.bool),
        bag_2Z=texts.input_ids_T.new_zeros(2, 0) if has_bags else None,
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
