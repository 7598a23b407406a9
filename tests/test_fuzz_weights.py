"""Whatever a file of weights holds: a network or a sentence, and never code that runs."""

import hashlib
import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from fuzzing import (
    Trap,
    altered,
    as_json,
    damaged,
    ends_well,
    fewer,
    foreign,
    json_files,
    values,
    zip_of,
)
from hypothesis import given, strategies as st
from test_training import small_trainer
from torch import nn

from lednet import LEDNet, UserError, load_model, load_weights
from lednet.checkpoint import CONFIG, TENSORS, load_checkpoint, save_pretrained
from lednet.export.common import ExportedModel
from lednet.export.formats import FORMATS, ExportOptions, load
from lednet.export.wrappers import EndToEndModel
from lednet.training.checkpointing import Checkpoints
from lednet.training.loop import Progress, TrainingRun, report_mismatch
from lednet.training.run_dir import RunDir
from lednet.training.stages import Stage

pytestmark = pytest.mark.filterwarnings("ignore")

META = {
    "dataset": "x", "size": [32, 64], "classes": ["a", "b"], "colors": [[1, 2, 3], [4, 5, 6]],
    "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0], "stage": "decoder", "epoch": 2, "miou": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(autouse=True)
def nothing_runs(place, monkeypatch):
    """No test may leave the file that every trap would make."""
    monkeypatch.chdir(place)
    yield
    assert not (place / "sprung").exists()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def saved(content: object, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))


STATE = small_net().state_dict()
BUNDLE = {"state_dict": STATE, "meta": META, "epoch": 3, "arch": "x", "best_acc": 0.5}
SOUND = [
    saved(BUNDLE),
    saved({f"module.{key}": value for key, value in STATE.items()}),
    saved(BUNDLE, _use_new_zipfile_serialization=False),  # as the original release's .pth.tar
]


def open_it(path: Path) -> None:
    content = ends_well(lambda: load_checkpoint(path), path.name)
    if content is not None:
        assert all(isinstance(key, str) for key in content["state_dict"])
        values = content["state_dict"].values()
        assert sum(v.numel() * v.element_size() for v in values) <= path.stat().st_size
        net = small_net()
        ends_well(lambda: load_weights(net, path), path.name)
        ends_well(lambda: load_model(path), path.name)


@pytest.mark.parametrize("content", SOUND)
def test_sound_checkpoints_are_read(place, content):
    path = write(place / "w.pth", content)
    report = load_weights(small_net(), path)
    assert report.complete and len(report.loaded) == len(STATE)


@given(content=foreign(SOUND))
def test_damaged_checkpoints(place, content):
    open_it(write(place / "w.pth", content))
    assert not (place / "sprung").exists()


def parts_of(checkpoint: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(checkpoint)) as archive:
        return {member.filename: archive.read(member) for member in archive.infolist()}


PARTS = parts_of(SOUND[0])
PICKLE = next(name for name in PARTS if name.endswith("data.pkl"))
GLOBALS = [
    b"torch._utils\n_rebuild_tensor_v2\n", b"torch._utils\n_rebuild_parameter\n",
    b"torch._utils\n_rebuild_sparse_tensor\n", b"torch._utils\n_rebuild_qtensor\n",
    b"torch\nFloatStorage\n", b"torch\nload\n", b"torch.hub\nload\n", b"collections\nOrderedDict\n",
    b"os\nsystem\n", b"posix\nsystem\n", b"builtins\nexec\n", b"builtins\neval\n",
    b"builtins\nopen\n", b"subprocess\nPopen\n", b"nt\nsystem\n", b"torch\nSize\n",
    b"torch.serialization\nload\n",
    b"__builtin__\ngetattr\n", b"pathlib\nPath.touch\n", b"numpy\nload\n", b"argparse\nNamespace\n",
]  # fmt: skip
_CODES = b"()*.0123BCFGIJKLMNPQRSTUVX]abcdeghijlopqrstu}" + bytes(range(128, 150))
OPCODES = [bytes([code]) for code in _CODES]
FRAGMENTS = [
    b"X\x05\0\0\0touch", b"X\x0c\0\0\0touch sprung", b"K\x07", b"\x8a\x08" + b"\x7f" * 8,
    b"X\xff\xff\xff\x7f", b"\x8d" + b"\xff" * 8, b"B\xff\xff\xff\x7f", b"q\x01", b"h\x01",
    b"\x85R", b"tR", b"(ltR.", b"}b", b"Q", b"]2a2a2a",
]  # fmt: skip
pieces = st.one_of(
    st.sampled_from(GLOBALS).map(lambda name: b"c" + name),
    st.sampled_from(OPCODES),
    st.sampled_from(FRAGMENTS),
    st.binary(max_size=5),
)


@st.composite
def programs(draw) -> bytes:
    """Pickles: traps, those of checkpoints with other bytes, and instructions in any order."""
    kind = draw(st.integers(0, 2))
    if kind == 0:
        trap = Trap(Path("sprung"), draw(st.integers(0, 2)))
        inside = {"state_dict": {"a": trap}}
        places = [trap, {"state_dict": trap}, inside, {"meta": [trap]}, (1, trap)]
        return pickle.dumps(draw(st.sampled_from(places)), draw(st.integers(0, 5)))
    if kind == 1:
        return draw(damaged([PARTS[PICKLE], pickle.dumps(META, 2), b"\x80\x02}q\x01."]))
    body = b"".join(draw(st.lists(pieces, max_size=14)))
    return b"\x80\x02" + body + b"."


@given(
    program=programs(),
    wrap=st.sampled_from(["raw", "zip", "zip", "zip", "deflated", "legacy", "names"]),
)
def test_pickles_run_no_code(place, program, wrap):
    if wrap == "raw":
        content = program
    elif wrap == "legacy":
        head = b"".join(
            pickle.dumps(part, 2)
            for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "type_sizes": {}})
        )
        content = head + program + pickle.dumps([], 2)
    else:
        parts = {**PARTS, PICKLE: program}
        if wrap == "names":
            parts = {name.replace("archive", "../x"): part for name, part in parts.items()}
            parts["../../sprung"] = b"x"
        content = zip_of(parts, zipfile.ZIP_DEFLATED if wrap == "deflated" else zipfile.ZIP_STORED)
    open_it(write(place / "w.pth", content))
    assert not (place / "sprung").exists() and not (place.parent / "sprung").exists()


@pytest.mark.parametrize("how", range(3))
def test_the_traps_would_spring(tmp_path, how):
    pickle.loads(pickle.dumps(Trap(tmp_path / "trap", how)))
    assert (tmp_path / "trap").exists()


@given(data=st.data())
def test_checkpoints_of_odd_parts(place, data):
    """Members of a checkpoint with other bytes or none, whose check sums are right."""
    parts = dict(PARTS)
    for name in data.draw(st.lists(st.sampled_from(sorted(PARTS)), max_size=2, unique=True)):
        parts[name] = data.draw(foreign([PARTS[name]]))
        if data.draw(st.integers(0, 9)) == 0:
            del parts[name]
    open_it(write(place / "w.pth", zip_of(parts)))


def _odd_tensors() -> st.SearchStrategy:
    return st.sampled_from(
        [
            torch.zeros(1).expand(10**9),
            torch.zeros(1).expand(10**6, 128, 1, 1),
            torch.zeros(2, 1, 1, 1, dtype=torch.complex64),
            torch.zeros(2, 1, 1, 1).to_sparse(),
            torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8),
            torch.zeros(2, device="meta"),
            torch.zeros(0),
            torch.tensor(0),
            torch.full((2,), float("nan")),
            torch.zeros(2, dtype=torch.bool),
            torch.zeros(2, dtype=torch.float8_e4m3fn),
            nn.Parameter(torch.zeros(2)),
        ]
    )


odd_tensors = st.deferred(_odd_tensors)


@given(content=altered(BUNDLE, values | odd_tensors), legacy=st.booleans())
def test_checkpoints_of_odd_values(place, content, legacy):
    try:
        data = saved(content, _use_new_zipfile_serialization=not legacy)
    except (RuntimeError, NotImplementedError):  # the old form does not take every tensor
        data = saved(content)
    open_it(write(place / "w.pth", data))


NET = LEDNet(3)
FULL = {key: value.half() for key, value in NET.state_dict().items()}


@fewer(4)
@given(data=st.data())
def test_networks_of_odd_shapes(place, data):
    """Full state dicts in which some tensors have another shape: no memory is taken for those."""
    state = dict(FULL)
    for name in data.draw(st.lists(st.sampled_from(
        ["decoder.mid.0.weight", "decoder.down1.0.weight", "decoder.lateral1.0.weight",
         "encoder.0.conv.weight", *data.draw(st.sampled_from([[], [sorted(FULL)[7]]]))]
    ), max_size=3)):  # fmt: skip
        shape = data.draw(st.lists(st.sampled_from([0, 1, 3, 128, 10**4]), max_size=4))
        sound = data.draw(st.booleans()) and len(shape) < 2
        state[name] = torch.zeros(shape) if sound else torch.zeros(1).expand(shape or [1])
    meta = data.draw(altered(META))
    path = write(place / "full.pth", saved({"state_dict": state, "meta": meta}))
    found = ends_well(lambda: load_model(path), path.name)
    if found is not None:
        net, meta = found
        assert net.num_classes == 3 and isinstance(meta, dict)
        height, width = meta.get("size") or (1, 1)
        assert height * width <= 10**8


def test_compressed_checkpoint_is_not_inflated(place):
    parts = {**PARTS, PICKLE.replace("data.pkl", "data/0"): bytes(20 << 20)}
    path = write(place / "w.pth", zip_of(parts, zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 1 << 17
    with pytest.raises(UserError, match=r"w\.pth is damaged or no PyTorch checkpoint"):
        load_checkpoint(path)


# released weights


@pytest.fixture(scope="module")
def released(place) -> tuple[Path, dict, bytes]:
    save_pretrained(place / "released", NET.half(), META)
    NET.float()
    config = json.loads((place / "released" / CONFIG).read_text())
    return place / "released", config, (place / "released" / TENSORS).read_bytes()


def safetensors(header: object, data: bytes) -> bytes:
    text = as_json(header)
    return struct.pack("<Q", len(text)) + text + data


TENSOR = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
HEADER = {"__metadata__": {"format": "pt"}, "a": TENSOR, "b": {**TENSOR, "data_offsets": [24, 48]}}
dtypes = st.sampled_from(
    ["BOOL", "F4", "F6_E2M3", "U8", "I8", "F8_E5M2", "F8_E8M0", "I16", "BF16", "U64", "C64", "X"]
)


@given(
    header=altered(HEADER, values | dtypes),
    data=st.binary(max_size=60) | st.just(bytes(48)),
    length=st.none() | st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1]),
    config=st.data(),
)
def test_safetensors_of_odd_headers(place, header, data, length, config):
    folder = place / "odd"
    folder.mkdir(exist_ok=True)
    content = safetensors(header, data)
    if length is not None:
        content = struct.pack("<Q", length) + content[8:]
    if config.draw(st.booleans()):
        content = config.draw(foreign([content]))
    write(folder / TENSORS, content)
    about = {"model_type": "lednet", "network": {}, "meta": META, "sha256": "?"}
    about["sha256"] = hashlib.sha256(content).hexdigest()
    write(folder / CONFIG, as_json(about))
    ends_well(lambda: load_model(folder), TENSORS, CONFIG)


@fewer(4)
@given(data=st.data())
def test_configs_of_released_weights(released, data):
    folder, config, _ = released
    write(folder / CONFIG, data.draw(json_files(config)))
    found = ends_well(lambda: load_model(folder), TENSORS, CONFIG)
    assert found is None or found[0].num_classes == 3


# a run to resume


RECORD = {"stage": "decoder", "epoch": 1, "val_miou": 0.5, "train_loss": 0.1}
TALLY = {"step": 1, "images": 2, "skipped": 0, "sums": torch.zeros(2), "counts": torch.zeros(3, 3)}
PROGRESS = Progress("decoder", 2, 7, 0.5, [RECORD], TALLY).state()


@given(data=st.data())
def test_checkpoints_to_resume(place, data):
    run = place / "run"
    run.mkdir(exist_ok=True)
    for old in [*run.glob("checkpoint_*"), run / "log.jsonl"]:
        old.unlink(missing_ok=True)
    content = {**BUNDLE, "progress": PROGRESS, "trainer": {"optimizer": {}, "scaler": {}}}
    odd = data.draw(altered(content, values | odd_tensors))
    path = write(run / "checkpoint_000000007.pth", saved(odd))
    (run / "log.txt").write_text("")
    net = small_net()
    folder = RunDir.__new__(RunDir)
    folder.path, folder.main, folder.log = run, True, lambda text: None
    stages = [Stage("decoder", "2", 3)]
    course = TrainingRun(net, stages, folder, Checkpoints(run), {}, 1, timer=None)
    found = ends_well(course.resume, path.name)
    if found is not None:
        progress, _ = found
        assert progress.stage == "decoder" and isinstance(progress.epoch, int)
        assert (run / "log.jsonl").exists()


@fewer(2)
@given(data=st.data())
def test_optimizers_to_resume(data):
    model = nn.Conv2d(3, 4, 3, stride=8, padding=1)
    trainer = small_trainer(model=model)
    state = trainer.state_dict()
    odd = data.draw(altered(state, values | odd_tensors))
    tally = data.draw(altered(TALLY, values | odd_tensors))

    def resume() -> None:
        with report_mismatch():
            trainer.load_state_dict(odd)
            trainer.new_epoch_state().restore(tally, trainer.dist_context)

    ends_well(resume, "checkpoint")


# exported files


class Small(EndToEndModel):
    """A network that any format takes."""

    def __init__(self):
        nn.Module.__init__(self)
        self.output = "logits"

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.permute(0, 3, 1, 2).float()[:, :, ::8, ::8] * 2


TOLD = {
    "outputs": 3, "variant": "d20", "pyramid_channels": None, "size": [16, 24],
    "precision": "fp32", "classes": ["a", "b"], "colors": [[1, 2, 3]] * 2,
}  # fmt: skip


def as_metadata(told: dict) -> dict[str, str]:
    return {key: json.dumps(value) for key, value in told.items()}


def write_small(folder: Path, format: str) -> tuple[Path, dict[str, bytes]]:
    """The path of an exported file, and the files that belong to it."""
    row = FORMATS[format]
    for package in row.packages:
        pytest.importorskip(package)
    path = folder / f"net{row.suffix}"
    metadata = as_metadata(TOLD) | {"output": "logits"}
    row.write(Small().eval(), path, ExportOptions((1, 16, 24), metadata=metadata))
    load(path).build_meta_model()
    files = [path.with_suffix(suffix) for suffix in (row.suffix, *row.beside)]
    return path, {file.name: file.read_bytes() for file in files}


@pytest.fixture(scope="module", params=["onnx", "openvino", "torch"])
def exported(request, tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    return write_small(tmp_path_factory.mktemp(request.param), request.param)


@fewer(5)
@given(data=st.data())
def test_exported_files(exported, data):
    path, files = exported
    odd = data.draw(st.sampled_from(sorted(files)))
    for name, content in files.items():
        write(path.with_name(name), data.draw(foreign([content])) if name == odd else content)
    found = ends_well(lambda: load(path), path.name)
    if found is not None:
        ends_well(lambda: found.meta and found.build_meta_model(), path.name)


@given(
    told=altered(TOLD), output=st.sampled_from(["logits", "labels", "", "{"]), deep=st.booleans()
)
def test_what_exported_files_say(told, output, deep):
    told = told if isinstance(told, dict) else {"x": told}
    metadata = as_metadata(told) | {"output": output}
    if deep:
        metadata["size"] = "[" * 100_000
    file = ExportedModel(Path("net.onnx"), "x", ((1, 1),) * 3, metadata, lambda images: images)
    meta = ends_well(lambda: file.meta, "net.onnx")
    if meta is not None:
        assert all(isinstance(side, int) and side > 0 for side in meta["size"])
        ends_well(file.build_meta_model, "net.onnx")


@pytest.fixture(scope="module")
def pt2(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """The path of a .pt2 archive, and its members."""
    path, files = write_small(tmp_path_factory.mktemp("pt2"), "torch")
    return path, parts_of(files[path.name])


tempting = st.sampled_from(
    ["torch.os.system", "torch.hub.load", "_operator.call", "math.exp", "sprung", "10**10**10",
     "torch.ops.aten.from_file.default", "torch.ops.aten.mul.Tensor", "s0", "aten", "#x",
     "__import__('os').system('touch sprung')", "exec(chr(49))"]
)  # fmt: skip


@fewer(5)
@given(data=st.data())
def test_pt2_archive_altered_graph_loads_or_is_refused(pt2, data):
    path, parts = pt2
    name = data.draw(st.sampled_from([name for name in parts if name.endswith(".json")]))
    odd = as_json(data.draw(altered(json.loads(parts[name]), values | tempting)))
    write(path, zip_of({**parts, name: odd}))
    found = ends_well(lambda: load(path), path.name)
    if found is not None:
        ends_well(lambda: found.meta and found.build_meta_model(), path.name)


PICKLED = {"config": {"a": {"path_name": "weight_0", "is_param": True, "use_pickle": True,
                            "tensor_meta": None}}}  # fmt: skip
TREE = '[1, {"type": "%s", "context": %s, "children_spec": []}]'
ENUM = json.dumps('{"\\u005f_enum__": true, "fqn": "antigravity:x", "name": "x"}')
FACTORY = '{"default_factory_module": "antigravity", "default_factory_name": "x"}'


@pytest.mark.parametrize(
    ("member", "content"),
    [
        ("data/sample_inputs/model.pt", pickle.dumps(Trap(Path("sprung"), 0))),
        ("data/weights/model_weights_config.json", as_json(PICKLED)),
        ("data/constants/opaque_obj_0", b""),
        ("data/aotinductor/model/x.so", b"\x7fELF"),
        ("x.json", as_json({"target": "torch.os.system"})),
        ("x.json", as_json({"nested": [{"as_operator": "_operator.call"}]})),
        ("x.json", as_json({"expr_str": "exec(chr(49))"})),
        ("x.json", as_json({"expr_str": "9**9**9"})),
        ("x.json", as_json({"guards_code": ["open('sprung', 'w')"]})),
        ("x.json", as_json({"in_spec": TREE % ("builtins.dict", ENUM)})),
        ("x.json", as_json({"out_spec": TREE % ("collections.defaultdict", FACTORY)})),
        ("MODELS/model.json", b"{}"),
    ],
)
def test_pt2_archive_that_could_run_code_is_refused(pt2, member, content):
    path, parts = pt2
    root = next(iter(parts)).partition("/")[0]
    write(path, zip_of({**parts, f"{root}/{member}": content}))
    with pytest.raises(UserError, match=r"net\.pt2 cannot be opened") as caught:
        load(path)
    assert isinstance(caught.value.__cause__, ValueError | pickle.UnpicklingError)
    write(path, zip_of(parts))
    assert load(path).bounds == ((1, 1), (16, 16), (24, 24))
