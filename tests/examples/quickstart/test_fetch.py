import os
import shutil
import subprocess

import pytest

from examples.quickstart import fetch
from megam3.errors import DataError


def test_without_apt_the_error_says_both_ways(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    with pytest.raises(
        DataError, match=r"no apt-get on this machine.*apt-get download gnome-user-docs.*DATA=file\.jsonl"
    ):
        fetch.fetch_help_pages(tmp_path)


def test_a_failed_download_says_why_and_leaves_nothing(tmp_path, monkeypatch):
    calls = []

    def failing(command, folder):
        calls.append(command)
        return subprocess.CompletedProcess(command, 100, "", "E: Unable to locate package gnome-user-docs\n")

    monkeypatch.setattr(fetch.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(fetch, "_run", failing)
    with pytest.raises(
        DataError,
        match=r"could not download it \(E: Unable to locate package gnome-user-docs\).*DATA=file\.jsonl",
    ):
        fetch.fetch_help_pages(tmp_path)
    assert [("update" in call, "download" in call) for call in calls] == [
        (False, True),
        (True, False),
        (False, True),
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_a_package_is_unpacked_once_and_found_again(tmp_path, monkeypatch):
    root = tmp_path / "build"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        "Package: gnome-user-docs\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example.org>\n"
        "Description: x\n"
    )
    page = root / "usr" / "share" / "help" / "C" / "guide" / "a.page"
    page.parent.mkdir(parents=True)
    page.write_text("<page/>")
    deb = tmp_path / "gnome-user-docs_1_all.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-b", str(root), str(deb)], check=True, capture_output=True
    )
    real_run = fetch._run

    def run(command, folder):
        if command[0] == "apt-get":
            os.link(deb, folder / deb.name)
            return subprocess.CompletedProcess(command, 0, "", "")
        return real_run(command, folder)

    monkeypatch.setattr(fetch.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(fetch, "_run", run)
    pages = fetch.fetch_help_pages(tmp_path / "cache")
    assert (pages / "C" / "guide" / "a.page").read_text() == "<page/>"
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    assert fetch.fetch_help_pages(tmp_path / "cache") == pages
