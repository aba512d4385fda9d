"""`encode` over several processes: results and order of one, and errors that say what happened."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megam3.data.process import Worker, WorkerError, WorkerKilledError, answers_of
from megam3.embedder import M3Embedder
from megam3.errors import ConfigError, DataError
from tests.data.toy_worker import make_handler
from tests.factory import make_sentences, make_tiny_model_folder

TEXTS = [*make_sentences(30, seed=1), "", "x", *make_sentences(9, seed=2, min_words=20, max_words=30), "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model_folder(tmp_path_factory.mktemp("model"), max_tokens=64)


@pytest.fixture(scope="module")
def embedder(folder: Path) -> M3Embedder:
    return M3Embedder(str(folder), device="cpu")


def test_two_processes_give_what_one_gives(embedder: M3Embedder) -> None:
    here = embedder.encode(TEXTS, batch_tokens=100, dense_dim=4)
    counts: list[int] = []
    with embedder.on_devices(["cpu", "cpu"]) as several:
        there = several.encode(TEXTS, batch_tokens=100, dense_dim=4, progress=counts.append)
        assert (sum(counts), len(counts) > 5) == (len(TEXTS), True)
        np.testing.assert_array_equal(there.dense_vecs, here.dense_vecs)
        assert there.lexical_weights == here.lexical_weights
        assert all(np.array_equal(a, b) for a, b in zip(there.colbert_vecs, here.colbert_vecs, strict=True))
        # the processes stay: heads, kinds of arrays and single texts as in one
        one = several.encode(TEXTS[0], heads=["dense"], output="torch")
        assert torch.equal(one.dense_vecs, torch.from_numpy(embedder.encode(TEXTS[0]).dense_vecs))
        assert one.lexical_weights is one.colbert_vecs is None
        scores = several.score([(TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[2])])
        np.testing.assert_array_equal(
            scores["sum"], embedder.score([(TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[2])])["sum"]
        )
        assert several.encode([]).dense_vecs.shape == (0, embedder.model.encoder.config.hidden_size)


def test_a_list_of_devices_is_all_it_takes(folder: Path) -> None:
    # in a script without a guard for its main module, which other ways of starting processes run again
    code = (
        "import megam3, sys\n"
        "print('once')\n"
        f"e = megam3.M3Embedder({str(folder)!r}, device='cpu')\n"
        "several = e.encode(['one text', 'two'], device=['cpu', 'cpu'], heads=['dense']).dense_vecs\n"
        "print((several == e.encode(['one text', 'two'], heads=['dense']).dense_vecs).all())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("once\nTrue\n", 0), done.stderr


def test_what_cannot_be_spread_is_said(embedder: M3Embedder) -> None:
    memory = M3Embedder.from_model(embedder.model, embedder.tokenizer)
    with pytest.raises(
        ConfigError, match="devices = .'cpu', 'cpu'.: needs a model that other processes can read"
    ):
        memory.encode(TEXTS, device=["cpu", "cpu"])
    with pytest.raises(ConfigError, match="must be a list of devices"):
        embedder.encode(TEXTS, device=[])
    with pytest.raises(ConfigError, match="no-such"):
        embedder.encode(TEXTS, device=["cpu", "no-such"])
    with pytest.raises(DataError, match=r"texts\[1\] = 3: is not a string"):
        embedder.encode(["a", 3], device=["cpu", "cpu"])  # type: ignore[list-item]


def test_a_head_that_is_gone_meanwhile_is_the_parents_error(tmp_path: Path) -> None:
    folder = make_tiny_model_folder(tmp_path / "model", max_tokens=64)
    embedder = M3Embedder(str(folder), device="cpu")
    (folder / "sparse_linear.pt").unlink()
    with pytest.raises(ConfigError, match=r"heads = 'lexical': the model has no lexical head"):
        embedder.encode(TEXTS, device=["cpu", "cpu"])


def test_a_killed_process_is_named_and_the_others_end(embedder: M3Embedder) -> None:
    with embedder.on_devices(["cpu", "cpu"]) as several:
        several.encode(TEXTS)
        assert several._processes is not None
        first, second = several._processes.workers
        os.kill(first.pid, signal.SIGKILL)
        with pytest.raises(
            WorkerKilledError, match=r"worker megam3.embedder_processes \(pid \d+\) was killed by SIGKILL"
        ):
            several.encode(TEXTS, batch_tokens=32)
    assert not [pid for pid in (first.pid, second.pid) if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("fail", ["user", "bug", "exit", "setup"])
def test_the_first_error_ends_all_workers(fail: str) -> None:
    workers = [Worker(make_handler, {"fail": fail, "at": 5}) for _ in range(3)]
    told = {"user": DataError, "setup": DataError, "bug": WorkerError, "exit": WorkerError}
    try:
        with pytest.raises(told[fail], match="is broken|ZeroDivisionError: at 5|exit code 7"):
            list(answers_of(workers, range(100)))
        assert {worker._process.wait(60) for worker in workers} <= {0, 7, -9}
    finally:
        for worker in workers:
            worker.close()


def test_answers_carry_the_number_of_their_request() -> None:
    workers = [Worker(make_handler, {}) for _ in range(2)]
    try:
        found = dict(answers_of(workers, (3 * number for number in range(20))))
        assert [int(found[number].rows[0]) for number in range(20)] == [3 * number for number in range(20)]
        assert list(answers_of(workers, [])) == []
        # who stops asking leaves no answer behind: the workers are ended
        answers = answers_of(workers, range(100))
        next(answers)
        answers.close()
        assert [worker._process.wait(60) for worker in workers] == [-9, -9]
    finally:
        for worker in workers:
            worker.close()
