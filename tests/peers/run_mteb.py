"""FOLDER: run the example of docs/export.md on a tiny local retrieval task; prints nDCG@10."""

import sys

import mteb
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata

from tests.docs.blocks import ROOT, fences
from tests.factory import make_sentences


class TinyRetrieval(AbsTaskRetrieval):
    """Each query is a copy of its passage, so any sound encoder ranks it first."""

    metadata = TaskMetadata(
        name="TinyRetrieval",
        description="made up",
        reference=None,
        dataset={"path": "local", "revision": "1"},
        type="Retrieval",
        category="t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
        date=None,
        domains=None,
        task_subtypes=None,
        license=None,
        annotations_creators=None,
        dialect=None,
        sample_creation=None,
        bibtex_citation="",
    )

    def load_data(self, *_: object, **__: object) -> None:
        texts = make_sentences(12)
        passages = [{"id": f"d{n}", "title": "", "text": text} for n, text in enumerate(texts)]
        queries = [{"id": f"q{n}", "text": text} for n, text in enumerate(texts[:5])]
        split = {
            "corpus": Dataset.from_list(passages),
            "queries": Dataset.from_list(queries),
            "relevant_docs": {f"q{n}": {f"d{n}": 1} for n in range(5)},
            "top_ranked": None,
        }
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


mteb.get_tasks = lambda names: [TinyRetrieval()]
(example,) = (code for code in fences(ROOT / "docs/export.md", "python") if "mteb" in code)
exec(compile(example.replace('"model"', repr(sys.argv[1])), "docs/export.md", "exec"))
