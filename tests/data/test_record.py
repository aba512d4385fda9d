import json

import pytest

from megam3.data.record import MAX_TEXT_CHARACTERS, BadRecord, parse_line, parse_record


def test_every_key_is_read():
    line = {"query": "q", "pos": ["p", "r"], "neg": ["n"], "pos_scores": [1, 0.5], "neg_scores": [-2.0]}
    record = parse_record(line | {"prompt": "ask: ", "type": "only_1neg", "lang": "de", "id": 7})
    assert (record.query, record.passages, record.num_positives, record.scores) == (
        "q",
        ("p", "r", "n"),
        2,
        (1.0, 0.5, -2.0),
    )
    assert (record.prompt, record.only_one_negative, record.language, record.record_id) == (
        "ask: ",
        True,
        "de",
        "7",
    )


def test_text_and_minimal_pair():
    assert parse_record({"text": "t"}).query is None
    assert parse_record({"query": "q", "pos": ["p"], "prompt": ""}).prompt is None
    assert parse_record(
        {"query": "q", "pos": ["p"], "neg": None, "pos_scores": [1.0], "neg_scores": None}
    ).scores == (1.0,)


GOOD = {"query": "q", "pos": ["p"], "neg": ["n"]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"query": "q", "pos": ["p"]', "line = .*: is not valid JSON"),
        (b'{"query": "\xff"}', "line = .*: is not valid UTF-8 at byte 11"),
        (b'["q", "p"]', "record = .*: must be a JSON object"),
        (b"9" * 5000, "line = .*: is not valid JSON"),
        (b"[" * 100_000, "line = .*: is not valid JSON"),
        ({"passage": "x"}, "keys = .*: must hold `query` and `pos`, or `text`"),
        ({"query": "q"}, "pos = None: must hold at least one passage"),
        ({"query": "q", "pos": []}, r"pos = \[\]: must hold at least one passage"),
        ({"query": " ", "pos": ["p"]}, "query = ' ': must not be empty"),
        ({"query": 3, "pos": ["p"]}, "query = 3: must be a string"),
        ({"query": "q", "pos": "p"}, "pos = 'p': must be a list of strings"),
        ({"query": "q", "pos": ["p", ""]}, r"pos\[1\] = '': must not be empty"),
        ({"query": "q", "pos": [["p"]]}, r"pos\[0\] = \['p'\]: must be a string"),
        ({"query": "q", "pos": ["p"], "neg": [None]}, r"neg\[0\] = None: must be a string"),
        ({"text": ""}, "text = '': must not be empty"),
        ({"text": "\ud800"}, "text = .*: holds half of a surrogate pair"),
        (GOOD | {"type": "odd"}, "type = 'odd': must be one of normal, only_1neg"),
        (GOOD | {"prompt": 1}, "prompt = 1: must be a string"),
        (GOOD | {"lang": ["de"]}, "lang = .*: must be a string"),
        (GOOD | {"id": 1.5}, "id = 1.5: must be a string or an integer"),
        (
            GOOD | {"pos_scores": [1.0]},
            "neg_scores = None: must hold 1 teacher scores, one for each of `neg`",
        ),
        (
            GOOD | {"pos_scores": [1.0, 2.0], "neg_scores": [0.0]},
            "pos_scores = .*: must hold 1 teacher scores",
        ),
        (
            GOOD | {"pos_scores": [float("nan")], "neg_scores": [0.0]},
            r"pos_scores\[0\] = nan: must be finite",
        ),
        (
            GOOD | {"pos_scores": [1e300], "neg_scores": [0.0]},
            r"pos_scores\[0\] = .*: must be finite \(in float32\)",
        ),
        (GOOD | {"pos_scores": [True], "neg_scores": [0.0]}, r"pos_scores\[0\] = True: must be a number"),
    ],
)
def test_bad_record(line, message):
    raw = line if isinstance(line, bytes) else json.dumps(line).encode()
    with pytest.raises(BadRecord, match=message):
        parse_line(raw)


def test_error_for_the_user_names_file_and_line():
    error = BadRecord("pos", None, "must hold at least one passage").at("data.jsonl:12")
    assert str(error).startswith(
        "data.jsonl:12 pos = None: must hold at least one passage; correct the record, or set"
        " data.on_bad_record"
    )


def test_long_values_are_cut():
    with pytest.raises(BadRecord) as caught:
        parse_line(json.dumps({"query": 1, "pos": ["x" * 10_000]}).encode()[:-1])
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("where", ["query", "pos", "neg", "text", "prompt"])
def test_a_text_larger_than_any_book_is_refused_and_not_quoted_whole(where):
    largest, larger = "a" * MAX_TEXT_CHARACTERS, "a" * (MAX_TEXT_CHARACTERS + 1)

    def record(text):
        if where == "text":
            return {"text": text}
        return {**GOOD, where: [text] if where in ("pos", "neg") else text}

    assert parse_record(record(largest))
    with pytest.raises(
        BadRecord, match="has 4194305 characters, more than the 4194304 of any text"
    ) as caught:
        parse_record(record(larger))
    assert str(caught.value).startswith(where)
    assert len(str(caught.value.at("d.jsonl:1"))) < 400


def test_keys_that_are_not_read_are_kept_by_name_unless_they_hold_nothing() -> None:
    pair = {"query": "a", "pos": ["b"], "negs": ["c"], "title": None, "lang": "de"}
    assert parse_record(pair).unknown_keys == ("negs",)
    assert parse_record({"text": "a", "id": 1, "neg": ["b"]}).unknown_keys == ("neg",)
