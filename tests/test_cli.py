"""Flags that the scripts share: help without PyTorch, earlier spellings, defaults, choices."""

import os
import re
import runpy
import subprocess
import sys

import pytest
from conftest import ROOT

from lednet import api
from lednet.cli import common, main, parsers
from lednet.data.registry import DATASETS, TRAINING_PARTS
from lednet.data.transforms import PRESETS
from lednet.device import AMP_DTYPES
from lednet.errors import UserError
from lednet.inference.backends import BACKENDS
from lednet.inference.writers import OUTPUTS
from lednet.model import VARIANTS
from lednet.training.lr_schedule import SCHEDULES

SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("train", "imagenet", "test", "utils", "datasets")
    for path in (ROOT / folder).glob("*.py")
    if re.search(r"build_parser|cli\.main", path.read_text(encoding="utf-8"))
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_does_not_import_torch(script):
    code = (
        "import runpy, sys\n"
        "try:\n"
        f"    sys.argv = [{script!r}, '--help']\n"
        f"    runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
        "finally:\n"
        "    sys.stderr.write(str('torch' in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "False")
    assert done.stdout.startswith("usage: ") and "python " + script in done.stdout


def test_package_import_does_not_import_torch():
    code = "import sys, lednet; dir(lednet); assert 'torch' not in sys.modules, 'imported'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


PARSERS = [getattr(parsers, name.replace("-", "_")) for name in main.COMMANDS] + [
    module["build_parser"]
    for module in (runpy.run_path(str(ROOT / script)) for script in SCRIPTS)
    if "build_parser" in module
]


@pytest.mark.parametrize("build_parser", PARSERS)
def test_flags_have_one_spelling_and_show_their_defaults(build_parser):
    parser = build_parser()
    for action in parser._actions:
        if action.default not in (None, False, "==SUPPRESS==") and action.option_strings:
            assert "(default: " in parser._get_formatter()._expand_help(action), action.dest
    old = {"--val-every", "--val-names", "--what", "--photo", "--at", "--sheet", "--workers"}
    assert not set(re.findall(r"--[\w-]+", parser.format_help())) & old


def test_choices_are_those_of_the_library():
    assert tuple(DATASETS) == common.DATASETS
    assert tuple(TRAINING_PARTS) == common.ANNOTATIONS
    assert tuple(VARIANTS) == common.VARIANTS
    assert tuple(AMP_DTYPES) == common.PRECISIONS
    assert common.BACKENDS == BACKENDS
    assert tuple(SCHEDULES) == common.SCHEDULES
    assert common.AUGMENTATIONS == PRESETS
    assert common.OUTPUTS == OUTPUTS


@pytest.mark.parametrize(
    ("text", "value"), [("1", 1), ("12", 12), ("0", None), ("-1", None), ("1.5", None), ("x", None)]
)
def test_positive_numbers_are_parsed_and_others_refused(text, value):
    parser = common.make_parser("text")
    parser.add_argument("--count", type=common.POSITIVE)
    if value is not None:
        assert parser.parse_args([f"--count={text}"]).count == value
        return
    with pytest.raises(UserError, match=f"'{text}' is not a whole number of at least 1; see --h"):
        parser.parse_args([f"--count={text}"])


def test_earlier_spellings_set_the_same_options():
    parser = common.make_parser("text")
    common.add_dataset_flags(parser)
    common.add_num_workers_flag(parser, 2)
    old = parser.parse_args(["--val-every", "3", "--val-names", "a", "--workers", "1"])
    new = parser.parse_args(["--val-stride", "3", "--val-prefix", "a", "--num-workers", "1"])
    assert old == new and (old.val_stride, old.val_prefix, old.num_workers) == (3, "a", 1)


def test_lednet_command_runs_the_code_of_the_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/lednet", "evaluate-cityscapes", "--help"])
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    with pytest.raises(SystemExit, match="0"):
        main.main()
    text = capsys.readouterr().out
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert text.startswith("usage: lednet evaluate-cityscapes") and "--report-images" in text
    monkeypatch.setattr(sys, "argv", ["lednet", "predict", "--alpha", "2", "a.png"])
    with pytest.raises(SystemExit, match="2"):
        main.main()
    assert "error: argument --alpha: '2' is not a number from 0 to 1" in capsys.readouterr().err


def test_lednet_command_lists_its_commands(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lednet"])
    with pytest.raises(SystemExit, match="0"):
        main.main()
    text = capsys.readouterr().out
    for name in main.COMMANDS:
        assert f"    {name} " in text and hasattr(parsers, name.replace("-", "_"))
    monkeypatch.setattr(sys, "argv", ["lednet", "predcit"])
    with pytest.raises(SystemExit, match="2"):
        main.main()
    assert "invalid choice: 'predcit'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["pre"], ["predict", "pretrain"]),
        (["train", "--precisi"], ["--precision"]),
        (["train", "--precision", ""], list(common.PRECISIONS)),
        (["predict", "--weights", "READ"], ["README.md"]),
        (["evaluate-cityscapes", "READ"], []),
    ],
)
def test_print_completion_bash_completes(words, found):
    script = main.completion("bash") + (
        '\nCOMP_WORDS=(lednet "$@"); COMP_CWORD=$#; _shtab_lednet; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    command = ["bash", "-c", script, "bash", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (found, "")


def test_print_completion_without_shtab_names_the_package(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    monkeypatch.setattr(sys, "argv", ["lednet", "--print-completion", "zsh"])
    with pytest.raises(SystemExit, match="2"):
        main.main()
    assert "pip install shtab" in capsys.readouterr().err


def test_functions_are_not_hidden_by_modules_of_their_name():
    import lednet
    import lednet.evaluation.evaluator
    import lednet.exporting.exporter
    import lednet.training.loop

    assert [lednet.train, lednet.evaluate, lednet.export] == [api.train, api.evaluate, api.export]


def test_to_arguments_flags_of_keywords():
    options = {"weights": "w.pth", "scales": [0.5, 1], "flip": True, "fold": False, "json": None}
    found = api.to_arguments(parsers.evaluate(), options)
    assert found == ["--weights", "w.pth", "--scales", "0.5", "1", "--flip", "--no-fold"]
    train = {"pretrained_encoder": "e.pth", "iou_train": False}
    expected = ["--pretrainedEncoder", "e.pth", "--no-iouTrain"]
    assert api.to_arguments(parsers.train(), train) == expected
    with pytest.raises(TypeError, match="argument 'epochs'"):
        api.to_arguments(parsers.train(), {"epochs": 3})


def test_home_folder_is_expanded_in_flags_and_nowhere_else(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    parser = common.make_parser("text")
    parser.add_argument("paths", nargs="*")
    parser.add_argument("--out")
    args = parser.parse_args(["--out=~/runs", "~/a b.png", "~.png", "a/~/b"])
    assert (args.out, args.paths) == ("/home/me/runs", ["/home/me/a b.png", "~.png", "a/~/b"])


@pytest.mark.parametrize(
    ("quota", "expected"), [(None, 6), ("max 100000", 6), ("150000 100000", 2), ("900000 1000", 6)]
)
def test_usable_cpus_respects_affinity_and_quota(monkeypatch, tmp_path, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    monkeypatch.setattr(common, "CPU_QUOTA", tmp_path / "cpu.max")
    if quota:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert common.usable_cpus() == expected
