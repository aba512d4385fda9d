import logging

import pytest

from megam3.obs.log import setup_logging


@pytest.fixture(autouse=True)
def _restore():
    yield
    logger = logging.getLogger("megam3")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


def test_main_rank_writes_plain_lines_to_file_and_stderr(tmp_path, capsys):
    setup_logging(tmp_path / "run", is_main=True)
    logging.getLogger("megam3.data").info("three records")
    logging.getLogger("megam3.data").info("only kept", extra={"file_only": True})
    assert capsys.readouterr().err == "three records\n"
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["INFO three records", "INFO only kept"]


def test_other_ranks_only_warn_and_say_who_they_are(tmp_path, capsys):
    setup_logging(tmp_path, is_main=False, rank=3)
    logging.getLogger("megam3.x").info("silent")
    logging.getLogger("megam3.x").warning("low disk")
    assert capsys.readouterr().err == "[rank 3] low disk\n"
    assert not (tmp_path / "log.txt").exists()


def test_a_second_setup_replaces_the_first(tmp_path, capsys):
    setup_logging(tmp_path, is_main=True)
    setup_logging(tmp_path, is_main=True)
    logging.getLogger("megam3").info("once")
    assert capsys.readouterr().err == "once\n"
    assert (tmp_path / "log.txt").read_text().count("once") == 1


def test_a_full_disk_costs_lines_and_one_word_about_them(tmp_path, capsys):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    setup_logging(tmp_path, is_main=True)
    for number in range(3):
        logging.getLogger("megam3").info("line %d", number)
    said = capsys.readouterr().err
    missing = (
        f"megam3: {tmp_path}/log.txt cannot be written (No space left on device): lines are missing there"
    )
    assert sorted(said.splitlines()) == ["line 0", "line 1", "line 2", missing]


def test_our_own_mistakes_in_a_line_keep_their_traceback(tmp_path, capsys):
    setup_logging(tmp_path, is_main=True)
    logging.getLogger("megam3").info("%d", "no number")
    assert "--- Logging error ---" in capsys.readouterr().err
