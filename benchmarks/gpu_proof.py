"""The second leg of `benchmarks/gpu.py`: whether the results on a GPU are right."""

import contextlib
import functools
import importlib
import json
import math
import re
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.gpu_legs import (
    PRECISIONS,
    ROOT,
    Leg,
    NeedsCuda,
    Row,
    float_modes,
    image_folder,
    toy_data,
    trained_network,
)
from benchmarks.gpu_speed import make_trainer, without_dropout
from benchmarks.inference import load_images
from benchmarks.training import KEYS
from lednet.checkpoint import load_checkpoint
from lednet.device import allow_tf32, autocast
from lednet.hub import load_weights
from lednet.inference.backends import is_available
from lednet.inference.predictor import Predictor
from lednet.model import LEDNet
from lednet.training.checkpointing import Checkpoints

TOLERANCES = {"fp32": 1e-4, "tf32": 5e-3, "fp16": 5e-3, "bf16": 5e-2}
"""Of the network's outputs, relative to the largest value. For the last three, about four times
what rounding each operand of the convolutions on a CPU costs."""
EQUAL_LABELS = 0.999
GRADIENT_TOLERANCE = 1e-3
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 2e-3, 0.1
"""Of 20 steps, relative to the loss and to the way that the weights have gone. Rounding alone
makes 5e-5 and 0.01 of it."""


def at_most(value: float, limit: float, **facts: Any) -> Row:
    return {"value": value, "limit": f"<= {limit:g}", "passed": value <= limit, **facts}


def at_least(value: float, limit: float | None, **facts: Any) -> Row:
    if limit is None:
        return {"value": value, **facts}
    return {"value": value, "limit": f">= {limit:g}", "passed": value >= limit, **facts}


def proof(leg: Leg) -> None:
    """Whether the results are right on this device."""
    torch.backends.cudnn.benchmark = False
    checks: list[tuple[str, Callable[[], Row], bool, float]] = []
    for variant in ("d20", "d128"):
        committed = partial(committed_error, leg, variant)
        checks.append((f"tests/golden {variant} fp32", committed, False, 1.0))
        for precision in PRECISIONS if leg.args.golden else ():
            error = partial(golden_error, leg, variant, precision)
            checks.append((f"golden {variant} {precision}", error, precision != "fp32", 1.0))
    checks += [
        ("gradients of a step, fp32", partial(gradient_error, leg), False, 5.0),
        ("folded against plain, fp32", partial(fold_error, leg), False, 2.0),
        ("captured step against eager, fp32", partial(captured_error, leg), True, 5.0),
    ]
    compare = LabelComparison(leg)
    for backend, precision in PREDICTORS:
        gpu_only = (backend, precision) != ("eager", "fp32")
        needs = 30.0 if backend == "compiled" else 3.0
        name = f"Predictor {backend} {precision}"
        checks.append((name, partial(compare, backend, precision), gpu_only, needs))
    with background_checks(leg) as background:
        for name, check, gpu_only, needs in checks:
            leg.measure(name, check, cuda=gpu_only, needs=needs, limit=90.0)
            collect(leg, background)
        collect(leg, background, wait=True)


PREDICTORS = (
    *product(("eager",), PRECISIONS), ("onnxruntime", "fp32"),
    *product(("compiled",), ("fp32", "bf16", "tf32", "fp16")),  # half a minute each
)  # fmt: skip


def collect(leg: Leg, checks: dict[str, Future[Row]], wait: bool = False) -> None:
    """Keep the rows of the background checks that have ended, or of all."""
    for name, check in list(checks.items()):
        if wait or check.done():
            patience = max(leg.left() - 1, 1)
            leg.measure(name, partial(check.result, patience), limit=patience + 5, needs=-60.0)
            del checks[name]


def relative_error(found: Tensor | np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest value."""
    array = found.detach().float().cpu().numpy() if isinstance(found, Tensor) else found
    return float(np.abs(array - expected).max() / np.abs(expected).max())


def committed_error(leg: Leg, variant: str) -> Row:
    """The network under weights by formula, against the file in tests/golden."""
    formula = runpy.run_path(str(ROOT / "tests/make_golden.py"))
    reference = np.load(ROOT / f"tests/golden/{variant}.npz")
    net = LEDNet(20, variant).eval()
    net.load_state_dict(formula["formula_state"](net))
    net.to(leg.device)
    with torch.inference_mode(), float_modes(leg.device, "fp32"):
        image = formula["formula_image"]().to(leg.device)
        errors = [
            relative_error(net(image)[:, :, ::4, ::4], reference["logits"]),
            relative_error(net.encoder_stage()(image), reference["encoder_logits"]),
        ]
    return at_most(max(errors), TOLERANCES["fp32"])


def golden_error(leg: Leg, variant: str, precision: str) -> Row:
    """The network against the reference implementation's outputs."""
    folder: Path = leg.args.golden
    reference = np.load(folder / f"official_{variant}_outputs.npz")
    net = LEDNet(20, variant)
    load_weights(net, folder / f"official_{variant}_model_best.pth")
    net.to(leg.device).eval()
    pixels = np.array(Image.open(folder / "input_512x1024.png").convert("RGB"))
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(leg.device).float() / 255
    with torch.inference_mode(), autocast(leg.device, precision):
        features = net.encoder(image)
        outputs = {
            "encoder_logits": net.encoder_head(features),
            "apn_logits": net.decoder(features),
            "logits_4x4_stride": (logits := net(image))[:, :, ::4, ::4],
        }
    errors = {key: relative_error(output, reference[key]) for key, output in outputs.items()}
    equal = (logits.argmax(1).cpu().numpy() == reference["argmax"]).mean()
    return at_most(max(errors.values()), TOLERANCES[precision], equal_labels=float(equal))


def gradient_error(leg: Leg) -> Row:
    """Gradients of a training step, against those in float64 on the CPU; dropout is off.

    The weights are trained ones: of fresh ones, rounding alone changes the gradients by 1 %.
    """
    size = (64, 128) if leg.dry else (256, 512)
    images = load_images(image_folder(leg.args), size, 2).float() / 255
    target = torch.randint(0, 20, (2, *size), generator=torch.Generator().manual_seed(1))

    def gradients(device: torch.device, dtype: torch.dtype) -> Tensor:
        net, _ = trained_network(leg.args)
        without_dropout(net).to(device, dtype).train()
        net.encoder_head.requires_grad_(False)
        if device.type == "cuda":
            allow_tf32(False)
        F.cross_entropy(
            net(images.to(device, dtype)), target.to(device) % net.num_classes
        ).backward()
        parts = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
        return torch.cat(parts).double().cpu()

    cpu = torch.device("cpu")
    exact = gradients(cpu, torch.float64)
    errors = [
        ((gradients(device, torch.float32) - exact).norm() / exact.norm()).item()
        for device in (leg.device, cpu)
    ]
    limit = max(GRADIENT_TOLERANCE, 5 * errors[1])
    return at_most(errors[0], limit, note=f"the CPU's in float32: {errors[1]:.1e}")


def fold_error(leg: Leg) -> Row:
    """Logits of the folded network without channel shuffles, against the plain one's."""
    net, normalization = trained_network(leg.args)
    size = (64, 128) if leg.dry else (512, 1024)
    images = load_images(image_folder(leg.args), size, 1)
    plain, folded = (
        Predictor(net, size, **normalization, device=leg.device, fold=fold).scores(images)
        for fold in (False, True)
    )
    equal = (plain.argmax(1) == folded.argmax(1)).float().mean().item()
    error = relative_error(folded, plain.cpu().numpy())
    return at_most(error, TOLERANCES["fp32"], equal_labels=equal)


class LabelComparison:
    """Label maps of `Predictor` here, against those of the CPU."""

    def __init__(self, leg: Leg):
        self.leg = leg
        self.size = (64, 128) if leg.dry else (512, 1024)

    @functools.cached_property
    def images(self) -> Tensor:
        return load_images(image_folder(self.leg.args), self.size, 1 if self.leg.dry else 4)

    def labels(self, device: torch.device, backend: str, precision: str) -> Tensor:
        net, normalization = trained_network(self.leg.args)
        predictor = Predictor(
            net, self.size, **normalization, device=device, backend=backend, precision=precision
        )
        return torch.cat([predictor.label_maps(image[None])[0].cpu() for image in self.images])

    @functools.cached_property
    def expected(self) -> Tensor:
        return self.labels(torch.device("cpu"), "eager", "fp32")

    def __call__(self, backend: str, precision: str) -> Row:
        if backend == "onnxruntime":
            if not is_available(backend, self.leg.device):
                return {"note": "not installed"}
            providers = importlib.import_module("onnxruntime").get_available_providers()
            if "CUDAExecutionProvider" not in providers:
                return {"note": "onnxruntime has no CUDA provider here"}
        found = self.labels(self.leg.device, backend, precision)
        equal = (found == self.expected).double().mean().item()
        return at_least(equal, EQUAL_LABELS if precision == "fp32" else None)


class Batches(list):
    """Batches in place of a loader."""

    def __init__(self, batches: Sequence[tuple[Tensor, Tensor]]):
        super().__init__(batches)
        self.sampler = range(sum(len(images) for images, _ in batches))


def captured_error(leg: Leg, steps: int = 20) -> Row:
    """Losses of training steps that are replayed as a CUDA graph, against eager ones.

    They start from trained weights and train on the network's own labels: from fresh weights,
    rounding alone changes the losses by a percent within a few steps.
    """
    net, _ = trained_network(leg.args)
    images = load_images(image_folder(leg.args), (64, 128), 4)
    with torch.no_grad():
        labels = net(images.float() / 255).argmax(1).to(torch.uint8)
    labels[labels == net.num_classes - 1] = 255
    pairs = [(images, labels), (images.flip(3), labels.flip(2))]
    batches = Batches([pairs[step % 2] for step in range(steps)])

    def losses(cuda_graph: bool) -> tuple[Tensor, Tensor]:
        trainer = make_trainer(
            leg.device, net.num_classes - 1, dropout=False, lr=1e-4, ema_decay=0.9,
            cuda_graph=cuda_graph,
        )  # fmt: skip
        trainer.model.load_state_dict(net.state_dict())
        tally, sums = trainer.new_epoch_state(), [torch.zeros(2, device=leg.device)]
        trainer.train_one_epoch(
            batches,  # type: ignore[arg-type]  # has what is needed of a loader
            "steps", KEYS, tally, after_step=lambda: sums.append(tally.sums.clone()),
        )  # fmt: skip
        steps = torch.stack(sums).diff(dim=0).cpu()
        weights = [p.detach().flatten() for p in trainer.eval_model.parameters()]
        return steps[:, 0] / steps[:, 1], torch.cat(weights).cpu()

    before = torch.cat([p.detach().flatten() for p in net.parameters()])
    (expected, eager), (found, captured) = losses(False), losses(True)
    error = ((found - expected).abs() / expected).max().item()
    moved = ((captured - eager).norm() / (eager - before).norm()).item()
    row = at_most(error, LOSS_TOLERANCE, note=f"averaged weights' changes differ by {moved:.1%}")
    return row | {"passed": row["passed"] and moved <= WEIGHT_TOLERANCE}


@contextlib.contextmanager
def background_checks(leg: Leg) -> Iterator[dict[str, Future[Row]]]:
    """Checks that run scripts as a user would, beside those of this process."""
    jobs: dict[str, Callable[[], Row]] = {
        "killed run resumes, --deterministic": partial(resumed_difference, leg, True),
        "killed run resumes": partial(resumed_difference, leg, False),
        "fp16, scaler, EMA, SyncBN": partial(fp16_run, leg),
        "pytest -m gpu": partial(gpu_tests, leg),
    }
    if leg.dry:
        del jobs["killed run resumes"]  # the same on a CPU
    if leg.args.only:
        jobs = {name: job for name, job in jobs.items() if re.search(leg.args.only, name)}
    if jobs:
        toy_data(leg.args)
    pool = ThreadPoolExecutor(2 if leg.dry else len(jobs) or 1)
    try:
        yield {name: pool.submit(job) for name, job in jobs.items()}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def toy_command(leg: Leg, folder: Path, *flags: str) -> list[str]:
    """A short training of stage 2 on toy data."""
    command = ["train/main.py", "--datadir", str(toy_data(leg.args)), "--savedir", str(folder)]
    command += ["--height", "64", "--width", "128", "--batch-size", "2", "--num-workers", "0"]
    command += ["--num-epochs", "2" if leg.dry else "3", "--decoder", "--no-iouTrain"]
    command += ["--augment", "modern", "--device", leg.device.type, *flags]
    return command


def start(words: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(leg: Leg, process: subprocess.Popen[str], must_succeed: bool = True) -> str:
    """Output of a process, which gets the time that is left."""
    try:
        output = process.communicate(timeout=max(leg.left() - 3, 1))[0]
    except subprocess.TimeoutExpired:
        process.kill()
        print(process.communicate()[0], flush=True)
        raise
    if process.returncode:
        print(output, flush=True)
        if must_succeed:
            text = " ".join(output.split())[-200:]
            raise RuntimeError(f"exit status {process.returncode}: {text}")
    return output


def resumed_difference(leg: Leg, deterministic: bool) -> Row:
    """Final weights of a run that is killed and resumed, against those of one left alone."""
    work = tempfile.TemporaryDirectory(dir=leg.args.work, ignore_cleanup_errors=True)
    with work as name, contextlib.ExitStack() as ending:
        whole, killed = Path(name) / "whole", Path(name) / "killed"
        flags = ["--save-steps", "3"] + ["--deterministic"] * deterministic
        alone = start(toy_command(leg, whole, *flags))
        victim = start(toy_command(leg, killed, *flags))
        for process in (alone, victim):
            ending.callback(process.kill)
        while victim.poll() is None and not Checkpoints(killed).paths():
            time.sleep(0.01)
        if victim.poll() is not None:
            finish(leg, victim)
            raise RuntimeError("the run ended before it could be killed")
        victim.kill()
        victim.communicate()
        at = int(Checkpoints(killed).paths()[0].stem[-9:])
        finish(leg, start([*toy_command(leg, killed, *flags), "--resume"]))
        finish(leg, alone)
        states = [
            load_checkpoint(Checkpoints(folder).paths()[0])["state_dict"]
            for folder in (whole, killed)
        ]
    differences = [(states[0][key].double() - states[1][key].double()).abs() for key in states[0]]
    largest = max(part.max().item() for part in differences)
    row = at_most(largest, 0.0) if deterministic or not leg.cuda else {"value": largest}
    return row | {"note": f"largest difference of weights; killed at step {at}"}


def fp16_run(leg: Leg) -> Row:
    """A run in fp16 with loss scaling, moving average and synchronised batch norm."""
    if not leg.cuda:
        raise NeedsCuda
    with tempfile.TemporaryDirectory(dir=leg.args.work) as name:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
        flags = ["--precision", "fp16", "--ema-decay", "0.9", "--sync-batch-norm"]
        finish(leg, start([*launcher, *toy_command(leg, Path(name) / "run", *flags)]))
        lines = (Path(name) / "run/log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["train_loss"] for line in lines]
    last: float = losses[-1]
    return {"value": last, "limit": "finite", "passed": math.isfinite(last), "note": "last loss"}


def gpu_tests(leg: Leg) -> Row:
    """The project's tests that need a GPU."""
    files = [str(p) for p in sorted((ROOT / "tests").glob("test_*.py"))
             if "mark.gpu" in p.read_text(encoding="utf-8")]  # fmt: skip
    command = ["-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    process = start([*command, "--continue-on-collection-errors", *files])
    output = finish(leg, process, must_succeed=False)
    summary = output.strip().splitlines()[-1].strip("= ") if output.strip() else "no output"
    return {"value": summary, "limit": "all pass", "passed": process.returncode == 0}
