"""Code that a model folder brings along never runs, also where the question is answered with yes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.factory import make_tiny_model_folder

ROOT = Path(__file__).resolve().parents[2]
CALLS = {
    "tokenizer": "from megam3.model.pretrained import load_tokenizer_of as call",
    "training tokenizer": "from megam3.data.tokenizer import load_tokenizer as call",
    "encoder": "from megam3.model.backbone import load_backbone as call",
    "embedder": "from megam3.embedder import M3Embedder as call",
}
FOREIGN = """
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import {base}
class Foreign({base}):
    {body}
"""


def add_foreign_code(folder: Path, mark: Path) -> None:
    """Make `folder` name its own config, encoder and tokenizer classes; importing them touches `mark`."""
    parts = [
        ("foreign_config", "PretrainedConfig", 'model_type = "foreign"'),
        ("foreign_model", "PreTrainedModel", "pass"),
        ("foreign_tokenizer", "PreTrainedTokenizerFast", "pass"),
    ]
    for name, base, body in parts:
        (folder / f"{name}.py").write_text(FOREIGN.format(mark=str(mark), base=base, body=body))
    for file, named in (
        ("config.json", {"AutoConfig": "foreign_config.Foreign", "AutoModel": "foreign_model.Foreign"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "foreign_tokenizer.Foreign"]}),
    ):
        content = json.loads((folder / file).read_text())
        content["auto_map"] = named
        if file == "tokenizer_config.json":
            # a class that transformers does not have: the question is asked
            content["tokenizer_class"] = "Foreign"
        (folder / file).write_text(json.dumps(content))


@pytest.mark.parametrize("what", CALLS)
@pytest.mark.parametrize("foreign_family", [False, True])
def test_a_yes_on_standard_input_runs_nothing(tmp_path: Path, what: str, foreign_family: bool) -> None:
    folder = tmp_path / "model"
    make_tiny_model_folder(folder)
    mark = tmp_path / "foreign code ran"
    add_foreign_code(folder, mark)
    if foreign_family:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "foreign"}))
    script = f"import sys\n{CALLS[what]}\ncall(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], input="y\n" * 20, capture_output=True, text=True
    )
    assert not mark.exists(), done.stdout + done.stderr
    assert "[y/N]" not in done.stdout + done.stderr


def test_every_call_that_could_run_foreign_code_forbids_it() -> None:
    """A new call without the word is found here, whatever folder the tests above give it."""
    without = []
    for file in [path for part in ("megam3", "examples", "tools") for path in (ROOT / part).rglob("*.py")]:
        text = file.read_text(encoding="utf-8")
        for call in re.finditer(r"\bAuto\w+\.from_(?:pretrained|config)\(", text):
            if "trust_remote_code=False" not in arguments_from(text, call.end()):
                without.append(f"{file.relative_to(ROOT)}:{text[: call.start()].count(chr(10)) + 1}")
    assert not without


def arguments_from(text: str, start: int) -> str:
    """The text from an opening bracket (just before `start`) to its closing one, nested calls left out."""
    depth, own = 1, []
    for character in text[start:]:
        depth += (character == "(") - (character == ")")
        if depth == 0:
            break
        if depth == 1:
            own.append(character)
    return "".join(own)
