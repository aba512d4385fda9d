"""Paths and hub ids; the hub is faked, and its errors are those of the real library."""

from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from megam3.errors import ConfigError
from megam3.model import hub
from tests.recipes import make_config


def test_a_folder_is_taken_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    assert hub.resolve_model(str(tmp_path)) == hub.ResolvedModel(str(tmp_path), None)


def test_an_id_is_pinned_to_the_commit_of_its_snapshot(tmp_path, monkeypatch):
    asked = []
    folder = tmp_path / "snapshots" / "5617a9f"
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: asked.append((a, k)) or str(folder))
    assert hub.resolve_model("owner/name@v1") == hub.ResolvedModel(str(folder), "5617a9f")
    assert (asked[0][0], asked[0][1]["revision"]) == (("owner/name",), "v1")


def test_offline_is_one_attempt_and_a_clear_error(monkeypatch):
    attempts = []

    def offline(*_, **__):
        attempts.append(1)
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(ConfigError, match="the hub cannot be reached .*; check the network, or download it"):
        hub.resolve_model("owner/name")
    assert len(attempts) == 1


def test_what_is_no_id_never_reaches_the_hub(monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ConfigError, match="no such folder; give a local folder, or a hub id"):
        hub.resolve_model("nope")


def test_a_push_offline_keeps_the_folder_and_says_so(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(hub.HfApi, "create_repo", offline)
    with pytest.raises(
        ConfigError, match="the hub cannot be reached .ConnectionError.*is complete; upload it"
    ):
        hub.push_folder(tmp_path, "owner/name")
    with pytest.raises(ConfigError, match="is no hub repository; write it as owner/name"):
        hub.push_folder(tmp_path, "name")


def test_a_push_that_is_refused_says_how_to_log_in(tmp_path, monkeypatch):
    def refused(*_, **__):
        # the class of a response depends on the library under huggingface_hub
        raise HfHubHTTPError("403 Forbidden", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(hub.HfApi, "create_repo", refused)
    with pytest.raises(ConfigError, match="the hub refused it .403 Forbidden.*; log in with `hf auth login`"):
        hub.push_folder(tmp_path, "owner/name")


def test_a_recipe_with_an_id_gets_the_folder_and_env_json_the_commit(tmp_path, monkeypatch):
    folder = tmp_path / "models--owner--name" / "snapshots" / "5617a9f"
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(folder))
    config = hub.with_local_model(make_config(model__path="owner/name"))
    assert config.model.path == str(folder)
    assert hub.hub_source(config.model.path) == {"repository": "owner/name", "revision": "5617a9f"}


def test_a_recipe_with_a_folder_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    for path in (str(tmp_path), "no-such-folder", "./no/such/folder"):
        assert hub.with_local_model(make_config(model__path=path)).model.path == path
    assert hub.hub_source(tmp_path) is None
