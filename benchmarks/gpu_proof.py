"""The second leg of `benchmarks/gpu.py`: whether the results on a GPU are right."""

import contextlib
import importlib
import math
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks._common import ROOT, Row, tf32_mode
from benchmarks.gpu_legs import Leg, image_folder, toy_data, trained_network
from benchmarks.inference import load_images
from benchmarks.training import KEYS, Batches, make_trainer, without_dropout
from lednet.checkpoint import load_checkpoint
from lednet.device import allow_tf32, autocast
from lednet.hub import load_weights
from lednet.inference.backends import is_available
from lednet.inference.predictor import Predictor
from lednet.model import LEDNet
from lednet.training.checkpointing import Checkpoints

sys.path.insert(0, str(ROOT / "tests"))

from fault_injection import Run, Site, complete

CPU = torch.device("cpu")
VARIANTS = ("d20", "d128")
TOLERANCES = {"fp32": 1e-4, "tf32": 5e-3, "bf16": 5e-2, "fp16": 5e-3}
"""Largest error of the network's outputs, relative to the largest value. For the last three,
about four times the error of rounding each operand of the convolutions on a CPU."""
EQUAL_LABELS = 0.999
GRADIENT_TOLERANCE = 1e-3
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 2e-3, 0.1
"""Largest errors after 20 steps, relative to the loss and to the change of the weights. Rounding
alone causes 5e-5 and 0.01."""
FP16_FLAGS = ("--precision", "fp16", "--ema-decay", "0.9", "--sync-batch-norm")


def at_most(value: float, limit: float, **facts: Any) -> Row:
    return {"value": value, "limit": f"<= {limit:g}", "passed": value <= limit, **facts}


def proof(leg: Leg) -> None:
    """Check the results on this device."""
    torch.backends.cudnn.benchmark = False
    pool = ThreadPoolExecutor(2 if leg.dry else 4)
    background = start_background_checks(leg, pool)

    def check(
        name: str, error: Callable[..., Row], *words: str, cuda: bool = False, needs: float = 1.0
    ) -> None:
        leg.measure(name, partial(error, leg, *words), cuda=cuda, needs=needs, limit=90.0)
        collect(leg, background)

    for variant in ("d20", "d128"):
        check(f"tests/golden {variant} fp32", committed_error, variant)
        for precision in TOLERANCES if leg.args.golden else ():
            name, cuda = f"golden {variant} {precision}", precision != "fp32"
            check(name, golden_error, variant, precision, cuda=cuda)
    check("gradients of a step, fp32", gradient_error, needs=5.0)
    check("folded against plain, fp32", fold_error, needs=2.0)
    check("captured step against eager, fp32", captured_error, cuda=True, needs=5.0)
    for precision in TOLERANCES:
        name = f"Predictor eager {precision}"
        check(name, predictor_error, "eager", precision, cuda=precision != "fp32", needs=3.0)
    others = (("onnxruntime", "fp32"), *(("compiled", precision) for precision in TOLERANCES))
    for backend, precision in others:  # compilation takes half a minute
        name, needs = f"Predictor {backend} {precision}", 30.0 if backend == "compiled" else 3.0
        check(name, predictor_error, backend, precision, cuda=True, needs=needs)
    collect(leg, background, wait=True)
    pool.shutdown(wait=False, cancel_futures=True)


def collect(leg: Leg, checks: dict[str, Future[Row]], wait: bool = False) -> None:
    """Keep the rows of the background checks that have ended, or of all."""
    for name, check in list(checks.items()):
        if wait or check.done():
            seconds = max(leg.left() - 1, 1)
            leg.measure(name, partial(check.result, seconds), limit=seconds + 5, needs=-60.0)
            del checks[name]


def relative_error(found: Tensor, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest value."""
    difference = np.abs(found.detach().float().cpu().numpy() - expected)
    return float(difference.max() / np.abs(expected).max())


def committed_error(leg: Leg, variant: str) -> Row:
    """The network with weights by a formula, against the file in tests/golden."""
    formula = runpy.run_path(str(ROOT / "tests/make_golden.py"))
    reference = np.load(ROOT / f"tests/golden/{variant}.npz")
    net = LEDNet(20, variant).eval()
    net.load_state_dict(formula["formula_state"](net))
    net.to(leg.device)
    with torch.inference_mode(), tf32_mode(leg.device, "fp32"):
        image = formula["formula_image"]().to(leg.device)
        logits = relative_error(net(image)[:, :, ::4, ::4], reference["logits"])
        encoder = relative_error(net.encoder_stage()(image), reference["encoder_logits"])
    return at_most(max(logits, encoder), TOLERANCES["fp32"])


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
    error = max(relative_error(output, reference[key]) for key, output in outputs.items())
    equal = (logits.argmax(1).cpu().numpy() == reference["argmax"]).mean()
    return at_most(error, TOLERANCES[precision], equal_labels=float(equal))


def gradient_error(leg: Leg) -> Row:
    """Gradients of a training step without dropout, against those in float64 on the CPU.

    The weights are trained ones: with fresh ones, rounding alone changes the gradients by 1 %.
    """
    size = (64, 128) if leg.dry else (256, 512)
    images = load_images(image_folder(leg.args), size, 2).float() / 255
    target = torch.randint(0, 20, (2, *size), generator=torch.Generator().manual_seed(1))

    def gradients(device: torch.device, dtype: torch.dtype) -> Tensor:
        net, _ = trained_network(leg.args)
        without_dropout(net).to(device, dtype).train()
        net.encoder_head.requires_grad_(False)
        allow_tf32(False)
        logits = net(images.to(device, dtype))
        F.cross_entropy(logits, target.to(device) % net.num_classes).backward()
        parts = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
        return torch.cat(parts).double().cpu()

    exact = gradients(CPU, torch.float64)
    error, cpu_error = (
        ((gradients(device, torch.float32) - exact).norm() / exact.norm()).item()
        for device in (leg.device, CPU)
    )
    limit = max(GRADIENT_TOLERANCE, 5 * cpu_error)
    return at_most(error, limit, note=f"the CPU's in float32: {cpu_error:.1e}")


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


@lru_cache(maxsize=1)
def cpu_labels(leg: Leg) -> Tensor:
    return labels(leg, CPU, "eager", "fp32")


def labels(leg: Leg, device: torch.device, backend: str, precision: str) -> Tensor:
    """Label maps of `Predictor` for some images of the data set."""
    size, count = ((64, 128), 1) if leg.dry else ((512, 1024), 4)
    images = load_images(image_folder(leg.args), size, count)
    net, normalization = trained_network(leg.args)
    predictor = Predictor(
        net, size, **normalization, device=device, backend=backend, precision=precision
    )
    return torch.cat([predictor.label_maps(image[None])[0].cpu() for image in images])


def predictor_error(leg: Leg, backend: str, precision: str) -> Row:
    """Label maps of `Predictor` on this device, against those of the CPU."""
    if backend == "onnxruntime":
        if not is_available(backend, leg.device):
            return {"note": "not installed"}
        providers = importlib.import_module("onnxruntime").get_available_providers()
        if "CUDAExecutionProvider" not in providers:
            return {"note": "onnxruntime has no CUDA provider here"}
    found = labels(leg, leg.device, backend, precision)
    equal = (found == cpu_labels(leg)).double().mean().item()
    if precision != "fp32":
        return {"value": equal}
    return {"value": equal, "limit": f">= {EQUAL_LABELS}", "passed": equal >= EQUAL_LABELS}


def captured_error(leg: Leg, steps: int = 20) -> Row:
    """Losses of training steps that are replayed as a CUDA graph, against eager ones.

    They start from trained weights, with the network's own labels as targets: from fresh
    weights, rounding alone changes the losses by a percent within a few steps.
    """
    net, _ = trained_network(leg.args)
    images = load_images(image_folder(leg.args), (64, 128), 4)
    with torch.no_grad():
        targets = net(images.float() / 255).argmax(1).to(torch.uint8)
    targets[targets == net.num_classes - 1] = 255
    pairs = [(images, targets), (images.flip(3), targets.flip(2))]
    batches = Batches([pairs[step % 2] for step in range(steps)])

    def losses(cuda_graph: bool) -> tuple[Tensor, Tensor]:
        trainer = make_trainer(
            leg.device, net.num_classes - 1, "modern", dropout=False, lr=1e-4, ema_decay=0.9,
            cuda_graph=cuda_graph,
        )  # fmt: skip
        trainer.model.load_state_dict(net.state_dict())
        state, sums = trainer.new_epoch_state(), [torch.zeros(2, device=leg.device)]

        def keep_sums() -> None:
            sums.append(state.sums.clone())

        trainer.train_one_epoch(batches, "steps", KEYS, state, after_step=keep_sums)  # type: ignore[arg-type]
        differences = torch.stack(sums).diff(dim=0).cpu()
        weights = [p.detach().flatten() for p in trainer.eval_model.parameters()]
        return differences[:, 0] / differences[:, 1], torch.cat(weights).cpu()

    before = torch.cat([p.detach().flatten() for p in net.parameters()])
    (expected, eager), (found, captured) = losses(False), losses(True)
    error = ((found - expected).abs() / expected).max().item()
    moved = ((captured - eager).norm() / (eager - before).norm()).item()
    row = at_most(error, LOSS_TOLERANCE, note=f"averaged weights' changes differ by {moved:.1%}")
    return row | {"passed": row["passed"] and moved <= WEIGHT_TOLERANCE}


# Checks that run scripts as a user would, in the background of the others


def start_background_checks(leg: Leg, pool: ThreadPoolExecutor) -> dict[str, Future[Row]]:
    jobs: dict[str, Callable[[], Row]] = {
        "killed run resumes, --deterministic": partial(resumed_difference, leg, True),
        "killed run resumes": partial(resumed_difference, leg, False),
        "fp16, scaler, EMA, SyncBN": partial(finite_run, leg, *FP16_FLAGS),
        "pytest -m gpu": partial(gpu_tests, leg),
    }
    if leg.dry:
        del jobs["killed run resumes"]  # the same on a CPU
    jobs = {name: job for name, job in jobs.items() if re.search(leg.args.only or "", name)}
    if jobs:
        toy_data(leg.args)
    return {name: pool.submit(job) for name, job in jobs.items()}


@contextlib.contextmanager
def toy_runs(leg: Leg, *names: str) -> Iterator[list[Site]]:
    """Sites of short trainings of stage 2 on toy data."""
    with tempfile.TemporaryDirectory(dir=leg.args.work, ignore_cleanup_errors=True) as folder:
        flags = ("--height", 64, "--width", 128, "--num-workers", 0, "--augment", "modern",
                 "--decoder", "--device", leg.device.type)  # fmt: skip
        epochs = 2 if leg.dry else 3
        yield [Site(toy_data(leg.args), Path(folder) / name, epochs, flags) for name in names]


def resumed_difference(leg: Leg, deterministic: bool) -> Row:
    """Final weights of a run that is killed and resumed, against those of an uninterrupted one."""
    flags = ("--save-steps", 3, *["--deterministic"] * deterministic)
    with toy_runs(leg, "whole", "killed") as (whole, killed):
        other, run = (Run(site, *flags) for site in (whole, killed))
        run.wait_for_steps()
        run.abandon()
        step = killed.step()
        complete(killed, *flags)
        other.finish()
        expected, found = (
            load_checkpoint(Checkpoints(site.folder).paths()[0])["state_dict"]
            for site in (whole, killed)
        )
    largest = max((found[key].double() - expected[key].double()).abs().max() for key in expected)
    row = at_most(largest.item(), 0.0, note=f"difference of weights; killed at step {step}")
    if leg.cuda and not deterministic:
        del row["passed"], row["limit"]
    return row


def finite_run(leg: Leg, *flags: str) -> Row:
    """The last loss of a run on a GPU that torchrun starts; train/main.py must take its flags."""
    if not leg.cuda:
        return {"note": "needs CUDA"}
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1")
    with toy_runs(leg, "run") as (site,):
        complete(site, *flags, launcher=launcher)
        log, loss = (site.folder / "log.txt").read_text(), site.records()[-1]["train_loss"]
    passed = math.isfinite(loss) and "--cuda-graph:" not in log  # steps that were not captured
    return {"value": loss, "limit": "finite", "passed": passed, "note": "last loss"}


def gpu_tests(leg: Leg) -> Row:
    """The project's tests that need a GPU."""
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py"))
             if "mark.gpu" in path.read_text(encoding="utf-8")]  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--continue-on-collection-errors", *files], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=max(leg.left() - 3, 1),
    )  # fmt: skip
    if done.returncode:
        print(done.stdout, flush=True)
    summary = (done.stdout.strip() or "no output").splitlines()[-1].strip("= ")
    return {"value": summary, "limit": "all pass", "passed": done.returncode == 0}
