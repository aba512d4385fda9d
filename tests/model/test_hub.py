"""Paths and hub ids; the hub is faked, and its errors are those of the real library."""

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from megam3.errors import ConfigError
from megam3.model import hub


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
