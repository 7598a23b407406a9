"""Time of each kind of layer in OpenVINO and ONNX Runtime, by their own counters.

    python benchmarks/layers.py --weights camvid-d20 --json layers.json

The network is exported as the backends do it. A kind is an operation with its kernel size, such as
"Convolution 3x1"; dilated and strided convolutions are kinds of their own. Counters slow a network
down a little: compare the shares.
"""

import json
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from benchmarks._common import Row, add_options, make_parser, print_row, write_record
from lednet.errors import exit_on_user_error
from lednet.exporting.common import ExportOptions, import_optional
from lednet.exporting.formats import FORMATS
from lednet.exporting.openvino import compile_openvino
from lednet.exporting.wrappers import EndToEndModel
from lednet.model import load_model

Times = dict[str, list[float]]
"""Kind of layer -> milliseconds of each run, summed over its layers."""


def convolution_kinds(file: Path) -> dict[str, str]:
    """Name of each convolution's output in an ONNX file -> its kind."""
    onnx = import_optional("onnx")
    model = onnx.load(file)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    kinds = {}
    for node in model.graph.node:
        if node.op_type == "Conv":
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            kernel = "x".join(map(str, shapes[node.input[1]][2:]))
            extras = [
                word
                for word, key in (("dilated", "dilations"), ("strided", "strides"))
                if max(attributes.get(key, [1])) > 1
            ]
            kind = " ".join(["Convolution", kernel, *extras])
            kinds[node.name] = kinds[node.output[0]] = kind
    return kinds


def openvino_times(file: Path, images: np.ndarray, runs: int, kinds: dict[str, str]) -> Times:
    openvino = import_optional("openvino")
    config = {
        "PERF_COUNT": "YES",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = compile_openvino(openvino.Core().read_model(file), config)
    request = compiled.create_infer_request()
    request.infer([images])
    times: Times = defaultdict(list)
    for _ in range(runs):
        request.infer([images])
        sums: dict[str, float] = defaultdict(float)
        for info in request.profiling_info:
            milliseconds = info.real_time.total_seconds() * 1000
            name = next((kinds[part] for part in info.node_name.split("/") if part in kinds), None)
            sums[name or kinds.get(info.node_name, info.node_type)] += milliseconds
        for kind, value in sums.items():
            times[kind].append(value)
    return times


def onnxruntime_times(file: Path, images: np.ndarray, runs: int, kinds: dict[str, str]) -> Times:
    ort = import_optional("onnxruntime")
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(file.with_suffix(""))
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    for _ in range(runs):
        session.run(None, {"image": images})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    times: Times = defaultdict(lambda: [0.0])
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            kind = kinds.get(name, event["args"].get("op_name", "other"))
            times[kind][0] += event["dur"] / 1000 / runs
    return times


def rows(engine: str, times: Times) -> list[Row]:
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    total = sum(medians.values())
    order = sorted(medians, key=lambda kind: -medians[kind])
    return [
        {"engine": engine, "layers": kind, "ms": round(medians[kind], 2),
         "share": round(medians[kind] / total, 3)}
        for kind in order
        if medians[kind] > 0.002 * total
    ]  # fmt: skip


def main() -> None:
    parser = make_parser(__doc__, "--json")
    parser.add_argument("--weights", default="camvid-d20", help="weights")
    add_options(parser, height=(512, "of the input"), width=(1024, "of the input"),
                runs=(20, "after one to warm up"))  # fmt: skip
    args = parser.parse_args()
    net, meta = load_model(args.weights)
    normalization = [meta.get("mean", (0, 0, 0)), meta.get("std", (1, 1, 1))]
    graph = EndToEndModel(net, *normalization).eval()
    shape = (1, args.height, args.width)
    images = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"
        FORMATS["onnx"].write(graph, file, ExportOptions(shape))
        kinds = convolution_kinds(file)
        for engine, measure in (("openvino", openvino_times), ("onnxruntime", onnxruntime_times)):
            found += rows(engine, measure(file, images, args.runs, kinds))
    for row in found:
        print_row(row)
    write_record(args.json, torch.device("cpu"), {"results": found})


if __name__ == "__main__":
    with exit_on_user_error():
        main()
