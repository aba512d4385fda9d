"""A model folder from elsewhere carries no file of this machine into runs and exported models."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megam3.config.check import check_config
from megam3.encoders import read_encoder_config
from megam3.errors import ConfigError
from megam3.export.merge import merge_folders
from megam3.export.tokenizer_files import write_tokenizer_files
from megam3.model.positions import extend_folder
from megam3.model_files import refuse_links_out
from megam3.obs.run_folder import copy_model_files
from tests.factory import make_tiny_model_folder
from tests.recipes import make_config


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "home" / "id_rsa"
    path.parent.mkdir()
    path.write_text("hidden-value")
    return path


@pytest.fixture
def model(tmp_path: Path, secret: Path) -> Path:
    """A model whose merges.txt, which nothing reads, leads to a secret."""
    folder = tmp_path / "model"
    make_tiny_model_folder(folder)
    (folder / "merges.txt").symlink_to(secret)
    return folder


def in_recipe(model: Path, out: Path) -> None:
    check_config(make_config(model__path=str(model)), 1)


CALLS: dict[str, Callable[[Path, Path], object]] = {
    "recipe": in_recipe,
    "config": lambda model, out: read_encoder_config(str(model)),
    "run folder": copy_model_files,
    "export": lambda model, out: write_tokenizer_files(model, out, 100),
    "longer": lambda model, out: extend_folder(model, out / "x", 600),
    "merged": lambda model, out: merge_folders([str(model), str(model)], out / "x", None, "average"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_link_out_of_a_model_folder_is_refused_and_nothing_copied(
    tmp_path: Path, model: Path, secret: Path, name: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    said = rf"merges.txt'?: is a link to {re.escape(str(secret))}, outside of the model's folder"
    with pytest.raises(ConfigError, match=said) as error:
        CALLS[name](model, out)
    assert "put a copy of it in the link's place" in str(error.value)
    assert [path for path in out.rglob("*") if path.is_file() and "hidden" in path.read_text()] == []


def test_links_that_stay_and_links_to_weights_are_no_problem(tmp_path: Path, model: Path) -> None:
    (model / "merges.txt").unlink()
    (model / "vocab.txt").symlink_to("tokenizer.json")
    elsewhere = tmp_path / "scratch" / "model.safetensors"
    elsewhere.parent.mkdir()
    shutil.move(model / "model.safetensors", elsewhere)
    (model / "model.safetensors").symlink_to(elsewhere)
    refuse_links_out(model)
    by_another_name = tmp_path / "latest"
    by_another_name.symlink_to(model)
    refuse_links_out(by_another_name)


def test_a_snapshot_of_the_hubs_cache_is_links_into_its_blobs(tmp_path: Path, secret: Path) -> None:
    snapshot = tmp_path / "models--o--n" / "snapshots" / "abc"
    blobs = tmp_path / "models--o--n" / "blobs"
    (snapshot / "1_Pooling").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/123")
    (snapshot / "1_Pooling" / "config.json").symlink_to("../../../blobs/123")
    assert read_encoder_config(str(snapshot)) == {}
    (snapshot / "1_Pooling" / "vocab.txt").symlink_to(secret)
    with pytest.raises(ConfigError, match="1_Pooling/vocab.txt"):
        read_encoder_config(str(snapshot))


@pytest.mark.parametrize("target", ["../home", "/"])
def test_a_linked_folder_is_refused_without_walking_into_it(tmp_path: Path, model: Path, target: str) -> None:
    (model / "merges.txt").unlink()
    (model / "1_Pooling").symlink_to(target)
    with pytest.raises(ConfigError, match="1_Pooling"):
        refuse_links_out(model)
