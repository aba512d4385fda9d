"""One rank's share of one planned batch, as plain arrays: rows dealt, passages drawn, segments shuffled.

Every draw is a function of (seed, epoch, row), so the rows of a step, their negatives and their shuffles are
the same whatever the number of ranks or workers. Runs in the loader's worker processes, hence without torch.

    plan.PlannedBatch ──Assembler.share──▶ BatchArrays ──pipe──▶ loader.to_batch ──▶ batch.RetrievalBatch or
    TextBatch
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megam3.config.schema import DataConfig
from megam3.cost import assign_ranks, text_cost
from megam3.data.permute import draw, key_of
from megam3.data.plan import Plan, PlannedBatch
from megam3.data.shard import INDEX_FIELDS, StoredRow
from megam3.data.store import StoredDataset
from megam3.lexical_pairs import PairArrays, find_pairs

SEGMENT_ORDERS = ((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
"""The five ways to reorder three segments that change something."""


@dataclass(frozen=True, kw_only=True)
class TextFrame:
    """What surrounds the body of a stored text."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    instruction_tokens: tuple[int, ...]
    """Tokens of each dataset's passage instruction; the segment shuffle leaves them where they are."""
    special_ids: tuple[int, ...] | None = None
    """Ids without lexical weight; None: the worker looks for no pairs, the model does."""


@dataclass(frozen=True, kw_only=True)
class BatchArrays:
    """One rank's share of a batch: what a worker sends, and all that the batch contracts need."""

    is_text: bool
    """Sequences for pretraining rather than queries with their passages."""
    tokens: np.ndarray
    """int32, all texts joined: queries, then passages by group; for pretraining, sequences."""
    lengths: np.ndarray
    """int64: tokens of each text."""
    group_offsets: np.ndarray
    """int64: start of each query's passages (or sequence's documents) among all of them, and their end."""
    rows: np.ndarray
    """int64: of each query or document, among the rows of all datasets."""
    hashes: np.ndarray
    """int64: of each passage or document."""
    query_hashes: np.ndarray
    """int64: of each query's text; empty for pretraining."""
    known_positives: np.ndarray
    """int64 [queries, most]: hashes of all positives of each record, shorter rows repeat one; [queries, 0]
    where no record has more than the one drawn."""
    positive_counts: np.ndarray
    """int64: drawn positives that open each query's group; empty where every query has one."""
    scores: np.ndarray
    """float32: teacher scores of the passages, or empty."""
    dataset: str
    language: str
    in_batch_negatives: bool
    num_truncated: int
    pairs: PairArrays | None = None
    """What the lexical head writes into; None for pretraining, which has no such head."""

    @property
    def group_sizes(self) -> list[int]:
        """Passages of each query, or documents of each sequence."""
        return np.diff(self.group_offsets).tolist()

    def texts(self) -> list[np.ndarray]:
        """Token ids of each text (views)."""
        return np.split(self.tokens, np.cumsum(self.lengths)[:-1])


class Assembler:
    """Reads the rows of planned batches from the opened datasets (in the plan's order)."""

    def __init__(self, config: DataConfig, plan: Plan, datasets: Sequence[StoredDataset], frame: TextFrame):
        self.plan, self.datasets = plan, list(datasets)
        self._config, self._frame = config, frame

    def share(self, number: int, rank: int, world_size: int) -> BatchArrays:
        """Share of `rank` in batch `number` (counted over all epochs).

        Raises:
            ValueError: fewer queries than ranks.
            DataError: a stored row is damaged.
        """
        planned = self.plan.batch(number)
        positions = assign_ranks(self.row_costs(planned), world_size)[rank]
        is_text = self.plan.datasets[self._owners(planned)[0]].is_text
        return self._documents(planned, positions) if is_text else self._pairs(planned, positions)

    def row_costs(self, planned: PlannedBatch) -> np.ndarray:
        """Cost of each row of the batch, from the index alone: no token of another rank's rows is read."""
        query, positive, negative, num_negatives = self._index(planned)
        num_positives = self._num_positives(planned)
        return text_cost(query) + num_positives * text_cost(positive) + num_negatives * text_cost(negative)

    def row_tokens(self, planned: PlannedBatch) -> np.ndarray:
        """[3, rows]: tokens of the query, tokens of its passages together, number of passages.

        Passages drawn from several count with their mean length.
        """
        query, positive, negative, num_negatives = self._index(planned)
        num_positives = self._num_positives(planned)
        tokens = num_positives * positive + num_negatives * negative
        return np.stack([query, tokens, num_positives + num_negatives])

    def _num_positives(self, planned: PlannedBatch) -> np.ndarray:
        """How many positives each row draws.

        Two bytes a row of the shards, which are mapped and not read; the index, 8 bytes a row, stays as it
        is, and so do stores from before rows could draw several.
        """
        wanted = self._config.positives_per_query
        if wanted == 1:
            return np.ones(len(planned.rows), dtype=np.int64)
        found = []
        for dataset, row in zip(self._owners(planned).tolist(), planned.rows.tolist()):
            stored = self.datasets[dataset]
            shard, position = stored.shard_of(row - self.plan.datasets[dataset].first_row)
            # a text for pretraining has none, and counts as one passage
            found.append(max(1, int(stored.shard(shard).columns["num_positives"][position])))
        return np.minimum(found, wanted)

    def _owners(self, planned: PlannedBatch) -> np.ndarray:
        """Dataset of each row."""
        return np.asarray([stratum.dataset for stratum in self.plan.strata])[planned.strata]

    def _index(self, planned: PlannedBatch) -> np.ndarray:
        """[4, rows]: tokens of query, positive and negative, and how many negatives are drawn."""
        entries = np.empty((4, len(planned.rows)), dtype=np.int64)
        owners = self._owners(planned)
        for dataset in np.unique(owners).tolist():
            chosen, described = owners == dataset, self.plan.datasets[dataset]
            found = self.datasets[dataset].index[planned.rows[chosen] - described.first_row]
            for line, name in enumerate(INDEX_FIELDS):
                entries[line, chosen] = found[name]
            entries[3, chosen] = np.minimum(entries[3, chosen], described.passages_per_query - 1)
        return entries

    def _stored(self, planned: PlannedBatch, positions: np.ndarray) -> Iterator[tuple[int, StoredRow]]:
        """(dataset, contents) of the rows at these positions of the batch."""
        for dataset, row in zip(self._owners(planned)[positions].tolist(), planned.rows[positions].tolist()):
            yield dataset, self.datasets[dataset].row(row - self.plan.datasets[dataset].first_row)

    def _pairs(self, planned: PlannedBatch, positions: np.ndarray) -> BatchArrays:
        key = key_of(self.plan.seed, planned.epoch, "draw")
        queries: list[np.ndarray] = []
        passages: list[np.ndarray] = []
        group_sizes: list[int] = []
        hashes: list[int] = []
        query_hashes: list[int] = []
        known: list[np.ndarray] = []
        positive_counts: list[int] = []
        scores: list[float] = []
        num_truncated = 0
        for position, (dataset, stored) in zip(positions.tolist(), self._stored(planned, positions)):
            row, turn = int(planned.rows[position]), int(planned.passes[position])
            size, wanted = self.plan.datasets[dataset].passages_per_query, self._config.positives_per_query
            chosen = draw_group(stored, size, key, row, turn, positives_per_query=wanted)
            queries.append(stored.text(0))
            passages += [self._shuffled(stored.text(i), dataset, (key, row, turn, i)) for i in chosen]
            group_sizes.append(len(chosen))
            hashes += stored.hashes[chosen].tolist()
            query_hashes.append(int(stored.hashes[0]))
            known.append(stored.hashes[1 : 1 + stored.num_positives])
            positive_counts.append(min(wanted, stored.num_positives))
            if len(stored.scores):
                scores += stored.scores[np.asarray(chosen) - 1].tolist()
            num_truncated += int(stored.truncated[0]) + int(stored.truncated[chosen].sum())
        return self._arrays(
            planned,
            positions,
            texts=queries + passages,
            group_sizes=group_sizes,
            hashes=hashes,
            query_hashes=query_hashes,
            known_positives=rectangle(known),
            positive_counts=positive_counts if max(positive_counts, default=1) > 1 else [],
            # all or none per dataset; a batch that mixes datasets may have them for some rows only
            scores=scores if len(scores) == len(hashes) else [],
            num_truncated=num_truncated,
        )

    def _shuffled(self, text: np.ndarray, dataset: int, draw_of: tuple[int, int, int, int]) -> np.ndarray:
        """The text, reordered with the recipe's probability (arXiv 2402.03216, section 3.4)."""
        probability = self._config.segment_shuffle_probability
        if not probability or len(text) < self._config.segment_shuffle_min_tokens:
            return text
        # slots -1 and -2: the slots from 0 on belong to the draw of the group
        key, row, turn, index = draw_of
        first, second = draw(key, *(np.array([x, x]) for x in (row, turn, index)), np.array([-1, -2]))
        if float(first) / 2.0**64 >= probability:
            return text
        start = len(self._frame.prefix) + self._frame.instruction_tokens[dataset]
        stop = len(text) - len(self._frame.suffix)
        return shuffle_segments(text, start, stop, SEGMENT_ORDERS[int(second) % len(SEGMENT_ORDERS)])

    def _documents(self, planned: PlannedBatch, positions: np.ndarray) -> BatchArrays:
        documents = [stored for _, stored in self._stored(planned, positions)]
        sequences, sizes = [stored.text(0) for stored in documents], [1] * len(documents)
        if self._config.pack_texts_tokens is not None:
            max_tokens, num_prefix = self._config.pack_texts_tokens, len(self._frame.prefix)
            sequences, sizes = pack_documents(sequences, max_tokens, num_prefix)
        return self._arrays(
            planned,
            positions,
            texts=sequences,
            group_sizes=sizes,
            hashes=[int(stored.hashes[0]) for stored in documents],
            query_hashes=[],
            known_positives=rectangle([]),
            positive_counts=[],
            scores=[],
            num_truncated=sum(int(stored.truncated[0]) for stored in documents),
        )

    def _arrays(
        self,
        planned: PlannedBatch,
        positions: np.ndarray,
        *,
        texts: list[np.ndarray],
        group_sizes: list[int],
        hashes: list[int],
        query_hashes: list[int],
        known_positives: np.ndarray,
        positive_counts: list[int],
        scores: list[float],
        num_truncated: int,
    ) -> BatchArrays:
        strata = [self.plan.strata[index] for index in np.unique(planned.strata).tolist()]
        owners = sorted({stratum.dataset for stratum in strata})
        languages = sorted({stratum.language for stratum in strata})
        first = self.plan.datasets[owners[0]]
        tokens = np.concatenate(texts).astype(np.int32, copy=False)
        lengths = np.asarray([len(text) for text in texts], dtype=np.int64)
        special_ids = None if first.is_text else self._frame.special_ids
        return BatchArrays(
            is_text=first.is_text,
            tokens=tokens,
            lengths=lengths,
            pairs=None if special_ids is None else find_pairs(tokens, lengths, special_ids),
            group_offsets=np.cumsum([0, *group_sizes], dtype=np.int64),
            rows=planned.rows[positions],
            hashes=np.asarray(hashes, dtype=np.int64),
            query_hashes=np.asarray(query_hashes, dtype=np.int64),
            known_positives=known_positives,
            positive_counts=np.asarray(positive_counts, dtype=np.int64),
            scores=np.asarray(scores, dtype=np.float32),
            dataset=first.name if len(owners) == 1 else "mixed",
            language=languages[0] if len(languages) == 1 else "mul",  # ISO 639-2 for several languages
            in_batch_negatives=first.in_batch_negatives,
            num_truncated=num_truncated,
        )


def rectangle(known: Sequence[np.ndarray]) -> np.ndarray:
    """Hashes of each query's positives as one [queries, most] array; shorter rows repeat their first.

    Without a second positive anywhere nothing has to travel: [queries, 0].
    """
    most = max((len(hashes) for hashes in known), default=0)
    if most < 2:
        return np.zeros((len(known), 0), dtype=np.int64)
    return np.stack([np.concatenate([h, np.repeat(h[:1], most - len(h))]) for h in known]).astype(np.int64)


def draw_group(
    stored: StoredRow,
    passages_per_query: int,
    key: int,
    row: int,
    turn: int,
    *,
    positives_per_query: int = 1,
) -> list[int]:
    """Text indices of a query's group: one positive, or several distinct ones as far as the record has them,
    then passages_per_query - 1 distinct negatives, either by descending teacher score.

    The order matters to `m3_kd_loss`, which masks the passages of a group one after the other from the best
    down.
    """
    num_texts, num_positives = len(stored.offsets) - 1, stored.num_positives
    slots = np.arange(num_texts)
    draws = draw(key, np.full(num_texts, row), np.full(num_texts, turn), slots)
    positives = np.array([1 + int(draws[0] % np.uint64(num_positives))])
    if positives_per_query > 1:
        order = np.argsort(draws[1 : 1 + num_positives], kind="stable")
        positives = 1 + order[:positives_per_query]
    wanted = min(passages_per_query - 1, 1) if stored.only_one_negative else passages_per_query - 1
    negatives = slots[1 + num_positives :]
    negatives = negatives[np.argsort(draws[1 + num_positives :], kind="stable")[:wanted]]
    if len(stored.scores):
        positives = positives[np.argsort(-stored.scores[positives - 1], kind="stable")]
        negatives = negatives[np.argsort(-stored.scores[negatives - 1], kind="stable")]
    return [*positives.tolist(), *negatives.tolist()]


def shuffle_segments(text: np.ndarray, start: int, stop: int, order: Sequence[int]) -> np.ndarray:
    """Cut text[start:stop] in three equal parts and put them in `order`; what lies around stays."""
    segments = np.array_split(text[start:stop], 3)
    return np.concatenate([text[:start], *(segments[index] for index in order), text[stop:]])


def pack_documents(
    texts: Sequence[np.ndarray], max_tokens: int, num_prefix: int
) -> tuple[list[np.ndarray], list[int]]:
    """Join documents, in order, into sequences of at most `max_tokens`: `<s> a a </s> b b b </s>`.

    A document longer than `max_tokens` is a sequence of its own. Returns the sequences and the documents in
    each.
    """
    groups: list[list[np.ndarray]] = []
    length = 0
    for text in texts:
        added = len(text) - num_prefix
        if groups and length + added <= max_tokens:
            groups[-1].append(text[num_prefix:])
            length += added
        else:
            groups.append([text])
            length = len(text)
    return [np.concatenate(group) for group in groups], [len(group) for group in groups]
