"""Without mteb the error says what to install; the real library runs it in tests/peers."""

import importlib.util

import pytest

from megam3.errors import ConfigError
from megam3.retrieval import mteb_model


def test_without_mteb_the_error_names_the_package(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(mteb_model.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match="the package mteb is not installed; pip install 'mteb>=2'"):
        mteb_model.MtebModel("folder")
    assert importlib.util.find_spec("megam3")
