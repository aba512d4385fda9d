"""One rank's share of one planned batch, as plain arrays: rows dealt to ranks, passages drawn, segments shuffled, tokens read.

Every draw is a function of (seed, epoch, row), so the rows of a step, their negatives and their shuffles are the same whatever the number
of ranks or workers. Runs in the loader's worker processes, hence without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megam3.cost import assign_ranks, text_cost
from megam3.data.permute import draw, key_of
from megam3.data.plan import Plan, PlannedBatch
from megam3.data.shard import INDEX_FIELDS
from megam3.data.store import StoredDataset, StoredRow

# the five ways to reorder three segments that change something
SEGMENT_ORDERS = ((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))


@dataclass(frozen=True)
class TextFrame:
    """What surrounds the body of a stored text: special tokens, and the tokens of each dataset's passage instruction."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    instruction_tokens: tuple[int, ...]
    """Per dataset; the segment shuffle leaves them where they are."""


@dataclass(frozen=True)
class Shuffle:
    """Segment shuffle of long passages (arXiv 2402.03216, section 3.4)."""

    probability: float
    min_tokens: int


@dataclass
class Draft:
    """A batch of one rank before it becomes tensors."""

    texts: list[np.ndarray]
    """Queries, then passages by group; for pretraining, sequences."""
    group_sizes: list[int]
    rows: np.ndarray
    hashes: list[int]
    scores: list[float]
    labels: dict = field(default_factory=dict)
    """kind, dataset, language, in_batch_negatives, num_truncated, epoch, max_tokens."""


class Assembler:
    """Builds drafts from a plan and the opened datasets (in the plan's order)."""

    def __init__(
        self,
        plan: Plan,
        datasets: Sequence[StoredDataset],
        frame: TextFrame,
        shuffle: Shuffle,
        pack_tokens: int | None,
    ):
        self.plan, self.datasets = plan, list(datasets)
        self._frame, self._shuffle, self._pack_tokens = frame, shuffle, pack_tokens

    def draft(self, number: int, rank: int, world_size: int) -> Draft:
        """Share of `rank` in batch `number` (counted over all epochs).

        Raises:
            ValueError: fewer queries than ranks.
            DataError: a stored row is damaged.
        """
        planned = self.plan.batch(number)
        share = assign_ranks(self.row_costs(planned), world_size)[rank]
        labels = self._labels(planned)
        if labels["kind"] == "text":
            return self._text_draft(planned, share, labels)
        return self._pair_draft(planned, share, labels)

    def row_costs(self, planned: PlannedBatch) -> np.ndarray:
        """Cost of each row of the batch, from the index alone: no token of another rank's rows is read."""
        query, positive, negative, negatives = self._index(planned)
        return text_cost(query) + text_cost(positive) + negatives * text_cost(negative)

    def row_tokens(self, planned: PlannedBatch) -> np.ndarray:
        """[3, rows]: tokens of the query, tokens of its passages together, number of passages; draws from several at their mean."""
        query, positive, negative, negatives = self._index(planned)
        return np.stack([query, positive + negatives * negative, 1 + negatives])

    def _index(self, planned: PlannedBatch) -> np.ndarray:
        """[4, rows]: tokens of query, positive and negative, and how many negatives are drawn."""
        entries = np.empty((4, len(planned.rows)), dtype=np.int64)
        owner = np.asarray([stratum.dataset for stratum in self.plan.strata])[planned.strata]
        for number in np.unique(owner).tolist():
            chosen, shape = owner == number, self.plan.datasets[number]
            found = self.datasets[number].index[planned.rows[chosen] - shape.first_row]
            for line, name in enumerate(INDEX_FIELDS):
                entries[line, chosen] = found[name]
            entries[3, chosen] = np.minimum(entries[3, chosen], shape.passages_per_query - 1)
        return entries

    def _labels(self, planned: PlannedBatch) -> dict:
        strata = [self.plan.strata[index] for index in np.unique(planned.strata).tolist()]
        owners = {
            self.plan.datasets[stratum.dataset].name: self.plan.datasets[stratum.dataset]
            for stratum in strata
        }
        languages = {stratum.language for stratum in strata}
        first = next(iter(owners.values()))
        return {
            "kind": "text" if first.is_text else "pair",
            "dataset": first.name if len(owners) == 1 else "mixed",
            "language": next(iter(languages))
            if len(languages) == 1
            else "mul",  # ISO 639-2 for several languages
            "in_batch_negatives": first.in_batch_negatives,
            "epoch": planned.epoch,
            "max_tokens": self.plan.cells[planned.cell].max_tokens,
        }

    def _stored(self, planned: PlannedBatch, share: np.ndarray) -> list[tuple[int, int, int, StoredRow]]:
        """(dataset, row, pass, contents) of each row of the share."""
        found = []
        for position in share.tolist():
            number, row = self.plan.strata[int(planned.strata[position])].dataset, int(planned.rows[position])
            stored = self.datasets[number].row(row - self.plan.datasets[number].first_row)
            found.append((number, row, int(planned.passes[position]), stored))
        return found

    def _pair_draft(self, planned: PlannedBatch, share: np.ndarray, labels: dict) -> Draft:
        key = key_of(self.plan.seed, planned.epoch, "draw")
        queries: list[np.ndarray] = []
        draft, num_truncated = Draft([], [], planned.rows[share], [], []), 0
        for number, row, turn, stored in self._stored(planned, share):
            chosen = draw_group(stored, self.plan.datasets[number].passages_per_query, key, row, turn)
            queries.append(stored.text(0))
            draft.group_sizes.append(len(chosen))
            draft.texts += [self._shuffled(stored, index, number, key, row, turn) for index in chosen]
            draft.hashes += stored.hashes[chosen].tolist()
            if len(stored.scores):
                draft.scores += stored.scores[np.asarray(chosen) - 1].tolist()
            num_truncated += int(stored.truncated[0]) + int(stored.truncated[chosen].sum())
        draft.texts = queries + draft.texts
        # teacher scores are all or none per dataset; a batch that mixes datasets may have them for some rows only
        draft.scores = draft.scores if len(draft.scores) == len(draft.hashes) else []
        draft.labels = labels | {"num_truncated": num_truncated}
        return draft

    def _shuffled(
        self, stored: StoredRow, index: int, dataset: int, key: int, row: int, turn: int
    ) -> np.ndarray:
        text = stored.text(index)
        if not self._shuffle.probability or len(text) < self._shuffle.min_tokens:
            return text
        first, second = draw(
            key, np.array([row, row]), np.array([turn, turn]), np.array([index, index]), np.array([-1, -2])
        )
        if float(first) / 2.0**64 >= self._shuffle.probability:
            return text
        start = len(self._frame.prefix) + self._frame.instruction_tokens[dataset]
        stop = len(text) - len(self._frame.suffix)
        return shuffle_segments(text, start, stop, SEGMENT_ORDERS[int(second) % len(SEGMENT_ORDERS)])

    def _text_draft(self, planned: PlannedBatch, share: np.ndarray, labels: dict) -> Draft:
        stored = [contents for _, _, _, contents in self._stored(planned, share)]
        texts = [contents.text(0) for contents in stored]
        sizes = [1] * len(texts)
        if self._pack_tokens is not None:
            texts, sizes = pack_documents(texts, self._pack_tokens, len(self._frame.prefix))
        hashes = [int(contents.hashes[0]) for contents in stored]
        labels |= {"num_truncated": sum(int(contents.truncated[0]) for contents in stored)}
        return Draft(texts, sizes, planned.rows[share], hashes, [], labels)


def draw_group(stored: StoredRow, passages_per_query: int, key: int, row: int, turn: int) -> list[int]:
    """Text indices of a query's group: one positive, then negatives without repetition, by descending teacher score when there are any.

    The order matters to `m3_kd_loss`, which masks the passages of a group one after the other from the best down.
    """
    num_texts, num_positives = len(stored.offsets) - 1, stored.num_positives
    slots = np.arange(num_texts)
    draws = draw(key, np.full(num_texts, row), np.full(num_texts, turn), slots)
    positive = 1 + int(draws[0] % np.uint64(num_positives))
    wanted = min(passages_per_query - 1, 1) if stored.only_one_negative else passages_per_query - 1
    negatives = slots[1 + num_positives :]
    negatives = negatives[np.argsort(draws[1 + num_positives :], kind="stable")[:wanted]]
    if len(stored.scores):
        negatives = negatives[np.argsort(-stored.scores[negatives - 1], kind="stable")]
    return [positive, *negatives.tolist()]


def shuffle_segments(text: np.ndarray, start: int, stop: int, order: Sequence[int]) -> np.ndarray:
    """Cut text[start:stop] in three equal parts and put them in `order`; what lies around stays."""
    segments = np.array_split(text[start:stop], 3)
    return np.concatenate([text[:start], *(segments[index] for index in order), text[stop:]])


def pack_documents(
    texts: Sequence[np.ndarray], max_tokens: int, num_prefix: int
) -> tuple[list[np.ndarray], list[int]]:
    """Join documents, in order, into sequences of at most `max_tokens`: `<s> a a </s> b b b </s>`.

    A document longer than `max_tokens` is a sequence of its own. Returns the sequences and the documents in each.
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


def draft_to_frame(draft: Draft) -> tuple[dict, list[np.ndarray]]:
    """What a worker sends: labels, and tokens, lengths, group offsets, rows, hashes and scores as flat arrays."""
    tokens = np.concatenate(draft.texts).astype(np.int32, copy=False)
    integers = (
        [len(text) for text in draft.texts],
        np.cumsum([0, *draft.group_sizes]),
        draft.rows,
        draft.hashes,
    )
    arrays = [np.asarray(values, dtype=np.int64) for values in integers]
    return draft.labels, [tokens, *arrays, np.asarray(draft.scores, dtype=np.float32)]
