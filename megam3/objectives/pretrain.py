"""Pretraining on documents: RetroMAE (arXiv 2205.12035), or plain masked LM where `decoder` is false.

The loss of a batch is (Σ cross-entropy over masked tokens) / (their number on all ranks), for the encoder and
the decoder each. The masks are chosen and counted over ranks before the first forward pass, so it splits into
chunks of texts without a gradient cache.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megam3.batch import PackedTexts, Progress, TextBatch, pack_texts
from megam3.config.objective import PretrainConfig
from megam3.config.schema import ModelConfig
from megam3.cost import plan_chunks
from megam3.dist import comm
from megam3.encoders import EncoderShape
from megam3.errors import CheckpointError
from megam3.model.masking import VocabularyTables, mask_tokens, order_in_halves, vocabulary_tables
from megam3.model.pretrained import load_tokenizer_of, read_special_ids
from megam3.model.retromae import RetroMAE, load_retromae
from megam3.objectives.base import Objective, Trainee

_FILLER_IDS = (0, 0)


@dataclass(frozen=True, kw_only=True)
class _MaskedTexts:
    """A chunk, and what is hidden in it."""

    texts: PackedTexts
    masked_ids_T: Tensor
    hidden_M: Tensor
    order_T: Tensor
    decoded_T: Tensor


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

    def run(self, engine: Trainee, batch: TextBatch, progress: Progress) -> dict[str, Tensor]:
        """See `megam3.objectives.base.Objective`."""
        chunks = self._mask_chunks(batch, progress.step)
        own = [sum(len(c.hidden_M) for c in chunks), sum(int(c.decoded_T.sum()) for c in chunks)]
        num_encoder, num_decoder = (max(1, sum(counts)) for counts in zip(*comm.all_gather_ints(own)))
        num_chunks = max(1, comm.max_over_ranks(len(chunks)))
        filler = pack_texts([_FILLER_IDS]).to(batch.texts.input_ids_T.device)
        chunks += [_hidden_nowhere(filler)] * (num_chunks - len(chunks))
        world = comm.world_size()
        scales = (world / num_encoder, self.section.decoder_weight * world / num_decoder)
        encoder_sum = decoder_sum = total = torch.zeros((), device=batch.texts.input_ids_T.device)
        for index, chunk in enumerate(chunks):
            loss, encoder, decoder = engine.forward(
                chunk.texts.input_ids_T,
                chunk.masked_ids_T,
                chunk.texts.position_ids_T,
                chunk.texts.cu_seqlens_N1,
                chunk.texts.lengths,
                chunk.hidden_M,
                chunk.order_T,
                chunk.decoded_T,
                self.section.decoder_mask_share,
                scales,
            )
            engine.backward(loss, index == num_chunks - 1)
            total = total + loss.detach()
            encoder_sum, decoder_sum = encoder_sum + encoder.detach(), decoder_sum + decoder.detach()
        figures = {"loss/total": total, "loss/encoder": encoder_sum * (world / num_encoder)}
        if self.section.decoder:
            figures["loss/decoder"] = decoder_sum * (world / num_decoder)
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
        if section.decoder:
            decoded_T = ~tables.special_V[texts.input_ids_T] & (texts.position_ids_T > 0)
        return _MaskedTexts(
            texts=texts,
            masked_ids_T=masked.input_ids_T,
            hidden_M=masked.hidden_M,
            order_T=order_in_halves(
                text_ids_T, row_T, texts.position_ids_T, seed=section.mask_seed, step=step
            ),
            decoded_T=decoded_T,
        )


def _hidden_nowhere(texts: PackedTexts) -> _MaskedTexts:
    """A chunk that takes part in every collective and whose loss is exactly 0."""
    return _MaskedTexts(
        texts=texts,
        masked_ids_T=texts.input_ids_T,
        hidden_M=texts.input_ids_T.new_zeros(0),
        order_T=torch.arange(texts.num_tokens, device=texts.input_ids_T.device),
        decoded_T=torch.zeros_like(texts.input_ids_T, dtype=torch.bool),
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
