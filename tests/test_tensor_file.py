"""Safetensors files in the order of the writer: the library reads them, and neighbours are views of one mapping."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxc.errors import ArchiveError
from fluxc.tensor_file import map_tensors, write_ordered

TENSORS = {
    "z": torch.arange(12.0).view(3, 4),
    "a": torch.arange(8.0).view(2, 4) + 100,
    "half": torch.arange(6).bfloat16().view(2, 3),
    "none": torch.empty(0, 4),
    "scalar": torch.tensor(7),
    "flags": torch.tensor([True, False, True]),
    "m": torch.arange(4.0).view(1, 4) - 50,
}


@pytest.fixture
def path(tmp_path):
    write_ordered(TENSORS, tmp_path / "file.safetensors")
    return tmp_path / "file.safetensors"


def _equal(found):
    assert list(found) == list(TENSORS)
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )


def test_round_trip(path):
    _equal(map_tensors(path, TENSORS))


def test_the_library_reads_it(path):
    found = load_file(path)
    _equal({name: found[name] for name in TENSORS})


def test_it_reads_the_library_s(tmp_path):
    save_file(TENSORS, tmp_path / "other.safetensors", metadata={"format": "pt"})
    _equal(map_tensors(tmp_path / "other.safetensors", TENSORS))


def test_order_and_alignment(path):
    found = map_tensors(path, ["z", "a", "m"])
    assert len({t.untyped_storage().data_ptr() for t in found.values()}) == 1
    starts = [t.storage_offset() for t in found.values()]
    assert starts == [starts[0], starts[0] + 12, starts[0] + 20]
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert (8 + length) % 64 == 0


def test_every_dtype(tmp_path):
    kinds = [torch.float64, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
    kinds += [torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2]
    tensors = {str(kind): torch.tensor([0, 1, 2]).to(kind) for kind in kinds}
    write_ordered(tensors, tmp_path / "kinds.safetensors")
    for found in (map_tensors(tmp_path / "kinds.safetensors", tensors), load_file(tmp_path / "kinds.safetensors")):
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))


def test_unaligned_data_of_another_writer(tmp_path):
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * (1 - len(header) % 2)  # an odd length
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + torch.tensor([1.5, 2.5]).numpy().tobytes())
    assert map_tensors(path, ["x"])["x"].tolist() == [1.5, 2.5]


def test_writing_to_a_tensor_leaves_the_file(path):
    map_tensors(path, ["z"])["z"].zero_()
    _equal(map_tensors(path, TENSORS))


def _rewritten(path, change):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data_offsets", [0, 10**12], "another size"),
        ("data_offsets", [-4, 44], "another size"),
        ("data_offsets", [0, 44], "another size"),
        ("shape", [3, 5], "another size"),
        ("shape", [3, -4], "another size"),
        ("shape", "wide", "another size"),
        ("dtype", "F12", "in another way"),
        ("data_offsets", 3, "in another way"),
    ],
)
def test_damaged_entries_are_refused(path, field, value, message):
    _rewritten(path, lambda header: header["z"].update({field: value}))
    with pytest.raises(ArchiveError, match=message):
        map_tensors(path, ["z"])


def test_other_files_are_refused(tmp_path, path):
    with pytest.raises(ArchiveError, match="holds no tensor 'q'"):
        map_tensors(path, ["q"])
    with pytest.raises(ArchiveError, match="no readable safetensors file"):
        map_tensors(tmp_path / "absent", ["z"])
    for content in (b"", b"short", b"\xff" * 64, (2).to_bytes(8, "little") + b"[]", (3).to_bytes(8, "little") + b"{{{"):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(ArchiveError, match="safetensors"):
            map_tensors(tmp_path / "bad", ["z"])
