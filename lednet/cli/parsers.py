"""Command-line flags of the commands, each of which is also a script.

This module is quick to import: it does not import PyTorch.
"""

import argparse
from pathlib import Path

from lednet.cli.common import (
    AUGMENTATIONS,
    COUNT,
    LABEL_ENCODINGS,
    OUTPUTS,
    POSITIVE,
    ROOT,
    VARIANTS,
    add_backend_flags,
    add_dataset_flags,
    add_input_size_flags,
    add_num_workers_flag,
    add_overlay_flags,
    add_test_time_flags,
    at_least,
    make_parser,
    usable_cpus,
)
from lednet.cli.train_args import add_loading_flags, add_recipe_flags, add_run_flags

IMAGE_SIZE = (1024, 2048)
"""(height, width) of a Cityscapes image."""

PREDICT = """Predict images, videos and cameras: label maps, visualizations and class shares.

    python utils/predict.py docs/toy_street.png --weights toy-d20
    python utils/predict.py photos "drive/**/*.jpg" clip.mp4 --weights save/mine --out labelled
    python utils/predict.py camera:0 --outputs side
    torchrun --nproc-per-node=4 utils/predict.py photos --out labelled

Takes image and video files, folders (searched recursively), patterns and, on Linux, cameras.
Videos and cameras need PyAV: pip install av. Files in --out (default: save/predictions):

    <name>_labels.png   class index of each pixel; for a video a folder of them
    <name>_overlay.jpg  image tinted by class, with a legend
    <name>_color.png    class colours                                  (--outputs color)
    <name>_side.jpg     image and class colours side by side           (--outputs side)
    shares.json         share of each class in each image and in all images

For a video, visualizations are .mp4 with its timestamps, and the shares <name>_shares.json.

An interrupted run is resumed by the same command. A camera is recorded until Ctrl-C. Images
that cannot be read are skipped and named at the end, with exit status 2. Speed on two CPU cores:
about 12 images of 480x360 a second with the weights camvid-d20.
"""

EVALUATE = """Score weights on a data set: IoU of each class, mIoU, pixel accuracy.

    python test/eval_iou.py --weights save/cityscapes-d20 --datadir /data/cityscapes
    python test/eval_iou.py --weights best.pth --dataset camvid --datadir /data/camvid

The image is resized to the network's input, and the logits are resized to the label's size before
the argmax. With --eval-size network the labels are resized instead, as during training. Weights of
the original release can be loaded too.
"""

EVALUATE_CITYSCAPES = """Score a network as the Cityscapes benchmark does, and write the upload.

    python test/eval_cityscapes_server.py --weights save/cityscapes-d20 --datadir /data/cityscapes
    python test/eval_cityscapes_server.py --weights save/cityscapes-d20 --datadir /data/cityscapes \
        --subset test
    python test/eval_cityscapes_server.py --predictions results --datadir /data/cityscapes \
        --json scores.json --report report.html

An image takes one to two seconds on two CPU cores at 512x1024. Scores and result file are those of
the official tool (cityscapesscripts). The folder --out receives label-id PNGs under the benchmark's
names, results.json and, for the test split, upload.zip. The same command resumes an interrupted
run.
"""

TRAIN = """Train LEDNet: the encoder on labels at 1/8 size, then the full network.

    python train/main.py --datadir /data/cityscapes
    python train/main.py --datadir /data/cityscapes --curriculum coarse:100,fine:200
    python train/main.py --datadir /data/cityscapes --pretrainedEncoder save/imagenet/encoder.pth
    python train/main.py --dataset camvid --datadir /data/camvid --num-epochs 50
    python train/main.py --savedir cityscapes-d20 --resume
    torchrun --nproc-per-node=4 train/main.py --datadir /data/cityscapes
    torchrun --nproc-per-node=4 --max-restarts=3 train/main.py --savedir long --resume auto

The default is the paper's recipe (train/recipes/paper.yaml): Adam 5e-4, weight decay 1e-4,
poly decay 0.9, 300 epochs, class-weighted cross-entropy, 512x1024. docs/training.md describes the
three ways to train, with their hours and disk space; README.md has the scores to expect. A run
writes to its folder in save/.
"""

PRETRAIN = """Pretrain LEDNet's encoder as a classifier, on ImageNet or any folders of classes.

    python imagenet/lednet_imagenet.py --datadir /data/imagenet
    python imagenet/lednet_imagenet.py --datadir /data/imagenet --recipe modern --precision bf16
    python imagenet/lednet_imagenet.py --savedir imagenet --resume
    python imagenet/lednet_imagenet.py --datadir /data/imagenet --evaluate save/imagenet/best.pth
    torchrun --nproc-per-node=4 imagenet/lednet_imagenet.py --datadir /data/imagenet --batch-size 64

The data are in train/<class>/* and val/<class>/*. The run's folder in save/ then holds
encoder.pth, the best epoch's encoder with its normalization, for

    python train/main.py --datadir /data/cityscapes --pretrainedEncoder save/imagenet/encoder.pth

The default is the paper's recipe: SGD 0.1 with momentum 0.9 and weight decay 1e-4, batch 256,
150 epochs, constant for 15, then times 0.95 an epoch; random crops of 224x224, flipped. "modern":
cosine after a warm-up, label smoothing, mixup, colour jitter, a moving average of the weights.
Hours to expect on ImageNet: docs/training.md. 2,000 small images take minutes on two cores.
"""

EXPORT = """Export a network to a file that runs without this repository, and check its outputs.

    python utils/export_model.py --weights save/cityscapes-d20 --format onnx
    python utils/export_model.py --weights save/cityscapes-d20 --format openvino --dynamic
    python utils/export_model.py --weights save/cityscapes-d20 --format executorch --out net.pte
    python utils/export_model.py --weights save/camvid-d20 --format openvino --output logits \\
        --precision int8 --calibrate /data/camvid/train --dataset camvid --datadir /data/camvid

    pip install ".[deploy]"   # packages of the formats; torch needs none

The file takes RGB images (N, H, W, 3) uint8 of the network's size and returns class indices
(N, H, W) uint8. Files exported with --output logits can be given as --weights to the other
scripts and to `Predictor`. Before the file is moved into place, its output is compared with the
network's in PyTorch: at least 0.9999 of the pixels must agree. Otherwise the exit status is 1 and
nothing is written.

With int8, 0.9 of the pixels must agree, and with --datadir the mIoU on the val images may drop by
half a point at most.

Half a minute on a CPU for a small fixed size, a minute or two for --dynamic, int8 and
executorch.
"""

BENCHMARK = """Measure the speed of a network, alone and from image to label map. No data needed.

    python test/eval_forward_time.py
    python test/eval_forward_time.py --weights save/cityscapes-d20 --precision fp16 --batch-size 8

The same table as test/eval_cityscapes_server.py prints. The images are random, and so are the
weights by default, because they do not change the time. On a CPU half a minute.
"""

CHECK = """Inspect every file of a data set and report what is wrong with it.

    python utils/check_dataset.py --datadir /data/cityscapes
    python utils/check_dataset.py --dataset camvid --datadir /data/camvid
    python utils/check_dataset.py --dataset folders --datadir mine --val-stride 6

Checks pairs, sizes, modes, damaged files, label values, absent classes, and images that occur in
two splits. Prints the findings, and writes report.html, report.json and sheet.png (labels on their
images, worst aligned first) to --out. A core inspects 13 Cityscapes pairs a second, or 350 of
CamVid. docs/check_dataset.md explains each finding.

Exit status: 0 without findings, 1 with findings (see --fail-on), 2 if the check could not run.
"""

SERVE = """Serve the live page on this machine: the network in a browser tab.

    python utils/serve.py
    python utils/serve.py --weights save/mine --port 8000
    python utils/serve.py --build-only --out www    # for a static host

Serves static files at http://127.0.0.1:8080 and opens a browser, which processes the images; the
server receives none. The first call downloads ONNX Runtime Web (33 MB) with npm and exports the
released weights, in about a minute. Needs `pip install ".[deploy]"` and Node.js.
"""


# fmt: off
def predict() -> argparse.ArgumentParser:
    parser = make_parser(PREDICT)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT",
        help='image, video, folder, pattern ("*.jpg"), or camera:NUMBER')
    add("--weights", type=Path, default=Path("camvid-d20"),
        help="released name, weights file, run folder (its best.pth) or exported file")
    add("--out", type=Path, default=ROOT / "save" / "predictions",
        help="folder of the results (default: save/predictions)")
    add("--outputs", choices=OUTPUTS, nargs="+",
        help="files to write (default: labels and overlay for images, overlay for videos)")
    add("--label-ids", action="store_true",
        help="write label ids instead of class indices, as the Cityscapes benchmark expects "
             "(Cityscapes weights only)")
    add_overlay_flags(parser)
    add("--image-format", choices=("jpg", "png"), default="jpg",
        help="format of overlay and side; png is lossless, slower and larger")
    add("--overwrite", action="store_true", help="discard earlier results")
    add("--max-frames", type=POSITIVE, metavar="N",
        help="stop each video or camera after N frames; a video is then not marked as finished")
    add("--num-workers", type=POSITIVE, default=2, metavar="N",
        help="threads that decode images, and threads that write")
    add_input_size_flags(parser)
    add_backend_flags(parser)
    return parser


def evaluate() -> argparse.ArgumentParser:
    parser = make_parser(EVALUATE, released=True)
    add = parser.add_argument
    add("--weights", type=Path, required=True,
        help="weights file, run folder (its best.pth), released name or exported file")
    add_dataset_flags(parser, ("fine", "coarse"), "the hold-out that the training used")
    add("--subset", choices=("train", "train_extra", "val", "test"), default="val",
        help="split to evaluate")
    add("--eval-size", choices=("full", "network"), default="full",
        help="evaluate at the size of the label files or of the network's input")
    add_input_size_flags(parser)
    add_test_time_flags(parser)
    add("--batch-size", type=POSITIVE, default=1, help="images per batch")
    add_num_workers_flag(parser, 2)
    add_backend_flags(parser, fold=True)
    add("--json", type=Path, metavar="FILE", help="write the results to FILE")
    add("--plot", type=Path, metavar="PNG", help="plot the IoU of each class")
    add("--contact-sheet", type=Path, metavar="PNG",
        help="draw input, truth and prediction of some images")
    add("--sheet-images", type=POSITIVE, default=6, metavar="N", help="images on the contact sheet")
    return parser


def evaluate_cityscapes() -> argparse.ArgumentParser:
    parser = make_parser(EVALUATE_CITYSCAPES, released=True)
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--weights", type=Path,
        help="weights file, run folder (its best.pth), released name or exported file")
    add("--predictions", type=Path, metavar="DIR",
        help="evaluate the label-id PNGs below DIR, from any network")
    data = parser.add_argument_group("data")
    add = data.add_argument
    add("--datadir", type=Path, default=ROOT / "datasets" / "cityscapes",
        help="Cityscapes in the official layout (default: datasets/cityscapes)")
    add("--subset", choices=("train", "val", "test"), default="val", help="split to evaluate")
    add("--labels", choices=LABEL_ENCODINGS, default="auto",
        help="encoding of the label files; auto: by their names")
    add("--max-images", type=POSITIVE, metavar="N", help="only the first N images")
    add_num_workers_flag(data, 2, "decoding processes")

    net = parser.add_argument_group("network")
    add_input_size_flags(net)
    add = net.add_argument
    add("--batch-size", type=POSITIVE, default=1, help="images per batch")
    add_test_time_flags(net)
    add("--tile", type=int, nargs=2, metavar=("H", "W"),
        help="run the network on overlapping tiles of this size in pixels, for an input too large "
             "for the memory")
    add("--overlap", type=int, default=128, metavar="PIXELS", help="overlap of neighbouring tiles")
    add_backend_flags(net, fold=True)

    add = parser.add_argument_group("results").add_argument
    add("--out", type=Path, help="folder for all results (default: <weights>-eval-<subset>)")
    add("--overwrite", action="store_true", help="discard existing results in --out")
    add("--json", type=Path, metavar="FILE", help="also write the scores to FILE")
    add("--report", nargs="?", const=True, type=Path, metavar="FILE",
        help="write an HTML report (default file: report.html in --out)")
    add("--report-images", type=COUNT, default=500, metavar="N",
        help="show the N images with the lowest scores in the report")
    add("--speed", action=argparse.BooleanOptionalAction, default=True,
        help="measure the speed, for some seconds")
    add("--warmup", type=COUNT, default=3, metavar="N", help="passes before timing")
    add("--runs", type=POSITIVE, default=20, metavar="N", help="timed passes")
    return parser


def train() -> argparse.ArgumentParser:
    parser = make_parser(TRAIN, released=True)
    data = parser.add_argument_group("data")
    add_dataset_flags(data)
    add = data.add_argument
    add("--with-val", action="store_true",
        help="train on the validation images too, for a final model; their score is then no "
             "estimate of anything")
    add_input_size_flags(data, "that of the data set, 512x1024 for Cityscapes")
    add("--augment", choices=AUGMENTATIONS,
        help="paper: flip and shift; modern: scale, crop, flip and colour")
    add("--cache", type=Path, metavar="DIR",
        help="read the decoded data set that datasets/prepare_cityscapes.py has written to DIR")
    add("--class-uniform", type=float, metavar="SHARE",
        help="draw this share of the images (0 to 1) by class, each class as often as another")
    add_loading_flags(data)

    add = parser.add_argument_group("network").add_argument
    add("--variant", choices=VARIANTS, default="d20",
        help="d20: lighter, 0.93 M parameters; d128: heavier, 2.29 M")
    add("--pyramid-channels", type=POSITIVE, metavar="D", help="another width of d128's pyramid")
    add("--state", type=Path,
        help="start from the weights of a full network: a file, a run folder or a released name")
    add("--reset-head", action="store_true",
        help="with --state: keep new random weights in the layers of the classes, for other "
             "classes than those of the weights")
    add("--pretrainedEncoder", type=Path, dest="pretrained_encoder",
        help="weights to take the encoder and its normalization from; skips stage 1")
    add("--decoder", action="store_true", help="start with stage 2")
    add("--encoder-lr-factor", type=at_least(0, float), default=1.0, metavar="X",
        help="factor of the encoder's learning rate in stage 2")
    add("--freeze-encoder", type=COUNT, default=0, metavar="N",
        help="freeze the encoder in the first N epochs of stage 2")

    recipe = parser.add_argument_group("recipe", "the defaults come from --recipe")
    add_recipe_flags(recipe, "Adam")
    add = recipe.add_argument
    add("--encoder-epochs", type=POSITIVE, metavar="N",
        help="epochs of stage 1 (default: as many as of the stage after it)")
    add("--curriculum", metavar="A:N,B:M",
        help="Cityscapes: stage 2 on annotations A for N epochs, then on B for M, each with its "
             "own class weights and schedule, as in coarse:100,fine:200")
    add("--progressive", metavar="HxW:N,...",
        help="train stage 2 at smaller sizes first, N epochs each, with a schedule for each size")
    add("--class-weights", choices=("auto", "released", "computed", "none"),
        help="weights of the loss; computed: 1/ln(c+share) of the training labels; auto: the "
             "released list for Cityscapes fine, otherwise computed")
    add("--iouTrain", action=argparse.BooleanOptionalAction, default=True, dest="iou_train",
        help="compute the mIoU of the training batches too")
    add_run_flags(parser, "<dataset>-<variant>")
    return parser


def pretrain() -> argparse.ArgumentParser:
    parser = make_parser(PRETRAIN)
    data = parser.add_argument_group("data")
    add = data.add_argument
    add("--datadir", type=Path, default=ROOT / "datasets/imagenet",
        help="folder with train/ and val/ (default: datasets/imagenet)")
    add("--stored-size", type=POSITIVE, default=256, metavar="S",
        help="images are resized to SxS pixels, from which the crops are taken")
    add("--crop-size", type=POSITIVE, default=224, metavar="S", help="side of the network's input")
    add("--cache", type=Path, metavar="DIR",
        help="read the decoded images that datasets/prepare_imagenet.py has written to DIR")
    add_loading_flags(data)

    recipe = parser.add_argument_group("recipe", "the defaults come from --recipe")
    add_recipe_flags(recipe, "SGD with momentum 0.9")
    add = recipe.add_argument
    add("--augment", choices=AUGMENTATIONS, help="paper: crop and flip; modern: colour too")
    add("--label-smoothing", type=at_least(0, float), metavar="X", help="0 to below 1")
    add("--mixup", type=at_least(0, float), metavar="A", help="alpha of Beta(A, A); 0: none")

    add = parser.add_argument_group("network").add_argument
    add("--state", type=Path, help="start from the weights of a classifier")
    add("--evaluate", type=Path, metavar="FILE",
        help="evaluate these weights on val instead of training")
    add_run_flags(parser, "imagenet")
    return parser


def export() -> argparse.ArgumentParser:
    parser = make_parser(EXPORT)
    add = parser.add_argument
    add("--weights", type=Path, required=True,
        help="weights file, run folder (its best.pth) or released name")
    add("--format", choices=("onnx", "openvino", "torch", "executorch"), default="onnx",
        help="format of the file")
    add("--out", type=Path, metavar="FILE",
        help="file to write (default: the name of the weights with the suffix of the format)")
    add_input_size_flags(parser)
    add("--dynamic", action="store_true",
        help="accept any batch and size; otherwise one image of one size, which is faster in some "
             "runtimes")
    add("--output", choices=("labels", "logits"), default="labels",
        help="class indices at the size of the image, or logits at 1/8 of it")
    add("--check-images", type=Path, metavar="DIR",
        help="compare the outputs on every image below DIR (default: some of --calibrate, or three "
             "toy street scenes)")
    add("--min-agreement", type=at_least(0, float), metavar="SHARE",
        help="share of the pixels that must get the same class (default: 0.9999; int8: 0.9)")
    add("--max-difference", type=at_least(0, float), metavar="X",
        help="allowed difference between two logits, relative to the largest (default: 1e-3; int8: "
             "0.5)")
    int8 = parser.add_argument_group("int8")
    add = int8.add_argument
    add("--precision", choices=("fp32", "int8"), default="fp32",
        help="int8: convolutions in 8 bits, several times faster on many CPUs")
    add("--calibrate", type=Path, metavar="DIR",
        help="images for the calibration of int8, such as those of the training")
    add("--calibration-images", type=POSITIVE, default=64, metavar="N",
        help="number of images to use, evenly spaced")
    add_dataset_flags(
        int8, ("fine", "coarse"), "the hold-out that the training used",
        "folder of the data set on whose val images network and file are evaluated",
    )
    add("--max-drop", type=at_least(0, float), default=0.5, metavar="POINTS",
        help="allowed drop of the mIoU in percentage points")
    return parser


def benchmark() -> argparse.ArgumentParser:
    parser = make_parser(BENCHMARK, released=True)
    add = parser.add_argument
    add("--weights", type=Path,
        help="weights file, run folder, released name or exported file (default: random weights, "
             "see --variant)")
    add("--variant", choices=VARIANTS, default="d20", help="network to measure")
    add("--num-classes", type=POSITIVE, default=20, help="outputs of the network, void included")
    add_input_size_flags(parser, "as trained, otherwise 512x1024")
    add("--image-height", type=POSITIVE, default=IMAGE_SIZE[0], metavar="PIXELS",
        help="height of the images")
    add("--image-width", type=POSITIVE, default=IMAGE_SIZE[1], metavar="PIXELS",
        help="width of the images")
    add("--batch-size", type=POSITIVE, default=1, help="images per batch")
    add_backend_flags(parser, fold=True)
    add("--warmup", type=COUNT, default=3, metavar="N", help="passes before timing")
    add("--runs", type=POSITIVE, default=20, metavar="N", help="timed passes")
    add("--json", type=Path, metavar="FILE", help="write the results to FILE")
    return parser


def check() -> argparse.ArgumentParser:
    parser = make_parser(CHECK)
    add_dataset_flags(parser, ("fine", "coarse", "aug"), "the hold-out that training will use")
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR",
        help="folder of the reports (default: save/check-<dataset>)")
    add("--images", type=COUNT, default=12, metavar="N", help="pairs on the contact sheet")
    add("--fail-on", choices=("error", "warning", "never"), default="warning",
        help="lowest severity that makes the exit status 1")
    add_num_workers_flag(parser, usable_cpus(),
                         "decoding processes; 0 decodes in the main process")
    return parser


def serve() -> argparse.ArgumentParser:
    parser = make_parser(SERVE)
    add = parser.add_argument
    add("--weights", type=Path, metavar="PATH",
        help="weights file, run folder or released name that the page offers first")
    add("--port", type=at_least(0, most=65535), default=8080, help="port; 0 takes a free one")
    add("--browser", action=argparse.BooleanOptionalAction, default=True, help="open a browser")
    add("--out", type=Path, metavar="DIR",
        help="folder of the built page (default: live in $XDG_CACHE_HOME/lednet)")
    add("--build-only", action="store_true", help="build the page, and end")
    return parser
# fmt: on
