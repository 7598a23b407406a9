"""Make released weights out of runs: config.json, model.safetensors and a model card.

    python test/eval_iou.py --weights save/camvid-full --dataset camvid \
        --datadir /data/camvid --json val.json
    python utils/release_weights.py --name camvid-d20 --runs save/camvid-half save/camvid-full \
        --scores val.json

The last run's best weights go to save/released/<name>; every figure in the card comes from the
runs' folders and the score files. All cards together make the page docs/results.md.
"""

import argparse
from pathlib import Path

from lednet.cli.common import make_parser, print_help_early

ROOT = Path(__file__).resolve().parents[1]


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    # fmt: off
    parser.add_argument("--name", required=True, help="name of the weights, as in camvid-d20")
    parser.add_argument("--runs", type=Path, nargs="+", required=True,
                        help="run folders, each started from the weights of the one before")
    parser.add_argument("--scores", type=Path, nargs="+", required=True, metavar="FILE",
                        help="JSON files of test/eval_iou.py for the weights of the last run")
    parser.add_argument("--out", type=Path, default=ROOT / "save/released",
                        help="folder of all released weights (default: save/released)")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/results.md",
                        help="page whose table of released weights is updated (default: "
                             "docs/results.md)")
    parser.add_argument("--images", help="images it was trained on (default: the splits, from the "
                                         "options of the runs)")
    parser.add_argument("--limits", default="", metavar="SENTENCE",
                        help="a sentence about what to expect of these weights")
    # fmt: on
    return parser


if __name__ == "__main__":
    print_help_early(build_parser)

import shlex
from collections import Counter
from typing import Any

from lednet.checkpoint import CONFIG, TENSORS, save_pretrained
from lednet.data.labels import camvid_scheme, cityscapes_scheme, require_classes
from lednet.errors import UserError, exit_on_user_error
from lednet.hub import list_pretrained
from lednet.io import read_json, write_between_marks, write_text
from lednet.model import count_parameters, load_model
from lednet.training.run_dir import read_options, read_records

DATA = {
    "CamVid": (
        camvid_scheme,
        "CamVid (Brostow et al., Pattern Recognition Letters 2009), the usual split, 11 classes. "
        "Published for research; its owners' terms apply to what is made of it, these weights "
        "included.",
    ),
    "Cityscapes": (
        cityscapes_scheme,
        "Cityscapes (Cordts et al., CVPR 2016). Its licence allows research, teaching and other "
        "non-commercial use, and so should these weights be used.",
    ),
}
"""Label scheme and terms of the data sets that released weights may come from."""

CARD = """# {name}

LEDNet {variant}, {parameters:,} parameters, for {outputs} outputs: {classes}, and void.

    from lednet import LEDNet
    net = LEDNet.from_pretrained("{name}")

Input: RGB in [0, 1], normalised with mean {mean} and standard deviation {std}; trained at
{height}x{width} pixels.

## Data and terms

{terms} Trained on {images}.

## Training

{start}, {epochs}, one after the other:

{commands}

## Scores

{scores}

Intersection over union of each class:

{class_table}

## Use and limits

For research and demonstrations of real-time street-scene segmentation, on images like those it
was trained on. Not for anything on which somebody's safety depends. Other cameras, countries,
weather and night were not tried; classes with a low figure above are not recognised
reliably.{limits}

## Checksum

SHA-256 of `{file}`: `{sha256}`
"""


def training_of(runs: list[Path]) -> list[dict[str, Any]]:
    """Command, commit, versions and epochs of each run."""
    trained = []
    for run in runs:
        content = read_json(run / "options.json")
        size = f"{content['options']['height']}x{content['options']['width']}"
        stages = Counter(record["stage"] for record in read_records(run))
        trained.append(
            {
                "command": shlex.join(content["command"]),
                "stages": [
                    f"{count} epochs at {name.partition('-')[0] if name[0].isdigit() else size}"
                    for name, count in stages.items()
                ],
                "hardware": content["hardware"],
                **content["environment"],
            }
        )
    return trained


def training_images(runs: list[Path]) -> str:
    """What the runs trained on, in words."""
    options = [read_options(run) for run in runs]
    splits = "train and val" if any(o.get("with_val") for o in options) else "train"
    held_out = {o["val_prefix"] for o in options if o.get("val_prefix")}
    return splits + "".join(f", without {name}*" for name in sorted(held_out))


def scores_of(files: list[Path], meta: dict[str, Any]) -> list[dict[str, Any]]:
    """
    Raises:
        UserError: a file holds the scores of other classes.
    """
    scores = [read_json(path) for path in files]
    for path, score in zip(files, scores, strict=True):
        if list(score.get("class_iou", ())) != list(meta["classes"]):
            raise UserError(f"{path} holds no scores of {meta['dataset']}: give eval_iou's JSON")
    return scores


def heading(score: dict[str, Any]) -> str:
    averaged = score.get("flip") or score.get("scales", [1.0]) != [1.0]
    return score["subset"] + (", scales averaged" if averaged else "")


def figure(value: float | None) -> str:
    return "absent" if value is None else f"{value:.3f}"


def describe(score: dict[str, Any], splits: str) -> str:
    """On what and how a score was measured.

    Args:
        splits: what `training_images` says.
    """
    height, width = score["network_size"]
    at = "the label files'" if score["scored_at"] == "full" else "the network's"
    scales = score.get("scales", [1.0])
    ways = f", scales {' '.join(f'{s:g}' for s in scales)}" if scales != [1.0] else ""
    ways += ", mirrored too" if score.get("flip") else ""
    trained = " (trained on)" if score["subset"] in splits.split() else ""
    return (
        f"{score['subset']}{trained}, {score['images']} images, network {height}x{width}{ways}, "
        f"at {at} size"
    )


def card(name: str, config: dict[str, Any], parameters: int) -> str:
    meta = config["meta"]
    training, scores, encoder = meta["training"], meta["scores"], meta["encoder_from"]
    start = f"From the encoder of {encoder}" if encoder else "From scratch"
    if state := meta.get("started_from"):
        start = f"From the weights {state}"
    rows = [
        "| " + " | ".join(["class", *map(heading, scores)]) + " |",
        "|---" * (1 + len(scores)) + "|",
        *(
            "| " + " | ".join([c, *(figure(score["class_iou"][c]) for score in scores)]) + " |"
            for c in meta["classes"]
        ),
    ]
    return CARD.format(
        name=name,
        variant=config["network"]["variant"],
        parameters=parameters,
        outputs=config["network"]["num_classes"],
        classes=", ".join(meta["classes"]),
        mean=meta["mean"],
        std=meta["std"],
        height=meta["size"][0],
        width=meta["size"][1],
        terms=meta["terms"],
        images=meta["images"],
        start=start,
        epochs=", then ".join(stage for t in training for stage in t["stages"]),
        commands="\n".join(
            f"- `{t['command']}` (commit {t['commit']}, torch {t['torch']}, {t['hardware']})"
            for t in training
        ),
        scores="\n".join(
            f"- **mIoU {score['miou']:.4f}**, pixel accuracy {score['pixel_accuracy']:.4f}: "
            f"{describe(score, meta['images'])}; `{score['command']}`"
            for score in scores
        ),
        class_table="\n".join(rows),
        limits=f" {meta['limits']}" if meta["limits"] else "",
        file=TENSORS,
        sha256=config["sha256"],
    )


def results_table(released: Path) -> str:
    """Every network in the folder `released` and its scores, a row each."""
    rows = ["| weights | data | mIoU | pixel accuracy | measured on |", "|---|---|---|---|---|"]
    for name in list_pretrained(released):
        meta = read_json(released / name / CONFIG)["meta"]
        rows += [
            f"| [{name}](../save/released/{name}/README.md) | {meta['dataset']} | "
            f"{score['miou']:.4f} | {score['pixel_accuracy']:.4f} | "
            f"{describe(score, meta['images'])} |"
            for score in meta["scores"]
        ]
    return "\n".join(rows)


def main() -> None:
    args = build_parser().parse_args()
    if Path(args.name).name != args.name or args.name.startswith("."):
        raise UserError(f"--name {args.name!r} is no folder's name: write it as in camvid-d20")
    net, meta = load_model(args.runs[-1])
    if meta.get("dataset") not in DATA:
        raise UserError(
            f"{args.runs[-1]} was trained on {meta.get('dataset')}, whose terms are not known "
            "here: add them to DATA in utils/release_weights.py"
        )
    scheme, terms = DATA[meta["dataset"]]
    require_classes(net, meta, scheme(), args.runs[-1])
    earlier = meta.pop("earlier", [])
    meta |= {
        "training": earlier + training_of(args.runs),
        "scores": scores_of(args.scores, meta),
        "terms": terms,
        "encoder_from": read_options(args.runs[0]).get("pretrained_encoder"),
        "started_from": None if earlier else read_options(args.runs[0]).get("state"),
        "images": args.images or training_images(args.runs),
        "limits": args.limits,
    }
    folder = args.out / args.name
    save_pretrained(folder, net, meta)
    text = card(args.name, read_json(folder / CONFIG), count_parameters(net))
    write_text(folder / "README.md", text)
    write_between_marks(args.page, "utils/release_weights.py", results_table(args.out))
    print(f"wrote {folder} and {args.page}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
