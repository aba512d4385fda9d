"""Records of whole files, whatever their cut: each file is opened once."""

import gzip
import json

from megam3.data import source
from megam3.retrieval import records
from megam3.retrieval.records import pairs_of, passages_of
from tests.data.pairs import make_records, write_jsonl


def test_a_compressed_file_of_many_units_is_read_once(tmp_path, monkeypatch):
    plain = write_jsonl(tmp_path / "d.jsonl", make_records(60, num_negatives=1))
    packed = tmp_path / "d.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    given = [json.loads(line) for line in plain.read_text().splitlines()]
    monkeypatch.setattr(records.units_of, "__defaults__", (2000,))
    assert len(records.units_of([str(packed)])) > 5
    opened = []
    original = source._open_text
    monkeypatch.setattr(source, "_open_text", lambda *path: opened.append(path) or original(*path))
    expected = [text for record in given for text in (*record["pos"], *record["neg"])]
    assert list(passages_of([str(packed)])) == list(passages_of([str(plain)])) == expected
    assert [record.query for record in pairs_of([str(packed)])] == [record["query"] for record in given]
    # of the packed file: to learn its size and to read it, each of the two times
    assert len([path for path, _ in opened if path == str(packed)]) == 4
