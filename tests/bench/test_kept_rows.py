"""Rows on disk: taken up again after an interruption, started again under other conditions."""

from __future__ import annotations

from pathlib import Path

from fluxc.bench.kept_rows import KeptRows

ROW = {"suite": "needle", "prompt": 0, "system": "dense", "loss": 1.5}
OTHER = {**ROW, "prompt": 1, "loss": 2.0}


def test_rows_come_back(tmp_path: Path) -> None:
    path = tmp_path / "q.json.rows"
    KeptRows(path, {"seed": 1}).add([ROW, OTHER])
    again = KeptRows(path, {"seed": 1})
    assert again.get("needle", 0, "dense") == ROW
    assert again.get("needle", 1, "dense") == OTHER
    assert again.get("text", 1, "dense") is None
    again.remove()
    assert not path.exists()


def test_a_line_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "q.json.rows"
    KeptRows(path, {"seed": 1}).add([ROW, OTHER])
    path.write_text(path.read_text()[:-5])
    again = KeptRows(path, {"seed": 1})
    assert (len(again), again.get("needle", 1, "dense")) == (1, None)
    again.add([OTHER])
    assert len(KeptRows(path, {"seed": 1})) == 2


def test_other_conditions_start_again(tmp_path: Path) -> None:
    path = tmp_path / "q.json.rows"
    KeptRows(path, {"seed": 1}).add([ROW])
    assert len(KeptRows(path, {"seed": 2})) == 0


def test_without_a_path_rows_stay_in_memory() -> None:
    kept = KeptRows(None, {})
    kept.add([ROW])
    assert len(kept) == 1
    kept.remove()
