"""Release the weights of a run: config.json, model.safetensors and a model card.

    python test/eval_iou.py --weights save/camvid-full --dataset camvid \
        --datadir /data/camvid --json val.json
    python utils/release_weights.py --name camvid-d20 --runs save/camvid-half save/camvid-full \
        --scores val.json

The best weights of the last run are written to save/released/<name>. All numbers in the card come
from the run folders and the score files. The table of all released weights in docs/results.md is
updated.
"""

import argparse
from pathlib import Path

from lednet.cli.common import ROOT, make_parser, print_help_early


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
                        help="page with the table of released weights (default: docs/results.md)")
    parser.add_argument("--data", help="data set of the terms and tables: CamVid, Cityscapes or "
                                       "toy streets (default: that of the runs)")
    parser.add_argument("--images", help="training images, in words (default: the splits in the "
                                         "options of the runs)")
    parser.add_argument("--limits", default="", metavar="SENTENCE",
                        help="a sentence on the limits of these weights")
    # fmt: on
    return parser


if __name__ == "__main__":
    print_help_early(build_parser)

import shlex
from collections import Counter
from typing import Any

import jinja2

from lednet.checkpoint import CONFIG, TENSORS, save_pretrained
from lednet.data.labels import camvid_scheme, cityscapes_scheme, require_classes
from lednet.errors import UserError, exit_on_user_error
from lednet.html import format_score
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
    "toy streets": (
        cityscapes_scheme,
        "Street scenes drawn by `datasets/make_toy_cityscapes.py`, with the classes of Cityscapes. "
        "Scenes and weights are free to use under the licence of this repository (MIT).",
    ),
}
"""Label scheme and terms of the data sets that released weights may come from."""


def describe_training(run: Path) -> dict[str, Any]:
    """Command, commit, versions, hardware and epochs of a run."""
    content = read_json(run / "options.json")
    size = f"{content['options']['height']}x{content['options']['width']}"
    stages = Counter(record["stage"] for record in read_records(run))
    return {
        "command": shlex.join(content["command"]),
        "stages": [
            f"{count} epochs at {name.partition('-')[0] if name[0].isdigit() else size}"
            for name, count in stages.items()
        ],
        "hardware": content["hardware"],
        **content["environment"],
    }


def state_of(command: str) -> str | None:
    """Value of --state in a command line."""
    words = shlex.split(command)
    return words[words.index("--state") + 1] if "--state" in words[:-1] else None


def training_images(runs: list[Path]) -> str:
    """Splits that the runs trained on, in words."""
    options = [read_options(run) for run in runs]
    splits = "train and val" if any(o.get("with_val") for o in options) else "train"
    held_out = {o["val_prefix"] for o in options if o.get("val_prefix")}
    return splits + "".join(f", without {name}*" for name in sorted(held_out))


def read_scores(path: Path, meta: dict[str, Any]) -> dict[str, Any]:
    score = read_json(path)
    if list(score.get("class_iou", ())) != list(meta["classes"]):
        raise UserError(f"{path} holds no scores of {meta['dataset']}: give eval_iou's JSON")
    return score


def augmented(score: dict[str, Any]) -> bool:
    """Whether a score was measured with test-time augmentation."""
    return score.get("flip") or score.get("scales", [1.0]) != [1.0]


def describe(score: dict[str, Any], images: str) -> str:
    """How a score was measured, given the training images in words."""
    height, width = score["network_size"]
    scales = score.get("scales", [1.0])
    at = "the label files'" if score["scored_at"] == "full" else "the network's"
    return (
        score["subset"]
        + (" (trained on)" if score["subset"] in images.split() else "")
        + f", {score['images']} images, network {height}x{width}"
        + (f", scales {' '.join(f'{s:g}' for s in scales)}" if scales != [1.0] else "")
        + (", mirrored too" if score.get("flip") else "")
        + f", at {at} size"
    )


def results_table(released: Path) -> str:
    """Markdown table of all released weights, one row per score."""
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


def render_card(config: dict[str, Any], name: str, parameters: int) -> str:
    """The model card of the weights that `config` describes, in Markdown."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOT / "lednet/templates"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
    )
    environment.filters["score"] = format_score
    return environment.get_template("model_card.md").render(
        config, name=name, parameters=parameters, tensors=TENSORS, describe=describe,
        augmented=augmented,
    )  # fmt: skip


def main() -> None:
    args = build_parser().parse_args()
    if Path(args.name).name != args.name or args.name.startswith("."):
        raise UserError(f"--name {args.name!r} is no folder's name: write it as in camvid-d20")
    net, meta = load_model(args.runs[-1])
    meta["dataset"] = args.data or meta.get("dataset")
    if meta["dataset"] not in DATA:
        raise UserError(
            f"{args.runs[-1]} was trained on {meta['dataset']}, whose terms are not known "
            "here: add them to DATA in utils/release_weights.py"
        )
    scheme, terms = DATA[meta["dataset"]]
    require_classes(net, meta, scheme(), args.runs[-1])
    earlier = meta.pop("earlier", [])
    first = read_options(args.runs[0])
    meta |= {
        "training": [*earlier, *map(describe_training, args.runs)],
        "scores": [read_scores(path, meta) for path in args.scores],
        "terms": terms,
        "encoder_from": first.get("pretrained_encoder"),
        "started_from": state_of(earlier[0]["command"]) if earlier else first.get("state"),
        "images": args.images or training_images(args.runs),
        "limits": args.limits,
    }
    folder = args.out / args.name
    save_pretrained(folder, net, meta)
    text = render_card(read_json(folder / CONFIG), args.name, count_parameters(net))
    write_text(folder / "README.md", text)
    write_between_marks(args.page, "utils/release_weights.py", results_table(args.out))
    print(f"wrote {folder} and {args.page}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
