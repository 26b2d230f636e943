"""Files stand whole or not at all, and are not written through links that somebody else has planted."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tdkd_dist.files import append_text, whole, write_text
from tdkd_dist.mistakes import Mistake


def test_a_planted_link_is_not_written_through(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "file"
    victim.write_text("precious")
    (tmp_path / ".file.partial").symlink_to(victim)
    write_text(path, "ours")
    assert (victim.read_text(), path.read_text()) == ("precious", "ours")
    assert not path.is_symlink()


def test_a_link_planted_at_the_last_moment_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: path.is_symlink() or path.symlink_to(victim))
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "file", "ours")
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("there", [True, False])
def test_nothing_is_appended_through_a_link(tmp_path: Path, there: bool) -> None:
    victim, path = tmp_path / "victim", tmp_path / "log.txt"
    if there:
        victim.write_text("precious")
    path.symlink_to(victim)
    with pytest.raises(Mistake, match=r"log\.txt: a symbolic link, which is not written through; remove it"):
        append_text(path, "ours\n")
    assert victim.exists() == there
    assert not there or victim.read_text() == "precious"


def test_what_cannot_be_opened_is_left_as_it_is(tmp_path: Path) -> None:
    assert not append_text(tmp_path, "ours\n")
    assert not append_text(tmp_path / "none" / "log.txt", "ours\n")


def test_other_libraries_write_to_the_name_and_the_mode_is_the_umasks(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        for name, write in (
            ("a.safetensors", lambda path: save_file({"w": torch.ones(2)}, path)),
            ("a.pt", lambda path: torch.save({"w": 1}, path)),
            ("a.txt", lambda path: np.savetxt(path, np.ones(2))),
        ):
            with whole(tmp_path / name) as partial:
                write(partial)
            assert (tmp_path / name).stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "a.safetensors", "a.txt"]
