"""Each cross-section rule: what it lets pass, and the message when it does not."""

from pathlib import Path
from typing import Any

import pytest

from megam3.config.check import check_config
from megam3.config.load import load_config
from megam3.encoders import read_encoder_config, usable_positions
from megam3.errors import ConfigError
from tests.recipes import make_config, write_encoder_config


def message(world_size: int = 1, files: bool = False, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check_config(make_config(**changes), world_size, files=files)
    return str(caught.value)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_a_right_recipe_passes(world_size: int) -> None:
    check_config(make_config(), world_size, files=False)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 12, 16, 24, 48])
def test_the_unified_recipe_passes_on_every_world_size_it_promises(world_size: int) -> None:
    check_config(load_config("unified"), world_size, files=False)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("", "names no folder of its own"),
        ("  ", "names no folder of its own"),
        (".", "names no folder of its own"),
        ("..", "names no folder of its own"),
        ("../other", "must be one folder name"),
        ("/tmp/run", "must be one folder name"),
        ("a/b", "must be one folder name"),
        ("a\\b", "must be one folder name"),
        ("two\nlines", "must be one folder name"),
        ("nul\0", "must be one folder name"),
        ("x" * 201, "must have at most 200 bytes"),
        ("س" * 101, "must have at most 200 bytes"),
    ],
)
def test_a_run_name_is_one_folder_in_output_dir(name: str, rule: str) -> None:
    said = message(name=name)
    assert said.startswith("name = ")
    assert rule in said
    assert said.endswith("output_dir says where run folders are made")
    assert len(said) < 250


@pytest.mark.parametrize("name", ["unified", "run 3", "a.b", "...", "تجربة", "x" * 200])
def test_ordinary_run_names_pass(name: str) -> None:
    check_config(make_config(name=name), 1, files=False)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("train__steps", 10**19, "must be less than or equal to 1000000000"),
        ("train__epochs", float("inf"), "must be a finite number"),
        ("train__epochs", 1e300, "must be less than or equal to 1000000"),
        ("train__seed", 2**63, "must be less than or equal to 9223372036854775807"),
        ("train__timeout_seconds", 1e12, "must be less than or equal to 10000000"),
        ("optim__lr", float("nan"), "must be a finite number"),
        ("optim__lr", float("inf"), "must be a finite number"),
    ],
)
def test_numbers_that_would_overflow_later_are_refused(field: str, value: float, rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(**{field: value})
    assert str(caught.value).startswith(f"{field.replace('__', '.')} = ")
    assert rule in str(caught.value)


def test_exactly_one_batch_size() -> None:
    rule = "exactly one of global_queries, global_tokens and buckets says how large a step is"
    assert (
        message(data__batch={})
        == f"data.batch = None: {rule}; set one, for example data.batch.global_queries=64"
    )
    assert message(data__batch={"global_queries": 8, "buckets": "m3_unified"}) == (
        f"data.batch = {{'global_queries': 8, 'buckets': 'm3_unified'}}: {rule}; "
        "keep one and set the others to null: global_queries, buckets"
    )


def test_exactly_one_run_length() -> None:
    rule = "exactly one of steps and epochs says how long a run is"
    assert message(train={}) == f"train = None: {rule}; set one, for example train.epochs=1"
    assert message(train={"steps": 5, "epochs": 2.0}) == (
        f"train = {{'steps': 5, 'epochs': 2.0}}: {rule}; keep one and set the other to null, for example "
        f"train.epochs=null"
    )


def test_offload_needs_checkpointing() -> None:
    assert message(engine__activation_offload=True) == (
        "engine.activation_offload = True: it moves the inputs that activation checkpointing keeps, and "
        "checkpointing is off; "
        "set engine.activation_checkpointing=true too"
    )
    check_config(
        make_config(engine={"activation_offload": True, "activation_checkpointing": True}), 1, files=False
    )


def test_world_size_divides_the_batch() -> None:
    assert message(3) == (
        "data.batch.global_queries = 8: 3 ranks must share the queries of a step equally; use 6 or 9, or "
        "another number of ranks"
    )
    assert "use 16, or another number of ranks" in message(16)


def test_world_size_divides_every_bucket() -> None:
    buckets = [{"max_tokens": 1000, "global_queries": 8}, {"max_tokens": 8192, "global_queries": 6}]
    assert message(4, data__batch={"buckets": buckets}).startswith(
        "data.batch.buckets up to 8192 tokens = 6: 4 ranks must share"
    )
    assert message(5, data__batch={"buckets": "m3_unified"}).startswith("7 problems")


def test_limits_leave_room_for_text() -> None:
    assert message(data__query_max_tokens=2) == (
        "data.query_max_tokens = 2: two of the tokens are special, so nothing of the text would be left; use "
        "at least 3"
    )


def test_a_chunk_holds_the_longest_text() -> None:
    assert message(data__batch__chunk_tokens=8191) == (
        "data.batch.chunk_tokens = 8191: one text can have 8192 tokens and is never split; "
        "use at least 8192, or lower data.passage_max_tokens"
    )
    check_config(make_config(data__batch__chunk_tokens=8192), 1, files=False)


def test_a_token_budget_holds_a_pair_per_rank() -> None:
    assert message(2, data__batch={"global_tokens": 10_000}) == (
        "data.batch.global_tokens = 10000: 2 ranks must each hold a query and a passage, 8704 tokens at "
        "their limits; "
        "use at least 17408, or lower the limits of texts"
    )


@pytest.mark.parametrize("edges", [[500, 500], [1000, 500]])
def test_bucket_edges_ascend(edges: list[int]) -> None:
    assert message(data__length_buckets=edges) == (
        f"data.length_buckets = {edges}: upper edges must ascend; sort them and remove repeated ones"
    )


def test_buckets_cover_the_longest_text() -> None:
    table = [{"max_tokens": 4096, "global_queries": 8}]
    assert message(data__batch={"buckets": table}) == (
        "data.batch.buckets = 4096: texts of up to 8192 tokens belong to no bucket; "
        "add a bucket with max_tokens: 8192, or lower data.passage_max_tokens"
    )
    assert message(data__batch={"buckets": []}) == (
        "data.batch.buckets = []: needs at least one bucket; add one that covers 8192 tokens"
    )


def test_dataset_names_are_unique() -> None:
    twice = [{"name": "a", "paths": ["x"]}, {"name": "a", "paths": ["y"]}]
    assert (
        message(data__train=twice)
        == "data.train.1.name = 'a': dataset 0 has this name too; give each its own name"
    )


def test_a_group_alone_needs_negatives() -> None:
    alone = [{"name": "a", "paths": ["x"], "in_batch_negatives": False, "passages_per_query": 1}]
    assert message(data__train=alone) == (
        "data.train.0.passages_per_query = 1: without in-batch negatives, a group of one passage has nothing "
        "to be told apart from; "
        "use at least 2, or in_batch_negatives: true"
    )


def test_a_step_of_one_query_and_one_passage_has_no_loss() -> None:
    assert message(data__batch__global_queries=1, data__passages_per_query=1) == (
        "data.batch.global_queries = 1: one query and its one passage (pairs) are told apart from nothing: "
        "the loss is 0; use at least 2, or passages_per_query of at least 2 with negatives in the records"
    )


def test_evaluating_needs_a_test_set() -> None:
    assert message(train__evaluate_every_steps=5) == (
        "train.evaluate_every_steps = 5: there is no test set to evaluate on; name BEIR folders in "
        "evaluation.folders, or set it to null"
    )


def test_betas() -> None:
    assert message(optim__betas=[0.9, 1.0]) == (
        "optim.betas.1 = 1.0: must be at least 0 and below 1; the usual pair is [0.9, 0.999]"
    )


def test_weights_are_not_all_zero() -> None:
    zero = {"dense": 0.0, "lexical": 0.0, "multi_vector": 0.0}
    assert message(objective__sum_weights=zero) == (
        f"objective.sum_weights = {zero}: all weights are 0; set one above 0, or null for the preset's"
    )
    assert "or self_distill: false" in message(objective__distill_weights=zero)


def test_everything_wrong_is_reported_at_once() -> None:
    text = message(
        3, data__batch={"global_queries": 8, "chunk_tokens": 5}, train={}, engine__activation_offload=True
    )
    assert text.startswith("4 problems\n  1. data.batch.chunk_tokens")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("{}")
    write_encoder_config(tmp_path / "encoder")
    return tmp_path


def test_files_that_are_there_pass(project: Path) -> None:
    check_config(make_config(), 1)
    (project / "parts").mkdir()
    (project / "parts/0.jsonl").write_text("{}")
    for path in ("*.jsonl", "**/0.jsonl", "parts", str(project / "pairs.jsonl")):
        check_config(make_config(data__train__0__paths=[path]), 1)


def test_missing_data(project: Path) -> None:
    assert message(files=True, data__train__0__paths=["pairs.jsonl", "other.jsonl"]) == (
        f"data.train.0.paths.1 = 'other.jsonl': no such file or folder; correct the path; relative paths "
        f"start at {project}"
    )
    assert message(files=True, data__train__0__paths=["/nowhere/*.gz"]) == (
        "data.train.0.paths.0 = '/nowhere/*.gz': no file matches; correct the path"
    )
    (project / "empty").mkdir()
    assert "= 'empty': the folder is empty; put data files there" in message(
        files=True, data__train__0__paths=["empty"]
    )


def test_missing_model(project: Path) -> None:
    assert message(files=True, model__path="BAAI/bge-m3") == (
        "model.path = 'BAAI/bge-m3': no such folder; give a local Hugging Face folder; a model of a hub has "
        "to be downloaded first"
    )
    (project / "empty").mkdir()
    assert message(files=True, model__path="empty") == (
        "model.path = 'empty': holds no config.json; give the folder that `save_pretrained` wrote"
    )


@pytest.mark.parametrize(("text", "rule"), [("{", "is not readable JSON"), ("[]", "must hold a JSON object")])
def test_broken_model_config(project: Path, text: str, rule: str) -> None:
    (project / "encoder/config.json").write_text(text)
    found = message(files=True)
    assert found.startswith("encoder/config.json = ")
    assert f"{rule}; restore the file from the model's source" in found


def test_positions_shorter_than_the_limit(project: Path) -> None:
    write_encoder_config(project / "encoder", max_position_embeddings=514)
    assert message(files=True, data__query_max_tokens=512) == (
        "data.passage_max_tokens = 8192: the encoder has positions for 512 tokens (max_position_embeddings "
        "514); "
        "lower it to 512, or give the encoder more with megam3 extend-positions"
    )
    check_config(make_config(data__passage_max_tokens=512), 1)


def test_evaluation_limits_count_when_there_is_something_to_evaluate(project: Path) -> None:
    write_encoder_config(project / "encoder", max_position_embeddings=514)
    for part in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        (project / "beir" / part).parent.mkdir(parents=True, exist_ok=True)
        (project / "beir" / part).write_text("")
    found = message(files=True, data__passage_max_tokens=512, evaluation__folders=["beir"])
    assert found.startswith("evaluation.passage_max_tokens = 8192: the encoder has positions for 512 tokens")


def test_test_sets_have_the_three_parts(project: Path) -> None:
    (project / "beir").mkdir()
    (project / "beir/corpus.jsonl").write_text("")
    assert message(files=True, evaluation={"folders": ["beir"], "split": "dev"}) == (
        "evaluation.folders.0 = 'beir': not a BEIR folder: it lacks queries.jsonl, qrels/dev.tsv; correct "
        "the path, or evaluation.split"
    )


def test_test_sets_have_names_of_their_own(project: Path) -> None:
    for folder in ("a/dev", "b/dev"):
        (project / folder / "qrels").mkdir(parents=True)
        for part in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
            (project / folder / part).write_text("")
    folders = {"folders": ["a/dev", "b/dev"], "passage_max_tokens": 512}
    assert message(files=True, data__passage_max_tokens=512, evaluation=folders) == (
        "evaluation.folders.1 = 'b/dev': another test set is called 'dev', too, and results are filed by "
        "name; rename one of the folders"
    )


@pytest.mark.parametrize(
    ("encoder", "usable"),
    [
        ({"model_type": "xlm-roberta", "max_position_embeddings": 8194, "pad_token_id": 1}, 8192),
        ({"model_type": "xlm-roberta", "max_position_embeddings": 514}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 515, "pad_token_id": 2}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 513, "pad_token_id": 0}, 512),
        ({"model_type": "bert", "max_position_embeddings": 512, "pad_token_id": 0}, 512),
        ({"model_type": "modernbert", "max_position_embeddings": 8192}, 8192),
        ({"model_type": "t5"}, None),
    ],
)
def test_usable_positions(encoder: dict[str, Any], usable: int | None) -> None:
    assert usable_positions(encoder) == usable


def test_read_encoder_config(project: Path) -> None:
    assert read_encoder_config(make_config().model.path)["max_position_embeddings"] == 8194


def test_missing_heads_are_found_before_any_text_is_tokenised(project: Path) -> None:
    (project / "encoder" / "sparse_linear.pt").unlink()
    rule = "head weights are missing (sparse_linear.pt); set model.missing_heads: init to start these heads"
    assert rule in message(files=True)
    check_config(make_config(model__missing_heads="init"), 1)
    check_config(make_config(objective={"heads": ["dense"]}), 1)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"model_type": "xmod"}, "is a 'xmod' model, which does not run on packed texts"),
        ({"is_decoder": True}, "is configured as a decoder"),
        ({"position_embedding_type": "relative_key"}, "has position_embedding_type 'relative_key'"),
    ],
)
def test_encoders_that_cannot_run_packed_are_refused_by_the_recipe_checks(
    project: Path, changes: dict[str, Any], rule: str
) -> None:
    write_encoder_config(project / "encoder", **changes)
    assert rule in message(files=True)


def test_objective_section_is_chosen_by_kind() -> None:
    with pytest.raises(ConfigError, match="objective = .*must be one of: .*unified"):
        make_config(objective={"kind": "other"})
    with pytest.raises(ConfigError, match="did you mean objective.temperature"):
        make_config(objective={"kind": "unified", "temprature": 1.0})
    assert message(objective__heads=["dense", "dense"]).startswith(
        "objective.heads = ['dense', 'dense']: names a head"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"matryoshka_dims": [64, 32]},
            "matryoshka_dims = [64, 32]: dimensions must ascend, each named once; write [32, 64]",
        ),
        (
            {"matryoshka_dims": [32, 32]},
            "matryoshka_dims = [32, 32]: dimensions must ascend, each named once; write [32]",
        ),
        (
            {"matryoshka_dims": [32], "heads": ["lexical"]},
            "matryoshka_dims = [32]: adds to the loss of the dense head",
        ),
        (
            {"both_directions": True, "loss_weights": {"dense": 0.0}},
            "both_directions = True: adds to the loss of the dense",
        ),
        (
            {"matryoshka_dims": [32], "matryoshka_weights": [1.0, 2.0]},
            "matryoshka_weights = [1.0, 2.0]: needs one weight for each of the 1",
        ),
        ({"matryoshka_weights": [1.0]}, "matryoshka_weights = [1.0]: needs one weight for each of the 0"),
        (
            {"matryoshka_dims": [32], "matryoshka_weights": [0.0]},
            "matryoshka_weights = [0.0]: all weights are 0",
        ),
    ],
)
def test_what_is_added_to_the_dense_loss_fits_it(changes: dict[str, Any], said: str) -> None:
    assert message(**{f"objective__{name}": value for name, value in changes.items()}).startswith(
        f"objective.{said}"
    )


def test_matryoshka_dims_fit_the_encoder(project: Path) -> None:
    write_encoder_config(project / "encoder", hidden_size=64)
    assert message(files=True, objective__matryoshka_dims=[32, 65]).startswith(
        "objective.matryoshka_dims = [32, 65]: the encoder's dense vectors have 64 entries; use at most 64"
    )


def test_several_positives_are_refused_where_texts_are_read():
    texts = make_config(data__positives_per_query=2, objective={"kind": "pretrain"})
    with pytest.raises(ConfigError, match=r"data.positives_per_query.*reads texts, which have no positives"):
        check_config(texts, 1, files=False)
    check_config(make_config(data__positives_per_query=2), 1, files=False)


def test_layers_are_not_compiled_for_attention_by_runs() -> None:
    config = make_config(engine__compile_layers=True, engine__attention="sdpa")
    with pytest.raises(ConfigError, match="needs the varlen kernel: with engine.attention=sdpa each batch"):
        check_config(config, 1, files=False)


def test_a_file_where_the_run_folder_would_be_is_told_before_anything_starts(project: Path) -> None:
    (project / "file").touch()
    for changes, field in (
        ({"output_dir": str(project / "file"), "name": "run"}, "output_dir"),
        ({"output_dir": str(project), "name": "file"}, "name"),
    ):
        said = message(files=True, **changes)
        assert f"{field} = " in said
        assert f"{project}/file is a file, and the run wants a folder there; name a folder" in said


def test_an_expansion_head_that_is_not_trained_is_named(project: Path) -> None:
    said = message(files=True, model__lexical_kind="expansion", objective__heads=["dense"])
    assert (
        "model.lexical_kind = 'expansion': is a kind of lexical head, which this stage does not train" in said
    )
