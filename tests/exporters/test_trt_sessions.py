"""Running a TensorRT engine, over a stand-in for the library and the driver: ONNX Runtime computes, addresses are real.

What it shows is that this code hands over the right tensors; that TensorRT computes right is for a GPU to show.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import random
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest

pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

import fluxc  # noqa: E402
from fluxc.errors import ArchiveError, OptionError, TargetError, UserError  # noqa: E402
from fluxc.exporters import cuda_driver, trt_programs  # noqa: E402
from fluxc.exporters.cuda_driver import CudaDriver  # noqa: E402
from fluxc.exporters.engine_dir import open_engine  # noqa: E402
from fluxc.exporters.trt_programs import TrtPrograms  # noqa: E402
from fluxc.hashed_files import entries_below  # noqa: E402
from fluxc.toy_flux import TOY  # noqa: E402

BUILT = {"library": "tensorrt_rtx", "version": "1.2.3"}


class Driver:
    """libcuda over the host's memory."""

    def __init__(self, devices=1):
        self.devices, self.kept = devices, {}

    def cuInit(self, flags):  # noqa: N802
        return 0 if self.devices else 100

    def cuDeviceGet(self, handle, device):  # noqa: N802
        return 0 if device < self.devices else 101

    def cuDevicePrimaryCtxRetain(self, context, handle):  # noqa: N802
        return 0

    def cuCtxSetCurrent(self, context):  # noqa: N802
        return 0

    def cuStreamCreate(self, stream, flags):  # noqa: N802
        return 0

    def cuStreamSynchronize(self, stream):  # noqa: N802
        return 0

    def cuMemAlloc_v2(self, address, size):  # noqa: N802
        buffer = ctypes.create_string_buffer(size.value)
        address._obj.value = ctypes.addressof(buffer)
        self.kept[address._obj.value] = buffer
        return 0

    def cuMemFree_v2(self, address):  # noqa: N802
        del self.kept[address.value]
        return 0

    def cuMemcpyHtoD_v2(self, place, source, size):  # noqa: N802
        ctypes.memmove(place.value, source, size)
        return 0

    def cuMemcpyDtoH_v2(self, target, place, size):  # noqa: N802
        ctypes.memmove(target, place.value, size)
        return 0


class Context:
    """An execution context whose engine is an ONNX Runtime session; shapes come from a first run."""

    def __init__(self, session):
        self.session, self.shapes, self.places, self.results = session, {}, {}, None

    def set_input_shape(self, name, shape):
        self.shapes[name], self.results = tuple(shape), None
        return shape != (1, 77)

    def set_tensor_address(self, name, place):
        self.places[name] = place

    def get_tensor_shape(self, name):
        self.results = self.results or self._run(
            {each: np.zeros(self.shapes[each], dtype) for each, dtype in self._in()}
        )
        return self.results[name].shape

    def execute_async_v3(self, stream):
        given = {name: _at(self.places[name], self.shapes[name], dtype) for name, dtype in self._in()}
        for name, array in self._run(given).items():
            kept = np.ascontiguousarray(array)
            ctypes.memmove(self.places[name], kept.ctypes.data, kept.nbytes)
        return True

    def _in(self):
        return [(each.name, _numpy(each.type)) for each in self.session.get_inputs()]

    def _run(self, given):
        if "slots" in given:  # zeros are valid slots, yet the caches must be there
            given["lens"] = np.maximum(given["lens"], 1)
        names = [each.name for each in self.session.get_outputs()]
        return dict(zip(names, self.session.run(None, given), strict=True))


def _at(place, shape, dtype):
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(ctypes.string_at(place, size), dtype).reshape(shape)


def _numpy(text):
    return np.dtype({"tensor(int64)": "i8", "tensor(int32)": "i4", "tensor(float)": "f4", "tensor(bool)": "?"}[text])


class Engine:
    """An engine over a session."""

    def __init__(self, session):
        self._session = session
        self._all = {
            **{x.name: ("in", x) for x in session.get_inputs()},
            **{x.name: ("out", x) for x in session.get_outputs()},
        }
        self.num_io_tensors = len(self._all)

    def get_tensor_name(self, index):
        return list(self._all)[index]

    def get_tensor_mode(self, name):
        return self._all[name][0]

    def get_tensor_dtype(self, name):
        return _numpy(self._all[name][1].type)

    def create_execution_context(self):
        return Context(self._session)


class Runtime:
    """Opens ONNX files; b"broken" is an engine that no device runs."""

    def __init__(self, logger):
        pass

    def deserialize_cuda_engine(self, content):
        if content == b"broken":
            return None
        return Engine(onnxruntime.InferenceSession(content.decode(), providers=["CPUExecutionProvider"]))


@pytest.fixture
def library(monkeypatch):
    logger = type("Logger", (), {"WARNING": 1, "__init__": lambda self, level: None})
    module = types.ModuleType(BUILT["library"])
    module.__version__, module.Runtime, module.Logger = BUILT["version"], Runtime, logger
    module.TensorIOMode, module.nptype = types.SimpleNamespace(INPUT="in"), lambda dtype: dtype
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.fixture
def engine(made, tmp_path):
    """The ONNX engine of the toy model, declared to be one of TensorRT: its engine files name the ONNX files."""
    path = shutil.copytree(made[1].path, tmp_path / "engine")
    values = json.loads((path / "engine.json").read_text())
    values["target"] = "trt"
    for phase, program in values["programs"].items():
        (path / f"{phase}.engine").write_text(str(path / program["file"]))
        program |= {"file": f"{phase}.engine", "built": BUILT}
    return declare(path, values)


def declare(path, values):
    files = {name: dataclasses.asdict(entry) for name, entry in entries_below(path).items() if name != "engine.json"}
    (path / "engine.json").write_text(json.dumps(values | {"files": files}))
    return path


def test_it_answers_as_the_onnx_engine_does(made, engine, library, monkeypatch):
    driver = Driver()
    monkeypatch.setattr(trt_programs, "CudaDriver", lambda number: CudaDriver(number, driver))
    prompts = [[int(token) for token in np.random.default_rng(n).integers(2, TOY.vocab, n)] for n in (1, 40, 90)]
    found = []
    for path, device in ((made[1].path, None), (engine, "cuda")):
        with fluxc.load(path, device) as opened:
            answers = opened.generate(prompts, max_new_tokens=6, budget=[0.2, 0.5, 1.0])
            found.append([(one.tokens, list(one.routes)) for one in answers])
    assert found[0] == found[1]
    assert driver.kept == {}


def test_a_shape_beyond_the_profile(engine, library):
    programs = TrtPrograms(open_engine(engine), "cuda:0", CudaDriver(0, Driver()))
    with pytest.raises(TargetError, match=r"prefill\.engine takes no input_ids of shape \[1, 77\]"):
        list(
            programs.prefill(np.zeros((1, 77), np.int64), np.array([77]), np.zeros((2, 1), np.float32), np.array([[0]]))
        )


def test_a_gpu_that_cannot_run_it(engine, library):
    (engine / "prefill.engine").write_bytes(b"broken")
    declare(engine, json.loads((engine / "engine.json").read_text()))
    programs = TrtPrograms(open_engine(engine), None, CudaDriver(0, Driver()))
    with pytest.raises(TargetError, match=r"this GPU cannot run prefill\.engine"):
        list(programs.prefill(np.zeros((1, 7), np.int64), np.array([7]), np.zeros((2, 1), np.float32), np.array([[0]])))


def test_devices_that_are_not_there(engine, library, monkeypatch):
    with pytest.raises(OptionError, match="runs on an NVIDIA GPU, not on cpu"):
        fluxc.load(engine, "cpu")
    with pytest.raises(TargetError, match="there is no CUDA device 3"):
        CudaDriver(3, Driver())
    with pytest.raises(TargetError, match="the CUDA driver finds no device"):
        CudaDriver(0, Driver(devices=0))
    monkeypatch.setattr(cuda_driver, "LIBRARY", "libthere-is-none.so")
    with pytest.raises(TargetError, match="needs an NVIDIA GPU, and no CUDA driver is installed"):
        fluxc.load(engine)


def test_the_library_of_another_version_or_none(engine, library, monkeypatch):
    library.__version__ = "9"
    with pytest.raises(TargetError, match=r"built by tensorrt_rtx 1\.2\.3, and 9 is installed"):
        fluxc.load(engine)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(
        TargetError, match=r"needs tensorrt_rtx, which is not installed. pip install tensorrt-rtx==1\.2\.3"
    ):
        fluxc.load(engine)


def test_a_manifest_with_a_changed_byte(engine, library):
    rng, text = random.Random(0), (engine / "engine.json").read_bytes()
    for _ in range(150):
        changed = bytearray(text)
        changed[rng.randrange(len(text))] ^= 1 << rng.randrange(7)
        (engine / "engine.json").write_bytes(changed)
        with contextlib.suppress(UserError):  # a change may leave it as it was, in meaning
            TrtPrograms(open_engine(engine), "cuda", CudaDriver(0, Driver()))


def test_a_library_that_builds_no_engines(engine, library):
    values = json.loads((engine / "engine.json").read_text())
    values["programs"]["decode"]["built"] = {"library": "os", "version": "1"}
    with pytest.raises(ArchiveError, match="names the library 'os'"):
        fluxc.load(declare(engine, values), "cuda")


def test_the_driver_says_what_it_refused():
    driver = Driver()
    driver.cuMemAlloc_v2 = lambda address, size: 2
    with pytest.raises(TargetError, match=r"refused cuMemAlloc_v2 \(error 2\)"), CudaDriver(0, driver).buffer(9):
        pass


def test_loading_imports_neither_torch_nor_transformers(engine):
    code = "import fluxc, sys\nsys.modules['tensorrt_rtx'] = None\nfrom fluxc.errors import TargetError\n"
    code += "try:\n    fluxc.load(sys.argv[1])\nexcept TargetError as error:\n    print(error.message)\n"
    code += "print([name for name in ('torch', 'transformers', 'onnx', 'onnxscript') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", code, str(engine)], capture_output=True, text=True, check=True)
    said, imported = done.stdout.strip().splitlines()
    assert "needs tensorrt_rtx, which is not installed" in said
    assert imported == "[]"


def test_a_split_engine_has_two_prefills(made, engine, library):
    values = json.loads((engine / "engine.json").read_text())
    program = values["programs"].pop("prefill")
    values["programs"] |= {"prefill_full": program, "prefill_sparse": program}
    programs = TrtPrograms(open_engine(declare(engine, values)), "cuda", CudaDriver(0, Driver()))
    inputs = np.zeros((1, 9), np.int64), np.array([9]), np.full((2, 1), -np.inf, np.float32), np.array([[8]])
    *_, end = programs.prefill(*inputs)
    assert end.routes.tolist() == [False, False]
    *_, end = programs.prefill(*inputs[:2], -inputs[2], inputs[3])
    assert end.routes.tolist() == [True, True]
