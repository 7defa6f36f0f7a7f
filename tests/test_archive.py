"""Saved programs: round trips, and archives that are damaged or hostile. Nothing from a file is ever executed."""

from __future__ import annotations

import json
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch
from torch.export import Dim

from fluxc.archive import bind_weights, inspect_archive, load_program, save_program
from fluxc.archive_text import check_expression, check_guard, check_operator
from fluxc.errors import ArchiveError, OutputExistsError, StorageError


class Tiny(torch.nn.Module):
    """Tied weights, a buffer, an empty buffer, a constant, and lengths that need arithmetic and leave a guard."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(4, 4)
        self.b = torch.nn.Linear(4, 4, dtype=torch.float32)
        self.b.weight = self.a.weight
        self.register_buffer("scale", torch.arange(4.0).bfloat16())
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.register_buffer("none", torch.zeros(0, 4))

    def forward(self, x):
        y = self.b(self.a(x)) * self.scale + self.table + torch.tensor([1.0, 2.0, 3.0, 4.0])
        flat = torch.cat([self.none, y.reshape(x.shape[0] * x.shape[1], 4)])
        return {"y": flat[: x.shape[1] // 2 + 1]}


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    shapes = {"x": {0: Dim("b", min=1), 1: Dim("s", min=1, max=1000)}}
    return torch.export.export(Tiny(), (torch.randn(2, 5, 4),), dynamic_shapes=shapes)


@pytest.fixture
def saved(program, tmp_path):
    """The program as torch.export.save writes it: with pickled sample inputs."""
    path = tmp_path / "saved.pt2"
    torch.export.save(program, path)
    return path


def run(program, length=7):
    x = torch.linspace(-1, 1, 2 * length * 4).reshape(2, length, 4)
    return program.module(check_guards=False)(x)["y"]


def rewrite(path: Path, edits: dict) -> Path:
    """Replace members (bytes, or a function of the parsed JSON) of the archive, with right checksums."""
    with zipfile.ZipFile(path) as old:
        files = {name: old.read(name) for name in old.namelist()}
    root = next(iter(files)).split("/")[0]
    for name, edit in edits.items():
        full = f"{root}/{name}"
        if callable(edit):
            value = json.loads(files[full])
            edit(value)
            files[full] = json.dumps(value).encode()
        else:
            files[full] = edit
    out = path.with_name("edited.pt2")
    with zipfile.ZipFile(out, "w") as new:
        for name, data in files.items():
            new.writestr(name, data)
    return out


class Bomb:
    """Unpickling it creates the file, which is what a hostile archive would do."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


def refused(path: Path, trace: Path, match: str) -> None:
    for read in (load_program, inspect_archive):
        with pytest.raises(ArchiveError, match=match) as caught:
            read(path)
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)
    assert not trace.exists()


def test_round_trip(program, tmp_path):
    extra = {"fluxc.json": '{"a": "é\r\n"}', "tokenizer/model.bin": bytes(range(256)), "empty": ""}
    save_program(program, tmp_path / "model.pt", extra=extra)
    loaded, files = load_program(tmp_path / "model.pt")
    assert files == extra
    assert torch.equal(run(loaded), run(program))
    assert loaded.example_inputs is None
    assert program.example_inputs is not None
    assert loaded.state_dict["a.weight"].data_ptr() == loaded.state_dict["b.weight"].data_ptr()
    assert {n: t.dtype for n, t in loaded.state_dict.items()} == {n: t.dtype for n, t in program.state_dict.items()}
    assert isinstance(loaded.state_dict["a.weight"], torch.nn.Parameter)
    assert str(loaded.range_constraints) == str(program.range_constraints)


def test_module_stack_and_custom_metadata_survive(program, tmp_path):
    node = next(n for n in program.graph.nodes if n.op == "call_function" and n.meta.get("nn_module_stack"))
    save_program(program, tmp_path / "model.pt")
    loaded, _ = load_program(tmp_path / "model.pt")
    again = next(n for n in loaded.graph.nodes if n.name == node.name)
    assert [path for path, _ in again.meta["nn_module_stack"].values()] == [
        path for path, _ in node.meta["nn_module_stack"].values()
    ]


def test_a_loaded_program_can_be_saved_again_and_read_by_torch(program, tmp_path):
    save_program(program, tmp_path / "model.pt")
    loaded, _ = load_program(tmp_path / "model.pt")
    save_program(loaded, tmp_path / "again.pt")
    assert torch.equal(run(load_program(tmp_path / "again.pt")[0]), run(program))
    with open(tmp_path / "again.pt", "rb") as file:
        assert torch.equal(run(torch.export.load(file)), run(program))


def test_programs_that_torch_saved_load_without_their_pickled_inputs(program, saved):
    assert zipfile.ZipFile(saved).read("saved/data/sample_inputs/model.pt")
    loaded, extra = load_program(saved)
    assert torch.equal(run(loaded), run(program))
    assert extra == {}
    assert loaded.example_inputs is None


def test_saving_writes_no_pickle(program, tmp_path):
    save_program(program, tmp_path / "model.pt")
    with zipfile.ZipFile(tmp_path / "model.pt") as archive:
        sizes = {info.filename.split("/", 1)[1]: info.file_size for info in archive.infolist()}
    assert sizes["data/sample_inputs/model.pt"] == 0
    assert not [name for name in sizes if name.endswith((".pkl", "model.pt")) and sizes[name]]


def test_without_weights(program, tmp_path):
    save_program(program, tmp_path / "graph.pt2", with_weights=False)
    assert program.state_dict["a.weight"].device.type == "cpu"
    loaded, _ = load_program(tmp_path / "graph.pt2")
    assert {t.device.type for t in loaded.state_dict.values() if t.numel()} == {"meta"}
    assert not inspect_archive(tmp_path / "graph.pt2").has_weights
    bound = bind_weights(loaded, program.state_dict)
    assert torch.equal(run(bound), run(program))
    assert bound.state_dict["a.weight"].data_ptr() == program.state_dict["a.weight"].data_ptr()
    assert loaded.state_dict["a.weight"].device.type == "meta"


def test_graph_without_weights_does_not_grow_with_them(tmp_path):
    sizes = []
    for width in (8, 512):
        module = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Linear(width, width))
        save_program(
            torch.export.export(module, (torch.ones(1, width),)), tmp_path / f"{width}.pt2", with_weights=False
        )
        sizes.append((tmp_path / f"{width}.pt2").stat().st_size)
    assert sizes[1] < sizes[0] + 1000


def test_weights_that_do_not_fit_are_named(program, tmp_path):
    good = dict(program.state_dict)
    for change, match in [
        (lambda d: d.pop("a.bias"), r"misses a\.bias"),
        (lambda d: d.update(other=torch.ones(1)), "also has other"),
        (lambda d: d.update({"a.bias": torch.ones(5)}), r"a\.bias is .*\(5,\).*\(4,\)"),
        (lambda d: d.update({"a.bias": torch.ones(4).half()}), r"a\.bias is torch\.float16"),
    ]:
        tensors = dict(good)
        change(tensors)
        with pytest.raises(ArchiveError, match=match):
            bind_weights(program, tensors)


def test_inspect(program, tmp_path):
    save_program(program, tmp_path / "model.pt", extra={"fluxc.json": "{}"})
    report = inspect_archive(tmp_path / "model.pt")
    assert report.by_fluxc
    assert report.has_weights
    assert report.inputs == ("x",)
    assert report.operators["torch.ops.aten.linear.default"] == 2
    distinct = 16 + 4 + 4 + 4 + 4  # one shared weight, two biases, the table and the constant, in fp32
    assert report.tensor_bytes == 4 * distinct + 2 * 4
    assert report.torch_version == str(torch.__version__)


def test_existing_output_and_full_disk(program, tmp_path, monkeypatch):
    (tmp_path / "model.pt").touch()
    with pytest.raises(OutputExistsError):
        save_program(program, tmp_path / "model.pt")
    big = torch.export.export(torch.nn.Linear(512, 512), (torch.ones(1, 512),))
    import resource
    import signal

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(StorageError, match=r"cannot write .*big\.pt: File too large"):
            save_program(big, tmp_path / "big.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert [item.name for item in tmp_path.iterdir()] == ["model.pt"]


def test_pickled_sample_inputs_are_not_unpickled(program, saved, tmp_path):
    trace = tmp_path / "trace"
    path = rewrite(saved, {"data/sample_inputs/model.pt": pickle.dumps((Bomb(trace),))})
    loaded, _ = load_program(path)
    assert torch.equal(run(loaded), run(program))
    assert not trace.exists()


@pytest.mark.parametrize("folder", ["weights", "constants"])
def test_pickled_tensors_are_refused(saved, tmp_path, folder):
    trace = tmp_path / "trace"
    config = f"data/{folder}/model_{folder}_config.json"
    name = {}

    def flag(value):
        payload = next(iter(value["config"].values()))
        payload["use_pickle"] = True
        name["path"] = payload["path_name"]

    path = rewrite(saved, {config: flag})
    path = rewrite(path, {f"data/{folder}/{name['path']}": pickle.dumps(Bomb(trace))})
    refused(path, trace, "stored as a pickle")


@pytest.mark.parametrize("prefix", ["custom_obj_0", "opaque_obj_0"])
def test_custom_objects_are_refused(saved, tmp_path, prefix):
    trace = tmp_path / "trace"

    def add(value):
        value["config"]["thing"] = {"path_name": prefix, "is_param": False, "use_pickle": True, "tensor_meta": None}

    edits = {"data/constants/model_constants_config.json": add}
    path = rewrite(saved, {**edits, f"data/constants/{prefix}": pickle.dumps(Bomb(trace))})
    refused(path, trace, "stored as a pickle")


@pytest.mark.parametrize("folder", ["weights", "constants"])
def test_old_pickled_tensor_files_are_not_read(program, saved, tmp_path, folder):
    trace = tmp_path / "trace"
    path = rewrite(saved, {f"data/{folder}/model.pt": pickle.dumps({"a": Bomb(trace)})})
    assert torch.equal(run(load_program(path)[0]), run(program))
    assert not trace.exists()


def first(value, key):
    """The first dict below `value` that has `key`."""
    if isinstance(value, dict) and key in value:
        return value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if (found := first(item, key)) is not None:
            return found
    return None


def code(trace: Path) -> str:
    return f"__import__('pathlib').Path({str(trace)!r}).touch()"


def test_code_in_a_size_expression(saved, tmp_path):
    trace = tmp_path / "trace"
    path = rewrite(
        saved, {"models/model.json": lambda m: first(m, "expr_str").update(expr_str=f"({code(trace)}, 7)[1]")}
    )
    refused(path, trace, "size expression that is not arithmetic")


def test_code_in_a_guard(saved, tmp_path):
    trace = tmp_path / "trace"
    path = rewrite(saved, {"models/model.json": lambda m: m["guards_code"].append(f"{code(trace)} is None")})
    refused(path, trace, "guard that is not arithmetic")


def test_code_in_an_input_name(saved, tmp_path):
    trace = tmp_path / "trace"
    hostile = f"x={code(trace)}"
    path = rewrite(saved, {"models/model.json": lambda m: rename(m, "x", hostile)})
    refused(path, trace, "code where")


def rename(value, old, new):
    if isinstance(value, list):
        for index, item in enumerate(value):
            if item == old:
                value[index] = new
            rename(item, old, new)
    elif isinstance(value, dict):
        for key in list(value):
            if value[key] == old:
                value[key] = new
            rename(value[key], old, new)
            if key == old:
                value[new] = value.pop(key)


def test_code_in_a_parameter_name(saved, tmp_path):
    trace = tmp_path / "trace"
    hostile = f'a"), {code(trace)}, ("'
    path = rewrite(saved, {"models/model.json": lambda m: rename(m, "a.weight", hostile)})
    refused(path, trace, "code where a parameter name belongs")


def test_code_in_an_output_tree(program, saved, tmp_path, monkeypatch):
    """torch imports modules named in a tree's context; unknown trees are flattened without being read."""
    trace = tmp_path / "trace"
    (tmp_path / "hostile_module.py").write_text(f"{code(trace)}\nclass Key: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    context = json.dumps([{"__enum__": True, "fqn": "hostile_module:Key", "name": "x"}])

    def edit(model):
        signature = model["graph_module"]["module_call_graph"][0]["signature"]
        protocol, root = json.loads(signature["out_spec"])
        signature["out_spec"] = json.dumps([protocol, {**root, "context": context}])

    loaded, _ = load_program(rewrite(saved, {"models/model.json": edit}))
    assert not trace.exists()
    x = torch.ones(1, 3, 4)
    assert torch.equal(loaded.module(check_guards=False)(x), program.module(check_guards=False)(x)["y"])


@pytest.mark.parametrize(
    "target",
    [
        "_operator.call",
        "_operator.attrgetter",
        "torch.load",
        "torch.hub.load",
        "torch.ops.load_library",
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.__class__",
        "torch.ops.aten.add.__class__",
        "torch.ops.higher_order.print",
        "torch.ops.higher_order.call_torchbind",
        "torch.ops.other.op.default",
        "math.gcd",
        "#ext:op",
        "os.system",
        "torch.ops.aten.add.Tensor(",
    ],
)
def test_operators_that_are_not_loaded(saved, tmp_path, target):
    path = rewrite(saved, {"models/model.json": lambda m: first(m, "target").update(target=target)})
    refused(path, tmp_path / "trace", "the archive calls")


@pytest.mark.parametrize(
    "target", ["torch.ops.aten.__and__.Tensor", "torch.ops.fluxc.attention.default", "torch.ops.higher_order.cond"]
)
def test_operators_that_are_loaded(target):
    check_operator(target)


@pytest.mark.parametrize(
    "text",
    [
        "s0",
        "s0*s1 + 2",
        "((s0 - 1)//2) + 1",
        "Mul(Integer(2), Symbol('s77', integer=True, positive=True))",
        "FloorDiv(Symbol('s0', integer=True), Integer(2))",
        "Pow(Symbol('s0', positive=True), Integer(-1))",
        "Max(1, Min(u0, 2**16))",
        "Float('0.5', precision=53)",
        "Equality(Symbol('s0', integer=True), Integer(1))",
    ],
)
def test_arithmetic_is_accepted(text):
    check_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "s0.__class__",
        "().__class__",
        "Symbol('s0').func",
        "Symbol(s0)",
        "Symbol('os.system')",
        "Symbol('s0', positive=Max)",
        "Integer('7')",
        "9**9**9",
        "2**s0",
        "(2**9)**9",
        "Pow(Pow(Integer(9), Integer(9)), Integer(9))",
        "PowByNatural(Integer(9), Symbol('s0'))",
        "LShift(1, 1000000)",
        "1" * 100,
        "s0 if s0 else 1",
        "[s0 for s0 in s1]",
        "lambda: 0",
        "s0; s1",
        "(s0 := 1)",
        "f's0'",
        "eval",
        "E",
        "S",
        "s0!",
        "0x10^2",
        "(" * 300 + "1" + ")" * 300,
        "-" * 5000 + "1",
        "",
        "s0\nimport os",
        "L['x'].size()[0]",
        "Max(*s0)",
        "Float('1e9999999')",
        "'text'",
    ],
)
def test_other_texts_are_not_arithmetic(text):
    with pytest.raises(ArchiveError, match="not arithmetic"):
        check_expression(text)


def test_guards():
    for good in (
        "1 + (L['x'].size()[1] // 2) <= L['x'].size()[1]*L['x'].size()[0]",
        "L['kwargs']['mask'].size()[0] == L['args'][0].size()[0]",
        "not (L['n'] == 0) and math.floor(L['n'] / 2) >= 1",
        "max(2, L['x'].stride()[0]) % 8 == 0",
    ):
        check_guard(good)
    for bad in (
        "L['x'].__class__",
        "L['x'].size().__class__",
        "L['x'].item()",
        "L['x'].size(0)",
        "L[L['x']]",
        "L['__import__(1)']",
        "torch.load('f')",
        "math.factorial(99999)",
        "L['x'].size()[L['y']]",
        "open('f')",
        "1 == 1 # comment",
        "1 == 1) or (1",
        "L['a'] + 'text'",
    ):
        with pytest.raises(ArchiveError, match="guard that is not arithmetic"):
            check_guard(bad)


def test_other_files(tmp_path):
    trace = tmp_path / "trace"
    makers = {
        "is a pickle": lambda p: p.write_bytes(pickle.dumps(Bomb(trace))),
        "is a pickle .a zip file of torch.save": lambda p: torch.save({"w": torch.ones(2)}, p),
        "is empty": lambda p: p.touch(),
        "not a saved program": lambda p: p.write_text("hello"),
        "TorchScript": lambda p: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), p),
    }
    for match, make in makers.items():
        make(tmp_path / "file")
        refused(tmp_path / "file", trace, match)
        (tmp_path / "file").unlink()
    refused(tmp_path / "file", trace, "cannot read .*file: No such file")
    refused(tmp_path, trace, "is a directory")


def test_a_pickle_says_what_to_do_instead(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt")
    with pytest.raises(ArchiveError, match=r"torch\.export\.save.*Hugging Face directory"):
        load_program(tmp_path / "w.pt")


def zipped(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_odd_zips(saved, tmp_path):
    with zipfile.ZipFile(saved) as archive:
        files = [(name, archive.read(name)) for name in archive.namelist()]
    path, trace = tmp_path / "odd.pt2", tmp_path / "trace"
    refused(zipped(path, [*files, ("saved/../../x", b"")]), trace, "outside one root")
    refused(zipped(path, [*files, ("/etc/x", b"")]), trace, "outside one root")
    refused(zipped(path, [*files, ("other/x", b"")]), trace, "outside one root")
    refused(zipped(path, [*files, ("saved/models/model.json", b"{}")]), trace, "two of one name")
    refused(zipped(path, files, compression=zipfile.ZIP_DEFLATED), trace, "compressed")
    refused(zipped(path, [*files, ("saved/data/aotinductor/m/x.so", b"")]), trace, "AOTInductor")
    refused(zipped(path, [*files, ("saved/code/x.py", b"")]), trace, "holds code/x.py")
    refused(zipped(path, [("a/x", b"")]), trace, "not one that torch.export.save")
    refused(zipped(path, [("serialized_exported_program.json", b"")]), trace, "torch < 2.8")


def test_damaged_descriptions(saved, tmp_path):
    trace = tmp_path / "trace"
    weights = "data/weights/model_weights_config.json"

    def set_meta(**values):
        return lambda c: c["config"]["a.bias"]["tensor_meta"].update(values)

    for edits in (
        {"models/model.json": b"{"},
        {"models/model.json": b"[]"},
        {"models/model.json": b"[" * 100_000},
        {"models/model.json": lambda m: m.pop("graph_module")},
        {"models/model.json": lambda m: m["range_constraints"].update({"os": {"min_val": 1, "max_val": 2}})},
        {"models/model.json": lambda m: m.update(verifiers=["OTHER"])},
        {"models/model.json": lambda m: m.update(surprise="text")},
        {weights: lambda c: c.pop("config")},
        {weights: lambda c: c["config"]["a.bias"].update(path_name="weight_99")},
        {weights: lambda c: c["config"]["a.bias"].update(path_name="weight_0/../x")},
        {weights: set_meta(sizes=[{"as_int": 4000}])},
        {weights: set_meta(strides=[{"as_int": -1}])},
        {weights: set_meta(storage_offset={"as_int": 10**9})},
        {weights: set_meta(dtype=99)},
        {weights: set_meta(sizes=[{"as_expr": {"expr_str": "1"}}])},
    ):
        refused(rewrite(saved, edits), trace, ".")


def test_a_graph_that_torch_cannot_read(saved, caplog):
    path = rewrite(saved, {"models/model.json": lambda m: m["schema_version"].update(major=99)})
    with pytest.raises(ArchiveError, match="cannot read the graph") as caught:
        load_program(path)
    assert "\n" not in str(caught.value)
    assert not caplog.records


def test_truncated_files(saved, tmp_path):
    data = saved.read_bytes()
    cut = tmp_path / "cut.pt2"
    for share in (0.001, 0.1, 0.5, 0.9, 0.99, 0.9999):
        cut.write_bytes(data[: int(len(data) * share)])
        refused(cut, tmp_path / "trace", "truncated or damaged|not a saved program")


def test_flipped_bytes_either_load_equal_or_are_refused(program, saved, tmp_path):
    data, rng = bytearray(saved.read_bytes()), random.Random(7)
    wanted, refusals = run(program), 0
    for _ in range(60):
        at = rng.randrange(len(data))
        damaged = bytearray(data)
        damaged[at] ^= 1 << rng.randrange(8)
        (tmp_path / "flip.pt2").write_bytes(damaged)
        try:
            loaded, _ = load_program(tmp_path / "flip.pt2")
        except ArchiveError:
            refusals += 1
        else:
            assert torch.equal(run(loaded), wanted)
    assert refusals > 20
