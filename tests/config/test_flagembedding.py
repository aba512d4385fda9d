"""Command lines of FlagEmbedding become recipes that validate; values are those its example scripts use."""

import subprocess
import sys
from pathlib import Path

import pytest

from megam3.cli import report_user_errors
from megam3.commands import from_flagembedding
from megam3.config.check import check_config
from megam3.config.flagembedding import find_command, migrate
from megam3.config.load import load_config, parse_config
from megam3.errors import ConfigError
from tests.launches import ROOT, make_workplace

MODULE = "-m FlagEmbedding.finetune.embedder.encoder_only.m3"
SCRIPT = f"""#!/bin/bash
export WANDB_MODE=disabled
train_data="data/retrieval \\
    data/symmetric_no_in_batch_neg "
num_gpus=2
model_args="--model_name_or_path BAAI/bge-m3 --cache_dir $HF_HUB_CACHE"
data_args="--train_data $train_data --train_group_size 8 --query_max_len 512 --passage_max_len 512 \\
    --pad_to_multiple_of 8 --knowledge_distillation True --same_dataset_within_batch True"
training_args="--output_dir ./out/m3 --overwrite_output_dir --learning_rate 1e-5 --fp16 \\
    --num_train_epochs 4 --per_device_train_batch_size 2 \\
    --dataloader_drop_last True --warmup_ratio 0.1 --gradient_checkpointing \\
    --deepspeed ../../ds_stage0.json --logging_steps 1 --save_steps 1000 --negatives_cross_device \\
    --temperature 0.02 --sentence_pooling_method cls --normalize_embeddings True --kd_loss_type m3_kd_loss \\
    --unified_finetuning True --use_self_distill True --fix_encoder False --self_distill_start_step 0"
cmd="torchrun --nproc_per_node $num_gpus {MODULE} $model_args $data_args $training_args"
eval $cmd
"""
OLD = (
    "torchrun --nproc_per_node 8 -m FlagEmbedding.BGE_M3.run --output_dir out --model_name_or_path m "
    "--train_data d --learning_rate 5e-6 --max_steps 100 --warmup_steps 10 --normlized True "
    "--enable_sub_batch True --same_task_within_batch True --passage_max_len 8192 --shuffle_ratio 0.002 "
    "--small_threshold 200 --unified_finetuning True --weight_decay 0.01"
)


def test_the_example_script_becomes_a_recipe_that_validates():
    migration = migrate(SCRIPT.replace("$HF_HUB_CACHE", "cache"))
    config = parse_config(migration.recipe)
    check_config(config, 2, files=False)
    assert config.data.batch.global_queries == 4
    assert [dataset.in_batch_negatives for dataset in config.data.train] == [True, False]
    assert (config.optim.lr, config.optim.warmup_ratio, config.train.epochs) == (1e-5, 0.1, 4.0)
    assert (config.objective.teacher, config.objective.self_distill) == ("m3_kd_loss", True)
    assert (config.engine.template, config.engine.activation_checkpointing) == ("zero0", True)
    said = " ".join(migration.notes)
    for part in ("1/ranks", "bf16 on GPUs", "word None", "instead of the file name's ending"):
        assert part in said


def test_old_names_are_aliases():
    migration = migrate(OLD)
    config = parse_config(migration.recipe)
    check_config(config, 8, files=False)
    assert (config.train.steps, config.optim.warmup_ratio) == (100, 0.1)
    assert config.data.batch.chunk_tokens
    assert config.data.segment_shuffle_probability == 0.002
    assert "--small_threshold: has no counterpart" in " ".join(migration.notes)


@pytest.mark.parametrize(
    ("given", "ratio"),
    [
        ("--warmup_ratio 0.1", 0.1),
        ("--warmup_ratio 0.1 --warmup_steps 0 --max_steps 100", 0.1),
        ("--warmup_ratio 0.1 --warmup_steps 20 --max_steps 100", 0.2),
        ("--warmup_ratio 0.1 --lr_scheduler_type constant", 0.0),
        ("--warmup_steps 20 --max_steps 100 --lr_scheduler_type constant", 0.0),
        ("--warmup_ratio 0.1 --lr_scheduler_type constant_with_warmup", 0.1),
    ],
)
def test_warm_up_follows_transformers(given, ratio):
    """get_warmup_steps and get_scheduler of transformers 4.57."""
    migration = migrate(f"torchrun {MODULE} --model_name_or_path m --train_data d {given}")
    assert parse_config(migration.recipe).optim.warmup_ratio == ratio
    assert "--warmup_steps needs" not in " ".join(migration.notes)


def test_each_file_of_a_folder_is_a_dataset_where_batches_hold_one(tmp_path):
    for folder, files in (
        ("plain", ("a.jsonl", "b.json", "notes.txt")),
        ("sts_no_in_batch_neg", ("c.jsonl",)),
    ):
        (tmp_path / folder).mkdir()
        for file in files:
            (tmp_path / folder / file).write_text("{}")
    folders = f"{tmp_path}/plain {tmp_path}/sts_no_in_batch_neg"
    call = f"torchrun {MODULE} --model_name_or_path m --train_data {folders}"
    migration = migrate(f"{call} {tmp_path}/elsewhere --same_dataset_within_batch True")
    train = parse_config(migration.recipe).data.train
    assert [(Path(dataset.paths[0]).name, dataset.in_batch_negatives) for dataset in train] == [
        ("a.jsonl", True), ("b.json", True), ("c.jsonl", False), ("elsewhere", True)
    ]  # fmt: skip
    assert [dataset.name for dataset in train] == ["a", "b", "c", "elsewhere"]
    (told,) = [note for note in migration.notes if "no file on this machine" in note]
    assert told.startswith(f"{tmp_path}/elsewhere: one dataset here")
    # without it they mix everything, and a folder stays what it is
    train = parse_config(migrate(call).recipe).data.train
    assert [dataset.paths for dataset in train] == [
        [f"{tmp_path}/plain"],
        [f"{tmp_path}/sts_no_in_batch_neg"],
    ]


def test_defaults_are_theirs():
    config = parse_config(migrate(f"torchrun {MODULE} --model_name_or_path m --train_data d").recipe)
    assert (config.data.query_max_tokens, config.data.passage_max_tokens) == (32, 128)
    assert (config.data.passages_per_query, config.optim.lr) == (8, 5e-5)
    assert config.objective.heads == ["dense"]


@pytest.mark.parametrize(
    ("command", "rule"),
    [
        ("python train.py --lr 1", "holds no call of FlagEmbedding"),
        (f"torchrun {MODULE} --train_data d", "--model_name_or_path.*is required"),
        (f"torchrun {MODULE} --model_name_or_path m", "--train_data.*is required"),
        (f"torchrun {MODULE} --learning_rates 1", "is no argument known.*did you mean --learning_rate"),
        (f"torchrun {MODULE} --train_data $DATA", "is not set in the script; write DATA="),
        (f"torchrun {MODULE} --train_data 'd", "cannot be read .*close the quote"),
        (f"torchrun {MODULE} --model_name_or_path m --train_data d --learning_rate x", "is not a number"),
    ],
)
def test_what_cannot_be_read_is_an_error(command, rule):
    with pytest.raises(ConfigError, match=rule):
        migrate(command)


def test_continued_lines_and_braces():
    words = find_command(f"D='a b'\ntorchrun \\\n {MODULE} \\\n --train_data ${{D}}\n")
    assert words[-3:] == ["--train_data", "a", "b"]


def test_the_recipe_trains(tmp_path, capsys):
    place = make_workplace(tmp_path)
    command = (
        f"torchrun {MODULE} --model_name_or_path {tmp_path}/model --train_data {tmp_path}/pairs.jsonl "
        f"--output_dir {tmp_path}/runs/moved --max_steps 2 --per_device_train_batch_size 4 --logging_steps 1 "
        "--query_max_len 24 --passage_max_len 40 --train_group_size 3 --unified_finetuning True "
        "--use_self_distill True"
    )
    out = tmp_path / "moved.yaml"
    assert from_flagembedding.main([command, "--out", str(out)]) == 0
    assert "note: negatives come from all ranks" in capsys.readouterr().err
    assert load_config(out).train.steps == 2
    # in a process of its own: a training leaves a process group, log routes and its rank's variables behind
    command_line = [sys.executable, "-m", "megam3.train", str(out)]
    done = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(place.rows("moved")) == 2


def test_neither_a_line_nor_a_script(capsys):
    assert report_user_errors(from_flagembedding.main, ["nothing.sh"]) == 2
    assert "is neither a command line nor a readable script" in capsys.readouterr().err


@pytest.mark.parametrize(("theirs", "ours"), [("cls", None), ("mean", "mean"), ("last_token", "last")])
def test_their_pooling_is_kept(theirs, ours):
    line = f"torchrun {MODULE} --model_name_or_path m --train_data d --sentence_pooling_method {theirs}"
    assert parse_config(migrate(line).recipe).model.pooling == ours


def test_frozen_parts_keep_their_meaning():
    both = OLD + " --fix_encoder True --fix_position_embedding True"
    assert parse_config(migrate(both).recipe).model.freeze == ["encoder", "positions"]
    assert parse_config(migrate(OLD).recipe).model.freeze == []


@pytest.mark.parametrize("written", ["2 8 4", "2,4,8", "'[2, 4, 8]'"])
def test_matryoshka_dimensions_are_taken_over(written):
    call = f"torchrun {MODULE} --model_name_or_path m --train_data d --use_mrl True"
    migration = migrate(f"{call} --mrl_dims {written}")
    config = parse_config(migration.recipe)
    check_config(config, 1, files=False)
    assert config.objective.matryoshka_dims == [2, 4, 8]
    assert "--use_mrl became objective.matryoshka_dims" in " ".join(migration.notes)
    off = migrate(f"torchrun {MODULE} --model_name_or_path m --train_data d --mrl_dims {written}")
    assert parse_config(off.recipe).objective.matryoshka_dims is None


@pytest.mark.parametrize(
    ("written", "message"),
    [("", "says nothing without --mrl_dims"), ("--mrl_dims 2 many", "are not whole numbers")],
)
def test_matryoshka_without_dimensions_is_refused(written, message):
    call = f"torchrun {MODULE} --model_name_or_path m --train_data d --use_mrl True"
    with pytest.raises(ConfigError, match=message):
        migrate(f"{call} {written}")
