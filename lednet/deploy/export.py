"""Files of a network that run without this repository, and the gate that each must pass.

A file holds the network with its pre- and post-processing: images (N, H, W, 3) uint8 RGB
go in as "image"; "labels" (N, H, W) uint8 or "logits" (N, C, ceil(H/8), ceil(W/8)) float32
come out. Batch norm is folded, and what a user of the file has to know (classes, colours,
size) is inside it.

    net, meta = load_network("save/run")
    parity = export(net, meta, "street.onnx", "onnx", (512, 1024), batches)
    label_map = load("street.onnx")(images)

The packages of a format are imported when it is used: see requirements-deploy.txt.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import lednet
from lednet.deploy.graph import BytesToLabels, BytesToLogits
from lednet.errors import UserError
from lednet.files import write_atomically
from lednet.model import LEDNet, resize

OUTPUTS = {"labels": BytesToLabels, "logits": BytesToLogits}
"""Name of a file's output -> the module that computes it."""

TRACED_SIZE = (160, 224)
"""(height, width) in pixels of the example that a dynamic graph is traced with."""

MIN_TRACED_SIDE = 65
"""From here on no level of the pyramid is a single pixel, which is traced differently."""

MIN_OPENVINO_SIDE = 8
"""OpenVINO 2026.4 answers with the image before, or nothing, for sides of one or two pixels."""

Bounds = tuple[int, int | None]
"""Least and largest length of an axis; None where nothing bounds it."""


class ParityError(Exception):
    """An exported file answers otherwise than the network; one sentence with the numbers."""


@dataclass(frozen=True)
class Parity:
    """How closely a file answers as its network does.

    Attributes:
        agreement: share of the pixels with the same class.
        max_difference: largest difference of two logits, relative to the network's
            largest; None if no logits were compared.
        images: how many were compared.
    """

    agreement: float
    max_difference: float | None
    images: int


@dataclass(frozen=True)
class Exported:
    """An exported file in its own runtime: call it with images (N, H, W, 3) uint8 RGB.

    Attributes:
        bounds: of batch, height and width.
        metadata: as `describe` wrote it.
        run: what answers, once the images are known to fit.
    """

    path: Path
    bounds: tuple[Bounds, Bounds, Bounds]
    metadata: dict[str, str]
    run: Callable[[np.ndarray], np.ndarray]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Labels (N, H, W) uint8 or logits (N, C, ceil(H/8), ceil(W/8)) float32.

        Raises:
            UserError: not uint8 RGB images, or of a size that the file does not take.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise UserError(
                f"{self.path} takes images (N, H, W, 3) of bytes, not {images.dtype} of shape "
                f"{images.shape}: convert them to 8-bit RGB"
            )
        if not all(
            least <= length and (most is None or length <= most)
            for length, (least, most) in zip(images.shape, self.bounds, strict=False)
        ):
            taken = [
                f"{least}" if most == least else f"{least} or more" for least, most in self.bounds
            ]
            raise UserError(
                f"{self.path} takes batch {taken[0]}, height {taken[1]} and width {taken[2]}, not "
                f"{' x '.join(map(str, images.shape[:3]))}: resize the images, or export for "
                "their size or with --dynamic"
            )
        return self.run(np.ascontiguousarray(images))


def _import(name: str) -> ModuleType:
    """An optional package.

    Raises:
        UserError: not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.split(".")[0]
        raise UserError(f"{package} is not installed: pip install {package}") from error


def describe(net: LEDNet, meta: dict, size: tuple[int, int], output: str) -> dict[str, str]:
    """What a file says about itself; every value but the plain names is JSON.

    Args:
        meta: of the weights, as `load_network` returned it; what it lacks is left out.
        size: (height, width) in pixels that the network is meant to work at.
        output: a key of `OUTPUTS`.
    """
    told = {
        "outputs": net.num_classes,
        "size": list(size),
        **{key: meta[key] for key in ("classes", "colors") if key in meta},
        **{key: list(value) for key, value in _normalization(meta).items()},
    }
    names = {"lednet": lednet.__version__, "output": output}
    if "dataset" in meta:
        names["dataset"] = str(meta["dataset"])
    return names | {key: json.dumps(value) for key, value in told.items()}


def _normalization(meta: dict) -> dict[str, Sequence[float]]:
    return {"mean": meta.get("mean", (0, 0, 0)), "std": meta.get("std", (1, 1, 1))}


def _trace(module: BytesToLogits, size: tuple[int, int], dynamic: bool) -> ExportedProgram:
    """The graph of `module` for one image of `size`, or for any batch and size."""
    batch, options = 1, {}
    if dynamic:
        # That both halves of a downsampler have one size is beyond the tracer's algebra;
        # it becomes a check at run time instead of a refusal.
        deferred = "prefer_deferred_runtime_asserts_over_guards"
        if deferred not in inspect.signature(torch.export.export).parameters:
            raise UserError(f"--dynamic needs a torch newer than {torch.__version__}: update it")
        sides = {1: Dim("height", min=MIN_TRACED_SIDE), 2: Dim("width", min=MIN_TRACED_SIDE)}
        options = {"dynamic_shapes": ({0: Dim("batch", min=1), **sides},), deferred: True}
        batch, size = 2, TRACED_SIZE
    example = torch.zeros(batch, *size, 3, dtype=torch.uint8)
    # Wrapped, because torch 2.6 gives a buffer of the outermost module and the operation
    # of its name, "mean", one name in ONNX.
    wrapped = nn.Sequential(module).eval()
    with torch.no_grad():
        program = torch.export.export(wrapped, (example,), strict=False, **options)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def _output_name(module: BytesToLogits) -> str:
    return "labels" if isinstance(module, BytesToLabels) else "logits"


def export_onnx(
    module: BytesToLogits,
    path: str | os.PathLike,
    size: tuple[int, int],
    dynamic: bool = False,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write an ONNX file with its weights inside.

    Args:
        module: one of `OUTPUTS`, on the CPU.
        size: (height, width) in pixels of the one image that the file takes.
        dynamic: take any batch, height and width instead.
        metadata: written to the file's metadata_props.

    Raises:
        UserError: a package is missing.
    """
    onnx, _ = _import("onnx"), _import("onnxscript")
    program = _trace(module, size, dynamic)
    options = {}
    if dynamic:  # names the axes
        options["dynamic_shapes"] = ({0: "batch", 1: "height", 2: "width"},)
    model = torch.onnx.export(
        program,
        program.example_inputs[0],
        dynamo=True,
        input_names=["image"],
        output_names=[_output_name(module)],
        verbose=False,
        **options,
    ).model_proto
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.input):
        del part.metadata_props[:]  # the exporter's own notes, an eighth of the file
    onnx.helper.set_model_props(model, metadata or {})
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def load_onnx(
    path: str | os.PathLike, threads: int | None = None, device: str = "auto"
) -> Exported:
    """Open an ONNX file of `export_onnx` in onnxruntime.

    Args:
        threads: of one answer on a CPU; None leaves it to the runtime.
        device: "cpu", or "auto" for CUDA where this onnxruntime has it.

    Raises:
        UserError: no such file, or onnxruntime is missing.
    """
    ort = _import("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    providers = ["CPUExecutionProvider"]
    if device == "auto" and "CUDAExecutionProvider" in ort.get_available_providers():
        providers.insert(0, "CUDAExecutionProvider")
    with _opening(path):
        session = ort.InferenceSession(str(path), options, providers=providers)
    image = session.get_inputs()[0]
    bounds = tuple((n, n) if isinstance(n, int) else (1, None) for n in image.shape[:3])
    metadata = dict(session.get_modelmeta().custom_metadata_map)
    return Exported(
        Path(path), bounds, metadata, lambda images: session.run(None, {image.name: images})[0]
    )


def export_openvino(
    module: BytesToLogits,
    path: str | os.PathLike,
    size: tuple[int, int],
    dynamic: bool = False,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write an OpenVINO IR, `path` ending in .xml and the weights beside it in .bin.

    The weights stay float32. An application that wants these very answers also sets
    INFERENCE_PRECISION_HINT to f32: some CPUs compute in bfloat16 otherwise.

    Args:
        module, size, metadata: as of `export_onnx`; metadata goes to the rt_info "lednet".
        dynamic: take any batch, and sides from `MIN_OPENVINO_SIDE` pixels.

    Raises:
        UserError: a package is missing.
    """
    openvino = _import("openvino")
    with tempfile.TemporaryDirectory() as folder:
        onnx_file = Path(folder) / "network.onnx"
        export_onnx(module, onnx_file, size, dynamic)
        model = openvino.Core().read_model(onnx_file)
        if dynamic:
            side = openvino.Dimension(MIN_OPENVINO_SIDE, -1)
            model.reshape(openvino.PartialShape([openvino.Dimension(1, -1), side, side, 3]))
        for key, value in (metadata or {}).items():
            model.set_rt_info(value, ["lednet", key])
        openvino.save_model(model, path, compress_to_fp16=False)


def compile_openvino(model: Any, device: str = "CPU", config: dict[str, Any] | None = None) -> Any:
    """`openvino.compile_model`, in a thread of its own.

    OpenVINO 2026.4 gives the thread that compiles a signal stack, which is freed with the
    model: were it the main thread, the next signal after that (a finished child process
    is one) would end the program.
    """
    openvino = _import("openvino")
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(openvino.compile_model, model, device, config or {}).result()


def load_openvino(
    path: str | os.PathLike, threads: int | None = None, device: str = "CPU"
) -> Exported:
    """Open an IR of `export_openvino`, in float32 on every CPU.

    Args:
        threads: of one answer; None leaves it to the runtime.
        device: OpenVINO's name of it.

    Raises:
        UserError: no such file, or openvino is missing.
    """
    openvino = _import("openvino")
    config = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        config["INFERENCE_NUM_THREADS"] = threads
    with _opening(path):
        model = openvino.Core().read_model(path)
        request = compile_openvino(model, device, config).create_infer_request()
    lengths = list(model.input(0).partial_shape)[:3]
    bounds = tuple((n.min_length, n.max_length if n.max_length > 0 else None) for n in lengths)
    metadata = {}
    if model.has_rt_info(["lednet"]):
        told = model.get_rt_info(["lednet"]).astype(dict)
        metadata = {key: model.get_rt_info(["lednet", key]).astype(str) for key in told}
    return Exported(Path(path), bounds, metadata, lambda images: request.infer([images])[0].copy())


def export_torch(
    module: BytesToLogits,
    path: str | os.PathLike,
    size: tuple[int, int],
    dynamic: bool = False,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a `torch.export` archive; `torch.export.load(path).module()` runs it.

    Args:
        module, size: as of `export_onnx`.
        dynamic: take any batch, and sides from `MIN_TRACED_SIDE` pixels.
        metadata: written to the archive's extra file "lednet.json".
    """
    program = _trace(module, size, dynamic)
    torch.export.save(program, path, extra_files={"lednet.json": json.dumps(metadata or {})})


def load_torch(path: str | os.PathLike) -> Exported:
    """Open an archive of `export_torch`, on the CPU.

    Raises:
        UserError: no such file, or no such archive.
    """
    extra = {"lednet.json": ""}
    with _opening(path):
        program = torch.export.load(path, extra_files=extra)
    module = program.module()
    image = next(
        node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs
    )

    def bounds(n: Any) -> Bounds:
        if isinstance(n, int):
            return n, n
        return max(1, int(program.range_constraints[n.node.expr].lower)), None

    @torch.no_grad()
    def run(images: np.ndarray) -> np.ndarray:
        return module(torch.from_numpy(images)).numpy()

    metadata = json.loads(extra["lednet.json"] or "{}")
    return Exported(Path(path), tuple(map(bounds, image.meta["val"].shape[:3])), metadata, run)


@contextlib.contextmanager
def _executorch_imports():
    """Turn what executorch raises beside a torch that it was not built for into a sentence."""
    _import("executorch")
    try:
        yield
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"executorch {importlib.metadata.version('executorch')} does not load beside torch "
            f"{torch.__version__}: pip install executorch==1.5.1 torch==2.15.0, which do"
        ) from error


def export_executorch(
    module: BytesToLogits,
    path: str | os.PathLike,
    size: tuple[int, int],
    dynamic: bool = False,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write an ExecuTorch program for phones, its network computed by XNNPACK.

    Args:
        module, size: as of `export_onnx`.
        dynamic: refused: memory is planned for one size.
        metadata: as JSON, what the program's method "metadata" returns.

    Raises:
        UserError: `dynamic`, or executorch is missing or does not fit this torch.
    """
    if dynamic:
        raise UserError("an ExecuTorch file has a fixed size: leave --dynamic out")
    with _executorch_imports():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
    lowered = to_edge_transform_and_lower(
        _trace(module, size, dynamic),
        partitioner=[XnnpackPartitioner()],
        constant_methods={"metadata": json.dumps(metadata or {})},
    )
    with open(path, "wb") as file:
        lowered.to_executorch().write_to_file(file)


def load_executorch(path: str | os.PathLike) -> Exported:
    """Open a program of `export_executorch` in ExecuTorch's runtime for this machine.

    Raises:
        UserError: no such file, or executorch is missing or does not fit this torch.
    """
    with _executorch_imports():
        from executorch.runtime import Runtime
    with _opening(path):
        program = Runtime.get().load_program(Path(path))
        method = program.load_method("forward")
    metadata = {}
    if "metadata" in program.method_names:
        metadata = json.loads(program.load_method("metadata").execute([])[0])
    bounds = tuple((n, n) for n in method.metadata.input_tensor_meta(0).sizes()[:3])

    def run(images: np.ndarray) -> np.ndarray:
        return method.execute([torch.from_numpy(images)])[0].clone().numpy()

    return Exported(Path(path), bounds, metadata, run)


@contextlib.contextmanager
def _opening(path: str | os.PathLike):
    """Name the file when a runtime, each with errors of its own, cannot open it."""
    if not Path(path).is_file():
        raise UserError(f"no exported network at {path}: write it with utils/export_model.py")
    try:
        yield
    except Exception as error:
        raise UserError(
            f"{path} cannot be opened as {Path(path).suffix}: export it again"
        ) from error


class Format(NamedTuple):
    """Row of `FORMATS`.

    Attributes:
        suffix: of its files, by which `load` knows the format.
        packages: what writing and checking it needs, by the names pip knows them by.
        beside: suffixes of further files that belong to one.
    """

    suffix: str
    packages: tuple[str, ...]
    write: Callable[..., None]
    load: Callable[..., Exported]
    beside: tuple[str, ...] = ()


_ONNX = ("onnx", "onnxscript", "onnxruntime")

FORMATS = {
    "onnx": Format(".onnx", _ONNX, export_onnx, load_onnx),
    "openvino": Format(
        ".xml", (*_ONNX[:2], "openvino"), export_openvino, load_openvino, beside=(".bin",)
    ),
    "torch": Format(".pt2", (), export_torch, load_torch),
    "executorch": Format(".pte", ("executorch",), export_executorch, load_executorch),
}


def load(path: str | os.PathLike, **options: Any) -> Exported:
    """Open an exported file of any format in its own runtime.

    Args:
        options: as of the format's own function.

    Raises:
        UserError: no such file, no known suffix, or a package is missing.
    """
    for row in FORMATS.values():
        if Path(path).suffix == row.suffix:
            return row.load(path, **options)
    known = ", ".join(row.suffix for row in FORMATS.values())
    raise UserError(f"{path} is no exported network: give a file that ends in one of {known}")


@torch.no_grad()
def reference_logits(net: LEDNet, images: np.ndarray, meta: dict) -> Tensor:
    """The network's own answer before the last upsampling, as trained and in float32.

    images: (N, H, W, 3) uint8 RGB -> (N, C, ceil(H/8), ceil(W/8))
    """
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).float().view(-1, 1, 1) for v in _normalization(meta).values())
    return net.decoder(net.encoder((x - mean) / std))


def check_parity(
    run: Callable[[np.ndarray], np.ndarray],
    net: LEDNet,
    meta: dict,
    images: Iterable[np.ndarray],
    run_logits: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Parity:
    """Hold an exported file against the unfolded network in PyTorch, on the same bytes.

    Args:
        run: an `Exported` file with either output; of logits, the labels are worked out.
        net: on the CPU, in evaluation mode.
        meta: of the weights, for their normalisation.
        images: batches (N, H, W, 3) uint8 RGB of sizes that the file takes.
        run_logits: a file of the same network with logits, to compare those too.
    """
    equal = pixels = count = 0
    difference, largest = None, 0.0
    for batch in images:
        expected = reference_logits(net, batch, meta)
        labels = resize(expected, batch.shape[1:3]).argmax(dim=1).numpy()
        found = logits = run(batch)
        if found.ndim == 4:
            found = resize(torch.from_numpy(found), batch.shape[1:3]).argmax(dim=1).numpy()
        else:
            logits = run_logits(batch) if run_logits else None
        if logits is not None:
            worst = np.abs(logits - expected.numpy()).max().item()
            difference = max(worst, difference or 0.0)
            largest = max(largest, expected.abs().max().item())
        equal += int((found == labels).sum())
        pixels += labels.size
        count += len(batch)
    if not count:
        raise ValueError("no images to compare")
    if difference is not None:
        difference /= largest or 1.0
    return Parity(equal / pixels, difference, count)


def require_parity(parity: Parity, min_agreement: float, max_difference: float) -> None:
    """
    Raises:
        ParityError: below one threshold or above the other (or not a number).
    """
    if not parity.agreement >= min_agreement:
        raise ParityError(
            f"the exported file agrees with the network in {parity.agreement:.6f} of the pixels "
            f"of {parity.images} images, {min_agreement} is asked for; nothing was written"
        )
    if parity.max_difference is not None and not parity.max_difference <= max_difference:
        raise ParityError(
            f"the exported file's logits differ by {parity.max_difference:.1e} of the largest "
            f"one over {parity.images} images, {max_difference:.1e} is allowed; nothing was written"
        )


def export(
    net: LEDNet,
    meta: dict,
    path: str | os.PathLike,
    format: str,
    size: tuple[int, int],
    images: Iterable[np.ndarray],
    *,
    output: str = "labels",
    dynamic: bool = False,
    min_agreement: float = 0.9999,
    max_difference: float = 1e-3,
) -> Parity:
    """Write `net` to `path`, if the file, run by its own runtime, answers as `net` does.

    For labels, a second file with logits is written to a temporary folder and compared
    as well. Whatever fails, `path` stays as it was.

    Args:
        net: on the CPU, in evaluation mode, as `load_network` returns it with `meta`.
        format: a key of `FORMATS`.
        size: (height, width) in pixels.
        images: to compare on, batches (N, H, W, 3) uint8 RGB: of one image of `size`, or
            for `dynamic` of several sizes.
        output: a key of `OUTPUTS`.
        dynamic: take any batch and size, as far as the format can.
        min_agreement, max_difference: what a `Parity` must reach.

    Raises:
        UserError: a package is missing, another suffix than the format's, or a file that
            cannot be written.
        ParityError: the answers differ.
    """
    row, path = FORMATS[format], Path(path)
    missing = [name for name in row.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the format {format} needs more packages: pip install {' '.join(missing)}")
    if path.suffix != row.suffix:
        raise UserError(f"{path} does not end in {row.suffix}, as a file of {format}: rename it")

    def write(output: str, path: Path) -> Exported:
        module = OUTPUTS[output](net, **_normalization(meta))
        row.write(module, path, size, dynamic, describe(net, meta, size, output))
        return row.load(path, **({"device": "cpu"} if format == "onnx" else {}))

    with contextlib.ExitStack() as stack:
        # Left in the opposite order: what belongs beside the file is in place before it.
        temporary = stack.enter_context(write_atomically(path))
        for suffix in row.beside:
            stack.enter_context(write_atomically(path.with_suffix(suffix)))
        run, run_logits = write(output, temporary), None
        if output != "logits":
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            run_logits = write("logits", Path(folder) / f"logits{row.suffix}")
        parity = check_parity(run, net, meta, images, run_logits)
        require_parity(parity, min_agreement, max_difference)
    return parity
