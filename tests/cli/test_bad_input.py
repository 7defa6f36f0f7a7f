"""Bad input: one line that names the thing and the next step, exit code 2, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fluxc.cli import main
from fluxc.testing import toy_program
from fluxc.tiny_folder import save_tiny_model
from fluxc.tiny_models import build

Refuse = Callable[..., str]


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refuse(work: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Refuse]:
    """Run a command line that must be refused with exit code 2; gives its one line, without `error: `."""

    def call(*argv: str) -> str:
        before = tree(work)
        capsys.readouterr()  # what building the input printed
        code = main(list(argv))
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert (code, captured.out) == (2, "")
        assert len([line for line in lines if not line.endswith(" s)")]) == 1, captured.err
        assert tree(work) == before
        return lines[-1].removeprefix("error: ")

    yield call


def tree(folder: Path) -> dict[str, int]:
    """Every path below `folder`, hidden ones too, with its size."""
    return {str(path.relative_to(folder)): path.lstat().st_size for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny-llama", layers=1)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A saved program, as bytes."""
    from fluxc.archive import save_program

    path = tmp_path_factory.mktemp("program") / "toy.pt2"
    save_program(toy_program(), path)
    return path.read_bytes()


def test_a_missing_file(refuse: Refuse) -> None:
    assert refuse("capture", "missing.pt").startswith("there is no model 'missing.pt'; name a Hugging Face directory")


def test_a_pickle(refuse: Refuse, work: Path) -> None:
    (work / "m.pt").write_bytes(pickle.dumps({"weight": 1}))
    assert refuse("capture", "m.pt", "-o", "out.pt").startswith("m.pt is a pickle")


def test_a_state_dict(refuse: Refuse) -> None:
    torch.save({"weight": torch.ones(2)}, "m.pt")
    assert "save the program with torch.export.save" in refuse("capture", "m.pt", "-o", "out.pt")


def test_a_truncated_archive(refuse: Refuse, work: Path, program: bytes) -> None:
    (work / "m.pt2").write_bytes(program[: len(program) // 2])
    assert refuse("capture", "m.pt2").startswith("m.pt2 is truncated or damaged")


def test_a_corrupt_archive(refuse: Refuse, work: Path, program: bytes) -> None:
    middle = len(program) // 2
    (work / "m.pt2").write_bytes(program[:middle] + bytes(2000) + program[middle + 2000 :])
    assert refuse("capture", "m.pt2").startswith("m.pt2 is truncated or damaged")


class Trap:
    """Unpickling this leaves a file behind."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, ("trapped",)


def test_a_hostile_archive(refuse: Refuse, work: Path, program: bytes) -> None:
    import zipfile

    (work / "m.pt2").write_bytes(program)
    with zipfile.ZipFile("m.pt2") as archive:
        folder = archive.namelist()[0].split("/")[0]
    with zipfile.ZipFile("m.pt2", "a") as archive:
        archive.writestr(f"{folder}/data/payload.pkl", pickle.dumps(Trap()))
    assert "payload.pkl" in refuse("capture", "m.pt2")
    assert not (work / "trapped").exists()


def test_a_folder_that_is_no_model(refuse: Refuse, work: Path) -> None:
    (work / "photos").mkdir()
    assert refuse("capture", "photos").startswith("photos is a directory without config.json, so no model")


def test_a_folder_that_was_transformed_already(refuse: Refuse, work: Path) -> None:
    (work / "made.flux").mkdir()
    (work / "made.flux/manifest.json").write_text("{}")
    assert refuse("transform", "made.flux", "-o", "again.flux") == (
        "made.flux was transformed already; `fluxc calibrate made.flux --budget 0.3` gives it another budget"
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": "x"}, "hidden_size"),
        ({"num_attention_heads": 0}, "zero"),
        ({"vocab_size": 7}, "other shapes than its config says"),
    ],
)
def test_a_folder_with_a_wrong_config(
    refuse: Refuse, work: Path, model: Path, change: dict[str, object], said: str
) -> None:
    shutil.copytree(model, "damaged")
    config = json.loads((work / "damaged/config.json").read_text())
    (work / "damaged/config.json").write_text(json.dumps(config | change))
    damaged(refuse, said)


def test_a_folder_with_damaged_files(refuse: Refuse, work: Path, model: Path) -> None:
    shutil.copytree(model, "damaged")
    weights = work / "damaged/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    damaged(refuse, "metadata")
    (work / "damaged/config.json").write_text("{")
    damaged(refuse, "JSON")


def damaged(refuse: Refuse, said: str) -> None:
    text = refuse("capture", "damaged")
    assert text.startswith("damaged cannot be loaded: ")
    assert said in text
    assert text.endswith("; are its files whole, and does this version of transformers know it?")


def test_a_truncated_gguf_file(refuse: Refuse, work: Path) -> None:
    pytest.importorskip("gguf")
    (work / "m.gguf").write_bytes(b"GGUF\x03")
    assert refuse("capture", "m.gguf").startswith("m.gguf cannot be loaded: ")


def test_a_folder_without_a_tokenizer(
    refuse: Refuse, work: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    assert refuse("transform", "bare", "-q").startswith("the model has no tokenizer; put its tokenizer.json into")
    assert main(["capture", "bare"]) == 0
    assert "without a tokenizer, which `fluxc transform` needs: " in capsys.readouterr().err


def test_an_encoder(refuse: Refuse, work: Path) -> None:
    (work / "bert").mkdir()
    (work / "bert/config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    assert refuse("capture", "bert") == "bert is an encoder; fluxc takes decoder-only language models"


def test_an_unsupported_attention(refuse: Refuse, work: Path) -> None:
    build("bloom", vocab_size=97, hidden_size=32, n_layer=1, n_head=2).save_pretrained(work / "bloom")
    assert refuse("capture", "bloom").startswith("bloom: its attention does not go through")


def test_an_output_that_exists(refuse: Refuse, work: Path, model: Path) -> None:
    (work / "model.pt").write_text("precious")
    assert refuse("capture", str(model)) == (
        "model.pt already exists; give --force to replace it, or name another with -o"
    )
    assert (work / "model.pt").read_text() == "precious"


def test_an_output_folder_that_does_not_exist(refuse: Refuse, model: Path) -> None:
    assert refuse("capture", str(model), "-o", "no/model.pt").endswith("make it, or choose another place with -o")


def test_a_full_disk(refuse: Refuse, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    text = refuse("capture", str(model))
    assert "model.pt" in text
    assert "space" in text
