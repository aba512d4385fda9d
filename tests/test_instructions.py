"""What stands before a text, from the recipe through a folder to whoever searches with it. The reference is
always the same call on texts that have it written before them."""

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from megam3.build import evaluated_as_trained
from megam3.commands import add_teacher_scores, search
from megam3.commands import evaluate as evaluate_command
from megam3.commands import export as export_command
from megam3.commands import mine as mine_command
from megam3.config.load import load_config
from megam3.config.schema import EvaluationConfig
from megam3.embedder import M3Embedder
from megam3.errors import ConfigError, DataError
from megam3.export.formats import export
from megam3.export.imported import import_model
from megam3.export.merge import merge_folders
from megam3.export.model_card import CardFacts, facts_of_checkpoint
from megam3.instructions import PROMPTS_FILE, Instructions, read_instructions
from megam3.retrieval.beir import BeirDataset
from megam3.retrieval.corpus import open_corpus
from megam3.retrieval.evaluate import evaluate
from megam3.retrieval.index.build import EncodeOptions
from megam3.retrieval.index.evaluate import evaluate_on_disk, open_test_set
from megam3.retrieval.mteb_model import MtebModel
from tests.data.pairs import write_jsonl
from tests.export.test_bge_m3 import trained
from tests.factory import make_sentences, make_tiny_model_folder
from tests.retrieval.index.test_evaluate import ToyEmbedder, encode_halved, write_test_set
from tests.retrieval.toys import encode_ids, tokenize, toy_dataset

QUERY, PASSAGE = "kiki lala ", "dodo "
BOTH = Instructions(query=QUERY, passage=PASSAGE)
# numbers, the toy tokenizer's words
TOY = EvaluationConfig(rerank_dense=12, rerank_hybrid=10, batch_tokens=100, query_instruction="5 6 ",
                       passage_instruction="7 ")  # fmt: skip
FIVE = ("Dense", "Sparse", "Multi-vec", "Dense+Sparse", "All")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model_folder(tmp_path_factory.mktemp("source"), max_tokens=64)


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export that carries both."""
    out = tmp_path_factory.mktemp("out") / "model"
    export(trained(source).state_dict(), str(source), out, facts=CardFacts(instructions=BOTH))
    return out


@pytest.fixture(scope="module")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model whose folder says nothing."""
    out = tmp_path_factory.mktemp("plain") / "model"
    out.mkdir()
    for file in folder.iterdir():
        if file.is_file() and file.name not in (PROMPTS_FILE, "README.md"):
            (out / file.name).symlink_to(file)
    assert not read_instructions(out)
    return out


def written(dataset: BeirDataset, query: str, passage: str) -> BeirDataset:
    """The dataset whose texts have both written before them."""
    return dataclasses.replace(
        dataset,
        queries=[query + text for text in dataset.queries],
        passages=[passage + text for text in dataset.passages],
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"prompts": {"query": "q: ", "document": "p: "}}, Instructions(query="q: ", passage="p: ")),
        ({"prompts": {"query": "q: ", "passage": "p: "}}, Instructions(query="q: ", passage="p: ")),
        ({"prompts": {"query": "", "document": "", "corpus": "c: "}}, Instructions(passage="c: ")),
        ({"query_prefix": "[Q] ", "document_prefix": "[D] "}, Instructions(query="[Q] ", passage="[D] ")),
        ({"query_prefix": None, "prompts": None}, Instructions()),
        ({"prompts": {"query": "q: "}, "query_prefix": "[Q] "}, Instructions(query="q: ")),
    ],
)
def test_what_a_folder_says(tmp_path: Path, settings: dict, expected: Instructions) -> None:
    (tmp_path / PROMPTS_FILE).write_text(json.dumps(settings))
    assert read_instructions(tmp_path) == expected


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / PROMPTS_FILE).write_text("{")
    with pytest.raises(ConfigError, match=f"{PROMPTS_FILE}.*is not readable JSON"):
        read_instructions(tmp_path)


RECIPE = """\
name: run
model: {path: model}
data:
  train:
    - {name: a, paths: [a.jsonl], query_instruction: "ask: ", passage_instruction: "text: "}
    - {name: b, paths: [b.jsonl], query_instruction: "ask: ", passage_instruction: "page: "}
  batch: {global_queries: 8}
optim: {lr: 1.0e-5}
train: {steps: 4}
"""


def test_evaluation_puts_what_all_datasets_put(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = tmp_path / "recipe.yaml"
    config = load_config(recipe, ["evaluation.folders=[beir]"])
    with caplog.at_level(logging.WARNING):
        instructed = evaluated_as_trained(config)
    assert (instructed.query_instruction, instructed.passage_instruction) == ("ask: ", "")
    (warning,) = caplog.messages
    assert "'page: ' or 'text: ' before its texts" in warning
    assert "evaluation.passage_instruction" in warning
    caplog.clear()
    config = load_config(recipe, ["evaluation.folders=[beir]", "evaluation.passage_instruction=''",
                                  "evaluation.query_instruction=say"])  # fmt: skip
    with caplog.at_level(logging.WARNING):
        instructed = evaluated_as_trained(config)
    assert (instructed.query_instruction, instructed.passage_instruction) == ("say", "")
    assert caplog.messages == []


def test_evaluation_is_that_of_written_texts_and_bm25_that_of_plain_ones() -> None:
    dataset = toy_dataset()
    with_it = evaluate(dataset, tokenize, encode_ids, TOY)
    nothing = TOY.model_copy(update={"query_instruction": None, "passage_instruction": None})
    reference = evaluate(written(dataset, "5 6 ", "7 "), tokenize, encode_ids, nothing)
    without = evaluate(dataset, tokenize, encode_ids, nothing)
    for mode in FIVE:
        assert with_it.modes[mode] == reference.modes[mode], mode
    assert with_it.modes["Dense"] != without.modes["Dense"]
    assert with_it.modes["BM25"].overall == without.modes["BM25"].overall
    assert with_it.num_tokens == reference.num_tokens == without.num_tokens + len(dataset.passages)


def test_on_disk_it_is_that_in_memory_and_each_instruction_has_its_index(tmp_path: Path) -> None:
    from megam3.retrieval.beir import read_beir

    beir = write_test_set(tmp_path / "toy", seed=1)
    opened = open_test_set(beir, "test", tmp_path / "index")
    short = TOY.model_copy(update={"passage_max_tokens": 9, "query_max_tokens": 5})
    for config in (TOY, TOY.model_copy(update={"passage_instruction": "8 9 "}), short):
        in_memory = evaluate(read_beir(beir), tokenize, encode_halved, config)
        on_disk = evaluate_on_disk(opened, ToyEmbedder(), "toy", config)
        for mode in (*FIVE, "BM25"):
            assert on_disk.modes[mode] == in_memory.modes[mode], mode
        assert (on_disk.num_tokens, on_disk.num_at_limit) == (in_memory.num_tokens, in_memory.num_at_limit)
    assert in_memory.num_at_limit > 0
    assert len(list((tmp_path / "index").glob("index-*"))) == 3


def test_a_search_asks_as_trained_and_shows_the_plain_text(plain: Path, tmp_path: Path) -> None:
    texts = make_sentences(40, seed=1, max_words=20)
    write_jsonl(tmp_path / "plain.jsonl", [{"text": text} for text in texts])
    write_jsonl(tmp_path / "written.jsonl", [{"text": PASSAGE + text} for text in texts])
    embedder = M3Embedder(str(plain), device="cpu")
    found = []
    for file, query_instruction, passage_instruction in (("plain", QUERY, PASSAGE), ("written", "", "")):
        corpus = open_corpus(
            embedder,
            str(plain),
            [str(tmp_path / f"{file}.jsonl")],
            tmp_path / f"{file}.index",
            EncodeOptions(max_tokens=64, instruction=passage_instruction, multi_vector=True),
            EvaluationConfig(rerank_dense=20, rerank_hybrid=20, query_instruction=query_instruction),
        )
        found.append(corpus.search(texts[3] if query_instruction else QUERY + texts[3], 5))
    ours, reference = found
    for mode, ranking in ours.rankings.items():
        assert [(hit.row, hit.score) for hit in ranking] == [
            (hit.row, hit.score) for hit in reference.rankings[mode]
        ], mode
    for row, segments in ours.segments.items():
        assert "".join(segment.text for segment in segments) == texts[row]
        # the same words matched by as much; what stands before the text is not shown
        theirs = [segment for segment in reference.segments[row] if segment.lexical or segment.multi_vector]
        own = [segment for segment in segments if segment.lexical or segment.multi_vector]
        assert own == theirs[len(theirs) - len(own) :]
        assert all(segment.text in PASSAGE for segment in theirs[: len(theirs) - len(own)])


def test_the_embedder_puts_them_where_it_is_told_the_side(folder: Path) -> None:
    embedder = M3Embedder(str(folder), device="cpu")
    assert embedder.instructions == BOTH
    texts = make_sentences(5, seed=2)
    for encode, instruction in ((embedder.encode_queries, QUERY), (embedder.encode_passages, PASSAGE)):
        got, wanted = encode(texts), embedder.encode([instruction + text for text in texts])
        assert np.array_equal(got.dense_vecs, wanted.dense_vecs)
        assert got.lexical_weights == wanted.lexical_weights
        one = encode(texts[0], heads=["dense"])
        np.testing.assert_allclose(one.dense_vecs, wanted.dense_vecs[0], atol=1e-6)
    assert not np.allclose(embedder.encode(texts).dense_vecs, embedder.encode_queries(texts).dense_vecs)
    with pytest.raises(DataError, match=r"texts\[1\].*is not a string"):
        embedder.encode_queries(["a", 3])  # type: ignore[list-item]


def test_mteb_is_given_what_the_side_needs(folder: Path) -> None:
    model = MtebModel.__new__(MtebModel)
    model.embedder, model.batch_tokens = M3Embedder(str(folder), device="cpu"), None
    texts = make_sentences(4, seed=3)
    for prompt_type, instruction in (("query", QUERY), ("document", PASSAGE), (None, "")):
        wanted = model.embedder.encode([instruction + text for text in texts]).dense_vecs
        assert np.array_equal(
            model.encode([{"text": texts}], task_metadata=None, prompt_type=prompt_type), wanted
        )


@pytest.mark.parametrize("format", ["bge-m3", "multi-vector", "pylate"])
def test_every_folder_carries_them_and_its_card_says_so(source: Path, tmp_path: Path, format: str) -> None:
    facts = CardFacts(instructions=BOTH)
    export(trained(source).state_dict(), str(source), tmp_path / "out", format=format, facts=facts)
    settings = json.loads((tmp_path / "out" / PROMPTS_FILE).read_text())
    assert settings["prompts"] == {"query": QUERY, "document": PASSAGE}
    assert read_instructions(tmp_path / "out") == BOTH
    card = (tmp_path / "out" / "README.md").read_text()
    assert f'`"{QUERY}"` before queries and `"{PASSAGE}"` before passages' in card
    export(trained(source).state_dict(), str(source), tmp_path / "none", format=format)
    assert "## Instructions" not in (tmp_path / "none" / "README.md").read_text()
    assert not read_instructions(tmp_path / "none")


def test_import_and_merge_keep_them(folder: Path, plain: Path, tmp_path: Path) -> None:
    imported = import_model(str(folder), tmp_path / "start")
    assert f"puts {QUERY!r} before queries, {PASSAGE!r} before passages" in " ".join(imported.notes())
    assert read_instructions(tmp_path / "start") == BOTH
    merge_folders([str(folder), str(folder)], tmp_path / "merged", None, "average")
    assert read_instructions(tmp_path / "merged") == BOTH


def test_an_export_takes_them_from_the_runs_recipe(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000004"
    checkpoint.mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text(RECIPE)
    facts = export_command._facts(str(checkpoint))
    assert facts.instructions == Instructions(query="ask: ")
    # a recipe of before there were the fields
    assert (
        facts_of_checkpoint(checkpoint, {"data": {"train": [{"name": "a"}]}}, "").instructions
        == Instructions()
    )


def test_commands_take_what_the_folder_says_unless_they_are_told(
    folder: Path, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    beir = tmp_path / "beir"
    (beir / "qrels").mkdir(parents=True)
    passages = make_sentences(30, seed=1, min_words=8, max_words=30)
    write_jsonl(beir / "corpus.jsonl", [{"_id": f"d{n}", "text": text} for n, text in enumerate(passages)])
    queries = [{"_id": f"q{n}", "text": " ".join(passages[n].split()[:4])} for n in range(10)]
    write_jsonl(beir / "queries.jsonl", queries)
    (beir / "qrels" / "test.tsv").write_text("".join(f"q{n}\td{n}\t1\n" for n in range(10)))

    def figures(model: Path, *options: str) -> list[dict]:
        assert evaluate_command.main([str(model), str(beir), "--json", "--device", "cpu", *options]) == 0
        said = capsys.readouterr()
        (result,) = json.loads(said.out)
        return [result["modes"], "before queries" in said.err]

    asked = ("--query-instruction", QUERY, "--passage-instruction", PASSAGE)
    assert figures(folder) == figures(plain, *asked)
    assert figures(plain) == figures(folder, "--query-instruction", "", "--passage-instruction", "")
    assert figures(plain)[0] != figures(folder)[0]

    def hits(model: Path, *options: str) -> dict:
        index = tmp_path / f"index-{model.parent.name}-{len(options)}"
        arguments = [str(model), str(beir), "--query", passages[3], "--json", "--index", str(index)]
        assert search.main([*arguments, "--device", "cpu", *options]) == 0
        return json.loads(capsys.readouterr().out)

    assert hits(folder) == hits(plain, *asked)
    assert hits(folder) != hits(plain)


def test_mining_and_teachers_take_what_the_folder_says(
    folder: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model, options, expected in (
        (folder, [], BOTH),
        (plain, [], Instructions()),
        (folder, ["--query-instruction", "", "--passage-instruction", "x "], Instructions(passage="x ")),
    ):
        given = mine_command._parser().parse_args(
            ["pairs.jsonl", "--model", str(model), "--output", "out.jsonl", *options]
        )
        mining = mine_command._mining_options(given, mine_command._select_options(given), str(model), "cpu")
        assert (mining.query_instruction, mining.encode.instruction) == (expected.query, expected.passage)
    write_jsonl(tmp_path / "pairs.jsonl", [{"query": "ba di", "pos": ["ko lu ba"], "neg": ["mi"]}])
    output = tmp_path / "scored.jsonl"
    arguments = [str(tmp_path / "pairs.jsonl"), str(output), "--model", str(folder), "--head", "dense"]
    assert add_teacher_scores.main([*arguments, "--device", "cpu"]) == 0
    record = json.loads(output.read_text())
    embedder = M3Embedder(str(folder), device="cpu")
    pairs = [(f"{QUERY}ba di", f"{PASSAGE}ko lu ba"), (f"{QUERY}ba di", f"{PASSAGE}mi")]
    wanted = embedder.score(pairs)["dense"]
    torch.testing.assert_close(
        torch.tensor([*record["pos_scores"], *record["neg_scores"]]),
        torch.from_numpy(wanted),
        atol=1e-6,
        rtol=0,
    )
