"""Command line: a subcommand per station. Heavy libraries load only when a station needs them."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import json
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stage1_pro.commands import COMMANDS, load
from stage1_pro.deploy.runtime import OF_RUNS, RUNTIMES
from stage1_pro.errors import PROMISE_FAILED, DependencyError, InputError, NotReachableError, Stage1Error, need

if TYPE_CHECKING:
    from stage1_pro.command import Command
    from stage1_pro.config import Config

_TRAIN_PACKAGES = {"torch", "transformers", "peft", "accelerate", "safetensors", "onnx", "onnxscript", "sklearn"}
_CONTINUAL_PACKAGES = {"sqlalchemy", "psycopg", "pyarrow", "river", "prometheus_client"}
_FLOW = """\
the usual way:
  stage1 split --labels labels.csv --out RUN      images and labels to four splits that cannot leak
  stage1 train --run RUN                          a DINOv3 classifier; killed? add --resume
  stage1 calibrate --run RUN                      when may Stage A answer? the exit policy
  stage1 evaluate --run RUN                       figures on val_test and a report to open
  stage1 export --run RUN --target rtx            a bundle: ONNX, engines, exactly one policy
  stage1 predict --bundle RUN/bundle photos/      label, probability, exited or deferred
a bundle from elsewhere:
  stage1 verify BUNDLE                            hashes, limits, signature, engines; nothing in it is run
unlabelled images of the place it will work in, before training:
  stage1 explora --images POOL --run RUN          adapt the backbone to them; then train --explora
while it serves:
  stage1 predict --bundle B photos/ --log LOG     the same, and every decision is an event in a log
  stage1 review --store STORE --log LOG           a local page to answer what was selected for review
without a model:
  stage1 plan --alpha .01 --min-coverage .7       how many calibration rows a promise takes
  stage1 metrics predictions.csv                  AUGRC and the whole suite with intervals
which configuration is better:
  stage1 compare --config A.yaml B.yaml --data labels.csv --out DIR    several seeds, fair and paired
a loop that keeps learning while it serves:
  stage1 continual init --root LOOP --run RUN     then run, review, status, promote, rollback: continual --help
as a miner of NATIX StreetVision:
  stage1 streetvision tune --run RUN              threshold and abstain band; prints the miner's YAML
  stage1 streetvision launch --repo CHECKOUT --settings miner.yaml -- --netuid 72

exit codes: 0 done, 2 wrong input, 3 target not reachable, 4 damaged or foreign artefact,
            5 missing dependency, 6 training stopped, 1 some images could not be read,
            7 evaluate: a promise of the policy fails on val_test (all is written all the same),
            8 the GPU failed while it answered
"""


# Named here so that --help loads no runtime; a test holds them against deploy/start.py.
RUNTIME_NAMES = ("auto", *(name for name in RUNTIMES.built_in if name != OF_RUNS))
_RUNTIMES = """\
runtimes:
  onnxruntime    the bundle's fp32 graphs on the CPU; always there
  tensorrt_rtx   its engines for consumer cards (Ampere and later); needs an NVIDIA driver and the extra [rtx]
  tensorrt       its engines for data-centre cards; needs NVIDIA's own tensorrt package
  auto           its engines, the recipe's precision first and then its fallbacks; onnxruntime when none starts
Before a runtime answers it must give the bundle's seeded reference outputs here; one that does not is stepped down
from, with its reason, and a named runtime never becomes another one. PyTorch runs a run, not a bundle: stage1 infer.
"""


_LATENCY = """\
how it is measured: every call is one sample (no averages), inputs rotate, contestants of a batch size are called turn
about, after 200 ms of warming up each. Intervals are of a bootstrap over blocks of neighbouring calls. On a GPU, device
time lies between two events; host time includes copies and Python. Requests go from JPEG bytes to a decision, with
decoding, resizing and the model apart. A cold start is a fresh process to its first answer.

examples:
  stage1 bench latency --bundle RUN/bundle --quick
  stage1 bench latency --bundle RUN/bundle --run RUN --against torch-eager,torch-compile,onnxruntime --out before
  stage1 bench compare before/latency.json after/latency.json
"""


_EXPLORA = """\
ExPLoRA goes on with self-supervised learning on images without labels: the last block, all norms, and LoRA on q
and v of the other blocks, 0.1% to 10% of the encoder, merged afterwards. Its loss says nothing of what features are
worth, so a linear probe and 10 nearest neighbours judge the backbone before and after, on held-out groups of train
rows alone; the base is kept unless balanced accuracy rises by the probe and does not fall by the neighbours. Exit
code 0 either way; RUN/explora/explora.json says `kept: base` or `kept: adapted`. Images of val_select, val_calib and
val_test (same content, or a group of theirs) are left out of the pool.

  stage1 explora --images street_pool --run RUN --base facebook/dinov3-vits16-pretrain-lvd1689m
  stage1 train --run RUN --explora
  stage1 explora --images scenes --run RUN --base narrow --set explora.train=full     a small model from scratch
"""


_METRICS = """\
forms of a CSV (columns)                 of an .npz (arrays)
  label, prob                              labels [N], probs [N] or [N, K]
  label, prob_<class> of every class       labels [N], logits [N] or [N, K]
  error, confidence                        error [N], confidence [N]
prob is P(positive); label is 0 or 1, or a name; error is 0, 1 or a loss in [0, 1]. Optional:
  group        rows of one clip or track: whole groups are resampled, plain intervals would be too narrow
  confidence   what rows are ranked by, instead of the largest probability
  id           checked to be the same when two files are compared

examples:
  stage1 metrics predictions.csv --out figures
  stage1 metrics new.csv --compare old.csv --metrics augrc,nll
"""


_COMPARE = """\
All arms of a seed have the same splits, starting heads, row order and batches; hashes of them are compared, and an
unfair comparison is refused. Every run is a folder OUT/<arm>/seed<s> like any other. Finished ones are skipped, killed
ones resumed, so the same command again goes on. val_test, the same rows in every seed, is read once: for the chosen arm
and the baseline, into test.json.

examples:
  stage1 compare --config full.yaml linear.yaml --data photos/labels.csv --out study --seeds 5
  stage1 compare --study modes --set model.backbone=weights/dinov2-small --data photos/labels.csv --out modes
  stage1 compare --study explora --set none:model.backbone=BASE --set explora:model.backbone=RUN/explora/backbone \\
                 --data photos/labels.csv --out explora
"""


_REVIEW = """\
Serving (`stage1 predict --log LOG`, or continual.served.Served) writes LOG: an event per decision, and the images of
those that were drawn for review. This puts new events into STORE and shows the images one by one, the oldest first:
  1..9 answer with that class    S skip, cannot tell    U undo the last
Answers are only ever added; an undo is one more row. An image is lent to one reviewer at a time; start one page for
each reviewer, on the same store. Images are removed when the log's time to live is over.

examples:
  stage1 review --store loop --log served
  stage1 review --store postgresql://me@db/loop --log served --reviewer ada --blind
  stage1 review --store loop --log served --purge
"""


_STREETVISION = """\
A miner answers P(roadwork) in [0, 1], above .5 for roadwork, or -1 for no answer, within 9 seconds. Keys of its YAML
(only bundle or loop must be there):
  bundle        bundle folder (with runtime torch: a run folder); relative to the YAML, as the next two
  loop          instead: a loop's folder (continual init); its champion answers, and a new one without a restart
  log           folder where every decision becomes an event, for review; of a loop the one that its loop.json names.
                What cannot be logged is warned about, and answered
  runtime       auto | onnxruntime | tensorrt_rtx | tensorrt | torch             (auto)
  timeout_s     seconds for one photo, then -1                                   (8)
  serve_prior   share of positives that is asked, .5 by the validator; logits are corrected for it
  train_prior   share of positives in training; the bundle's own where it is left out
  threshold     P(positive), corrected, that is to land on .5                    (.5)
  on_abstain    answer | minus_one: what is said where policy or answer_above would not answer    (answer)
  answer_above  least confidence of an answer, with minus_one                    (.5)
  max_pixels, threads
The subnet's forward pass was halted in May 2026: nothing here promises earnings.

examples:
  stage1 streetvision tune --run RUN --settings miner.yaml
  stage1 streetvision answer --settings miner.yaml photo.jpg
  stage1 streetvision launch --repo ~/streetvision-subnet --settings miner.yaml -- --netuid 72 --wallet.name me
"""
_TUNE = """\
Reward of a round: (0.5 * max(0, MCC of the last 100) + 0.5 * accuracy of the last 10) ** 3; -1 is paid 0 and leaves
both. The steady state of every setting is simulated on held-out rows: of a run the fit half of val_calib, never
val_test. The tuned setting is chosen only when it is shown to earn more on groups that the choice had not seen.
"""
_LAUNCH = """\
Registers the detector STAGE1 with the miner's own registry, then runs the miner's own entry point in this process.
Nothing in the checkout is changed, so it may update itself. What follows -- goes to the miner. Run it in the
environment that the miner's instructions make (Python 3.11); neither torch nor transformers is needed by stage1_pro.
"""


_VERIFY = """\
every file must be listed, of its size and sha256; graphs may call only ONNX's own operators and read only listed
files; JSON, arrays and image sizes are bounded. Exit code 4: refused, with the reason. An engine is code, so it runs
only when it was built here, when a key you trust signed the bundle, or with --trust-engines.

  stage1 verify BUNDLE
  stage1 verify BUNDLE --require-signature --json
"""


_KEYS = """\
  stage1 keys new maker.key            makes maker.key (private, mode 0600) and maker.key.pub, to hand out
  stage1 sign RUN/bundle --key maker.key
  stage1 keys trust maker.key.pub      on the machine that receives; after that signed engines run there
  stage1 keys list
  stage1 keys forget maker.key

trusted keys lie in $STAGE1_CONFIG, else $XDG_CONFIG_HOME/stage1_pro, else ~/.config/stage1_pro
"""


_CONTINUAL = """\
a loop in a folder (ROOT), step by step; every step is one row of an audit that nobody can change unseen:
  init       a trained, calibrated, exported run is the first champion
  run        look at what was served; an alarm, labels, drift or age begin a round: labels are frozen, a candidate is
             tuned, certified on fresh labels, judged by the gate, tried in the shadow, then as a canary
  propose    begin a round now, up to its candidate; evaluate judges it (one counted look at the guard)
  plan       how many audits see which harm; needs no loop
  promote    a person's approval, without which no candidate answers anybody (unless loop.auto_promote)
  rollback   the champion before is back with the next batch of whoever serves
Serve with continual.live.LiveCascade(ROOT, log=EventLog(ROOT/log)): it follows ROOT/champion.json without a restart.

examples:
  stage1 continual init --root loop --run RUN --alpha .02
  stage1 continual review --root loop                 answer what was selected for review
  stage1 continual run --root loop --every 300        for good; kill it whenever you like, it goes on where it was
  stage1 continual status --root loop --page status.html
  stage1 continual status --root loop --test-alert    are alerts delivered? hooks are alerts: of ROOT/loop.json
  stage1 continual promote --root loop
  stage1 continual audit --root loop --export audit.jsonl
  stage1 continual simulate --data photos --out sim   all of it on a simulated clock, to see what it does
"""


_SIMULATE = """\
Part of the photos is the past that the first champion learns from; the others are served, day after day, and from one
day on as StreetVision's validator would send them. A reviewer who knows the labels answers late. All else is the loop
itself, in OUT/loop, where status, audit and rollback work as ever. simulation.json says what was real and what was not,
every day's risk beside alpha and beside a first champion left alone, alarms, rounds, and what every promotion was worth
on photos never served. Same seed, same file, on SQLite and PostgreSQL.

exit status 0: it was simulated; whether each check passed is in the record, and "no" is an answer

examples:
  stage1 continual simulate --data photos --out sim
  stage1 continual simulate --data photos --out sim2 --run sim/run --audit-rate .1
  stage1 continual status --root sim/loop
"""


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults on every option that has one, line breaks as written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class _TrainParser(argparse.ArgumentParser):
    """Adds the table of configuration keys to ``--help``, and only then loads the configuration."""

    def format_help(self) -> str:
        from stage1_pro.config import describe

        rows = describe()
        width = max(len(name) for name, _, _ in rows)
        table = "\n".join(f"  {name:<{width}}  {default:<12} {text}" for name, default, text in rows)
        title = "configuration keys (YAML sections or --set KEY=VALUE) and their defaults:"
        return f"{super().format_help()}\n{title}\n{table}\n"


class _Parser(argparse.ArgumentParser):
    """Of one command; what it knows is loaded when it parses, so that root help loads nothing."""

    def __init__(self, *, home: str, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)
        self.home = home

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        command = load(self.home)
        self.description = inspect.cleandoc(command.__doc__ or "")
        self.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="print the result as JSON on stdout"
        )
        command.add_to(self)
        self.set_defaults(run_station=functools.partial(_run, command))
        return super().parse_known_args(args, namespace)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; each subcommand stores its handler in ``run_station``."""
    parser = argparse.ArgumentParser(
        prog="stage1",
        description="Selective image classification that keeps its promises.",
        epilog=_FLOW,
        formatter_class=_Formatter,
    )
    parser.set_defaults(json=False)
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    commands = parser.add_subparsers(dest="command", metavar="STATION", parser_class=argparse.ArgumentParser)

    def command(name: str, text: str, handler: Callable[[argparse.Namespace], Any]) -> argparse.ArgumentParser:
        commands._parser_class = _TrainParser if name in ("train", "explora") else argparse.ArgumentParser
        sub = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", formatter_class=_Formatter
        )
        sub.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
        sub.set_defaults(run_station=handler)
        return sub

    def record(name: str) -> None:
        home, text = COMMANDS[name]
        commands._parser_class = _Parser
        commands.add_parser(name, help=text, home=home)

    record("split")

    sub = command("explora", "adapt the backbone to unlabelled images, and keep it where that helps", _explora)
    sub.epilog = _EXPLORA
    sub.add_argument("--images", type=Path, required=True, help="the pool: a folder, or a CSV with file[,group]")
    sub.add_argument("--run", type=Path, required=True, help="run folder with splits.json")
    sub.add_argument("--base", help="backbone to adapt: preset, folder or hub id; model.backbone otherwise")
    _add_config(sub)
    sub.add_argument("--resume", action="store_true", help="go on from last.pth; ends as if never interrupted")
    sub.add_argument("--overwrite", action="store_true", help="forget an earlier adaptation of this run")

    sub = command("train", "train both stages on the splits of a run", _train)
    sub.add_argument("--run", "--run-folder", type=Path, required=True, help="run folder with splits.json")
    sub.epilog = (
        "several processes: torchrun --nproc-per-node 2 -m stage1_pro.cli -- train --run RUN\n"
        "(the lone -- keeps torchrun from taking --run for an option of its own)"
    )
    _add_config(sub)
    sub.add_argument(
        "--mode",
        choices=["full", "linear", "lora", "rslora", "dora", "apla", "partial"],
        help="what of the backbone is trained; short for --set train.mode=MODE",
    )
    sub.add_argument("--resume", action="store_true", help="go on from last.pth; ends as if never interrupted")
    sub.add_argument("--overwrite", action="store_true", help="forget an earlier training in this folder")
    sub.add_argument("--explora", action="store_true", help="start from the backbone in RUN/explora/backbone")

    _add_compare(command("compare", "train arms alike but for their configuration, over seeds, and compare", _compare))

    record("merge")

    sub = command("calibrate", "choose the exit policy on val_calib", _calibrate)
    which = sub.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, help="trained run folder")
    which.add_argument(
        "--logits",
        type=Path,
        help=".npz with logits [N, K] (or probs) and labels [N], optional gate_logits, logits_b, groups, half, "
        "classes, positive",
    )
    sub.epilog = (
        "what is not given comes from the run's configuration; its defaults are named above.\n"
        "ltt certifies on a half of val_calib that is used for one claim: a second one is refused unless --claims\n"
        "divided delta before the first. Exit code 3: the wish cannot be met or certified; no policy is written."
    )
    sub.add_argument(
        "--policy",
        choices=["softmax", "gate", "scrc", "auto"],
        help="what decides an exit: softmax (by default), the gate head, or the one of both that gate.json found "
        "better (auto); scrc: the gate decides exits, then a set of classes is given for what is accepted, and nobody "
        "answers the rest",
    )
    sub.add_argument(
        "--guarantee",
        choices=["ltt", "none"],
        help="ltt (by default) = certified or refused; none = empirical choice, promises nothing",
    )
    sub.add_argument(
        "--target-fnr",
        type=float,
        help="largest false negative rate among exits; softmax: .02 by default; gate: a third wish, off by default",
    )
    sub.add_argument(
        "--alpha",
        type=float,
        help="scrc: largest risk among the accepted; gate: largest share of wrong answers among exits; .01 by default",
    )
    sub.add_argument(
        "--max-exit-error",
        type=float,
        help="gate: the same as --alpha; scrc: of its exit rule, on the fit half (it promises nothing of its own); .01 "
        "by default",
    )
    sub.add_argument(
        "--min-coverage",
        type=float,
        help="gate: least share of images that exit; scrc: that are accepted; .70 by default",
    )
    sub.add_argument(
        "--variant",
        choices=["pac", "I", "T", "naive"],
        help="scrc: pac (by default) = holds for the thresholds found with probability 1 - delta; I, T = on average "
        "over calibrations; naive = --guarantee none",
    )
    sub.add_argument(
        "--loss",
        choices=["miscoverage", "fnr"],
        help="scrc: sets that miss the label (by default), or of positives alone",
    )
    sub.add_argument("--score", choices=["lac", "aps", "raps"], help="scrc: nonconformity of a class; lac by default")
    sub.add_argument(
        "--cells",
        choices=["stage", "class"],
        help="scrc: promise the risk for each stage that answers, or each class; one for all by default",
    )
    sub.add_argument("--allow-empty", action="store_true", default=None, help="scrc: let sets be empty")
    sub.add_argument(
        "--delta", type=float, help="ltt: largest chance of a false certificate, all claims together; .05 by default"
    )
    sub.add_argument(
        "--claims", type=int, help="ltt: claims that delta is divided for, fixed by the first; 1 by default"
    )
    sub.add_argument("--positive", help="with --logits: name of the positive class")
    sub.add_argument("--out", type=Path, help="with --logits: where to write the policy, a folder or a .json file")

    sub = command("evaluate", "measure the best model and its policy on val_test, once it is final", _evaluate)
    sub.epilog = (
        "every promise of the policy is held against val_test: PASS, FAIL (exit code 7, after all is written) or\n"
        "INCONCLUSIVE, with the number of rows or groups that would settle it."
    )
    sub.add_argument("--run", type=Path, required=True, help="trained run folder")
    sub.add_argument("--replicates", type=int, default=1000, help="bootstrap replicates of an interval")
    sub.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    sub.add_argument(
        "--beside", type=Path, nargs="+", default=[], metavar="RUN",
        help="evaluated runs on the same splits with other taps, whose cost and risk are drawn beside this one's",
    )  # fmt: skip
    sub.add_argument(
        "--protocol",
        choices=["crop224", "letterbox224", "native"],
        help="instead: photos as StreetVision's validator would send them, by level, into RUN/protocols; no promise is "
        "about them",
    )
    sub.add_argument(
        "--photo-seed", type=int, help="with --protocol: seed of what is drawn for each photo; 0 by default"
    )

    sub = command("metrics", "measure anybody's predictions: AUGRC and the suite with intervals, no model", _metrics)
    sub.epilog = _METRICS
    sub.add_argument("file", type=Path, metavar="FILE.csv|FILE.npz", help="predictions, in one of the forms below")
    sub.add_argument("--compare", type=Path, metavar="FILE", help="predictions on the same rows: FILE.csv minus these")
    sub.add_argument("--positive", help="name of the positive class; 1 of labels 0 and 1")
    sub.add_argument("--threshold", type=float, help="a row exits at or above it; adds coverage and errors of exits")
    sub.add_argument("--replicates", type=int, default=1000, help="bootstrap replicates of an interval")
    sub.add_argument("--level", type=float, default=0.95, help="nominal coverage of the intervals")
    sub.add_argument("--method", choices=["bca", "percentile", "logit"], default="bca", help="how intervals are made")
    sub.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    sub.add_argument("--metrics", default="all", help="comma-separated names, such as augrc,risk_at_coverage_0.95")
    sub.add_argument("--out", type=Path, help="folder for metrics.csv, metrics.json, figures and report.html")

    record("plan")

    sub = command("export", "write the bundle: ONNX per stage, engines, exactly one policy", _export)
    sub.add_argument("--run", type=Path, required=True, help="trained and calibrated run folder")
    sub.add_argument("--out", type=Path, help="bundle folder; RUN/bundle by default")
    sub.add_argument(
        "--target",
        choices=["onnx", "rtx", "tensorrt"],
        help="rtx also compiles engines, no GPU needed; tensorrt does so for this machine's GPU, data-centre or other; "
        "the run's configuration or onnx by default",
    )
    _add_recipe(sub)
    sub.add_argument("--overwrite", action="store_true", help="replace an existing bundle")

    sub = command("build", "compile engines on this machine from a received bundle's graphs, into a new bundle", _build)
    sub.add_argument("--bundle", type=Path, required=True, help="bundle folder; it stays as it is")
    sub.add_argument("--out", type=Path, help="folder of the new bundle; BUNDLE-built by default")
    sub.add_argument("--target", choices=["rtx", "tensorrt"], help="engine builder; the recipe's or rtx by default")
    _add_recipe(sub)
    sub.add_argument("--overwrite", action="store_true", help="replace an existing bundle at --out")

    sub = command("predict", "answer for images with a bundle (needs no torch)", _predict)
    sub.epilog = _RUNTIMES
    sub.add_argument("--bundle", type=Path, required=True, help="bundle folder")
    sub.add_argument("inputs", nargs="+", type=Path, metavar="IMAGE|FOLDER|CSV", help="what to answer for")
    sub.add_argument("--out", type=Path, help="CSV to write; a table on stdout otherwise")
    sub.add_argument("--log", type=Path, help="folder to log every decision to, as an event; see `stage1 review`")
    sub.add_argument("--batch-size", type=int, default=32, help="images per batch")
    sub.add_argument("--runtime", default="onnxruntime", help=f"what executes the stages: {', '.join(RUNTIME_NAMES)}")
    sub.add_argument(
        "--trust-engines", action="store_true",
        help="run engines that were neither built here nor signed by a trusted key; an engine is a program",
    )  # fmt: skip
    sub.add_argument(
        "--prior",
        type=float,
        help="share of positives where this serves; says what of the promise is void there, answers do not change",
    )

    sub = command("infer", "answer for images or a split with a run's own model in torch, before any export", _infer)
    sub.add_argument("--run", type=Path, required=True, help="trained and calibrated run folder")
    sub.add_argument("inputs", nargs="*", type=Path, metavar="IMAGE|FOLDER|CSV", help="what to answer for")
    sub.add_argument(
        "--split", choices=["train", "val_select", "val_calib", "val_test"], help="rows of the run instead of images"
    )
    sub.add_argument("--out", type=Path, help="CSV to write; a table on stdout otherwise")
    sub.add_argument("--batch-size", type=int, default=32, help="images per batch")
    sub.add_argument(
        "--prior",
        type=float,
        help="share of positives where this serves; says what of the promise is void there, answers do not change",
    )

    _add_review(command("review", "answer on a local page what was selected for review while serving", _review))

    _add_bench(command("bench", "measure what an exit saves on this machine", lambda _: None))

    _add_streetvision(
        command("streetvision", "mine on NATIX StreetVision with a bundle: tune, answer, launch", lambda _: None)
    )
    _add_receiving(command)
    _add_continual(command("continual", "keep learning from labels, and promote only what is better", lambda _: None))

    sub = command("inspect", "say what a bundle is, what it promises and for which GPUs", _inspect)
    sub.add_argument("bundle", type=Path, help="bundle folder")

    record("doctor")

    sub = command("demo", "run every station on rendered street scenes (minutes, no data needed)", _demo)
    sub.add_argument("--out", type=Path, required=True, help="folder to write; must not exist or be a demo's")
    sub.add_argument("--seed", type=int, default=0, help="seed of scenes, splits and training")
    return parser


def _add_review(sub: argparse.ArgumentParser) -> None:
    sub.epilog = _REVIEW
    sub.add_argument("--store", required=True, metavar="URL", help="a folder or file (SQLite), or postgresql://…")
    sub.add_argument("--log", type=Path, help="the log that serving writes, with the images; STORE/log by default")
    sub.add_argument("--reviewer", help="whose answers these are; the user's name by default")
    sub.add_argument("--port", type=int, default=0, help="port of 127.0.0.1; 0 = any free one")
    sub.add_argument("--lease", type=float, default=300.0, help="seconds that an image is this reviewer's alone")
    sub.add_argument("--blind", action="store_true", help="do not show what the cascade said, so that it sways nobody")
    sub.add_argument("--no-browser", action="store_false", dest="browser", help="print the address, open nothing")
    sub.add_argument("--purge", action="store_true", help="remove images whose time is over, and stop")


def _add_compare(sub: argparse.ArgumentParser) -> None:
    sub.epilog = _COMPARE
    sub.add_argument(
        "--config",
        type=Path,
        nargs="+",
        default=[],
        metavar="YAML",
        help="an arm each, as for train; the first is the baseline",
    )
    sub.add_argument("--study", help="a standing study instead: modes (full, LoRA, DoRA, APLA, partial) or explora")
    sub.add_argument("--data", type=Path, required=True, help="labels, as for split --labels")
    sub.add_argument("--out", type=Path, required=True, help="folder of the comparison; run again, it goes on")
    sub.add_argument("--seeds", type=int, default=5, help="how many; each is one of splits and of training")
    sub.add_argument("--names", help="comma-separated names of the arms; those of the files by default")
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="[ARM:]KEY=VALUE",
        dest="overrides",
        help="one key of all arms, or of one: lora:train.lr=5e-4 (may be repeated)",
    )
    sub.add_argument("--images", type=Path, help="folder that `file` is relative to; the CSV's own by default")
    sub.add_argument("--positive", help="name of the positive class, as for split")
    sub.add_argument("--fractions", help="share of rows per split, as for split; its defaults otherwise")
    sub.add_argument("--hold-split", action="store_true", help="one split for all seeds; only training differs")
    sub.add_argument(
        "--metric",
        default="augrc",
        help="what the best arm is chosen by, its mean over seeds on val_select: accuracy, mcc, augrc or gate_augrc",
    )
    sub.add_argument("--min-coverage", type=float, default=0.70, help="of the gate's two constraints")
    sub.add_argument(
        "--alpha",
        "--max-exit-error",
        type=float,
        default=0.01,
        dest="max_exit_error",
        help="of the gate's two constraints",
    )
    sub.add_argument("--replicates", type=int, default=2000, help="bootstrap resamples of whole groups")
    sub.add_argument("--level", type=float, default=0.95, help="nominal coverage of the intervals")
    sub.add_argument("--no-test", action="store_false", dest="test", help="leave val_test alone for now")
    sub.add_argument(
        "--second-look", action="store_true", help="read val_test again though another choice has; it is recorded"
    )


def _add_config(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--config", type=Path, help="YAML file with the keys below")
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="one key, for example train.epochs=4 (may be repeated)",
    )


def _add_bench(bench: argparse.ArgumentParser) -> None:
    """What can be measured, as subcommands of their own."""
    kinds = bench.add_subparsers(dest="bench", metavar="WHAT", required=True)
    _add_bench_latency(kinds)
    _add_bench_compare(kinds)
    text = "latency and throughput of Stage A, Stage B, always both, a full pass and the cascade, by deferral rate"
    sub = kinds.add_parser("cascade", help=text, description=f"L{text[1:]}.", formatter_class=_Formatter)
    # Left out, it must not undo a --json before the word "cascade".
    once = argparse.SUPPRESS
    sub.add_argument("--json", action="store_true", default=once, help="print the result as JSON on stdout")
    sub.set_defaults(run_station=_bench_cascade)
    which = sub.add_mutually_exclusive_group(required=True)
    which.add_argument("--bundle", type=Path, help="bundle folder")
    which.add_argument(
        "--run", type=Path, help="trained and calibrated run folder; its val_select images are the input"
    )
    sub.add_argument(
        "--runtime",
        help=f"what executes: {', '.join(RUNTIME_NAMES)}, torch; onnxruntime for a bundle, torch for a run by default",
    )
    sub.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64], metavar="N", help="batch sizes")
    sub.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=[step / 10 for step in range(11)],
        metavar="R",
        help="deferral rates to force: exactly round(R * N) rows of a batch go to Stage B",
    )
    sub.add_argument("--rounds", type=int, default=20, help="visits to each contestant, in shuffled order")
    sub.add_argument("--threads", type=int, default=0, help="threads of an operator; 0 = as the runtime has them")
    sub.add_argument("--seed", type=int, default=0, help="seed of orders, of deferred rows and of noise")
    sub.add_argument("--out", type=Path, help="folder for cascade.json and cascade.png")


def _add_continual(parent: argparse.ArgumentParser) -> None:
    parent.epilog = _CONTINUAL
    kinds = parent.add_subparsers(dest="continual", metavar="WHAT", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = kinds.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", formatter_class=_Formatter)
        # Left out, it must not undo a --json before the word.
        once = argparse.SUPPRESS
        sub.add_argument("--json", action="store_true", default=once, help="print the result as JSON on stdout")
        sub.add_argument("--root", type=Path, required=True, help="the loop's folder")
        sub.set_defaults(run_station=_continual)
        return sub

    sub = kinds.add_parser("plan", help="say how many audits see which harm", formatter_class=_Formatter,
                           description="Say how many audited exits tell which risk from the promised one.")  # fmt: skip
    sub.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="print the result as JSON on stdout"
    )
    sub.add_argument("--alpha", type=float, required=True, help="risk of exits that was promised")
    sub.add_argument("--harm", type=float, nargs="+", help="true risks to see; 1.5, 2, 3, 5 times alpha by default")
    sub.add_argument("--delta", type=float, default=0.05, help="chance of a false alarm")
    sub.add_argument("--power", type=float, default=0.8, help="wished chance to see the harm")
    sub.add_argument("--exit-rate", type=float, default=0.7, help="share of decisions that exit")
    sub.add_argument("--audit-rate", type=float, default=0.1, help="share of exits that are audited")
    sub.set_defaults(run_station=_plan_audits)

    sub = command("init", "begin a loop with the bundle of a run as its first champion")
    sub.add_argument("--run", type=Path, required=True, help="trained and calibrated run; proposals start from it")
    sub.add_argument("--bundle", type=Path, help="what the run was exported to; RUN/bundle by default")
    sub.add_argument("--alpha", type=float, help="risk of exits that is watched; what the policy promises by default")
    sub.add_argument("--store", help="postgresql://…, or a folder or file for SQLite; ROOT by default")
    sub.add_argument("--log", type=Path, help="folder that serving logs to; ROOT/log by default")
    sub.add_argument("--config", type=Path, help="YAML with loop:, rounds:, alerts: and metrics: of ROOT/loop.json")
    sub.add_argument("--by", help="who does it; the user's name by default")

    command("ingest", "put what serving logged into the store")
    sub = command("status", "say where the loop is, what serves, and whether the risk is kept")
    sub.add_argument("--page", type=Path, help="HTML page to write")
    sub.add_argument("--metrics", type=Path, metavar="FILE.prom", help="for Prometheus' textfile collector")
    sub.add_argument("--grafana", type=Path, metavar="FILE.json", help="dashboard of these metrics, to import")
    sub.add_argument(
        "--test-alert", action="store_true", help="send one to every hook of ROOT/loop.json; exit status 1: one failed"
    )
    sub = command("review", "answer on a local page what was selected for review")
    sub.add_argument("--reviewer", help="whose answers these are; the user's name by default")
    sub.add_argument("--port", type=int, default=0, help="port of 127.0.0.1; 0 = any free one")
    sub.add_argument("--no-browser", action="store_false", dest="browser", help="print the address, open nothing")
    sub = command("labels", "import or export labels")
    which = sub.add_mutually_exclusive_group(required=True)
    which.add_argument("--import", type=Path, dest="imported", metavar="FILE", help=".csv, or Label Studio's .json")
    which.add_argument("--export", type=Path, dest="exported", metavar="FILE", help=".csv, .json; a folder: Parquet")
    sub.add_argument(
        "--source", choices=["owner", "review", "match", "model"],
        help="the most that a file's labels are believed, whatever it says of itself; by default review for .json, and "
        "what each row says for .csv",
    )  # fmt: skip
    sub.add_argument("--annotator", help="of rows without one")
    sub = command("run", "take steps until one has to wait")
    sub.add_argument("--every", type=float, metavar="SECONDS", help="look again after so long, for good")
    command("propose", "begin a round now and go on up to its candidate")
    command("evaluate", "judge the candidate, and show the last verdict")
    sub = command("promote", "approve the candidate in the shadow")
    sub.add_argument("--candidate", help="first digits of its hash, to be sure")
    sub.add_argument("--by", help="who does it; the user's name by default")
    sub = command("rollback", "bring back the champion before, at once")
    sub.add_argument("--to", help="hash of an earlier champion; the one before by default")
    sub.add_argument("--by", help="who does it; the user's name by default")
    sub = command("audit", "verify the chain of all that was done")
    sub.add_argument("--export", type=Path, dest="exported", metavar="FILE", help="JSON lines to write")
    sub.add_argument("--file", type=Path, help="verify this export, not the store")
    sub.add_argument("--head", help="hash that was noted earlier and must be in the chain")
    _add_simulate(kinds)


def _add_simulate(kinds: Any) -> None:
    text = "let the loop live through thirty days of your photos, on a simulated clock"
    sub = kinds.add_parser(
        "simulate", help=text, description=f"L{text[1:]}.", formatter_class=_Formatter, epilog=_SIMULATE
    )
    sub.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="print the result as JSON on stdout"
    )
    sub.set_defaults(run_station=_simulate)
    sub.add_argument("--data", type=Path, required=True, help="folder with labels.csv, a CSV, or a folder per class")
    sub.add_argument("--out", type=Path, required=True, help="new folder for simulation.json, figures, run and loop")
    sub.add_argument("--run", type=Path, help="OUT/run of an earlier simulation of these photos and seed; not trained")
    sub.add_argument("--positive", help="name of the positive class, where it cannot be found")
    sub.add_argument("--backbone", default="tiny", help="tiny: learns from nothing; a folder: frozen under new heads")
    sub.add_argument("--image-size", type=int, help="side that the model sees; the backbone's own by default")
    sub.add_argument("--epochs", type=int, help="of the first champion's training; 30, of heads alone 200")
    sub.add_argument("--store", help="postgresql://… of an empty database; SQLite in OUT/loop by default")
    sub.add_argument("--past-share", type=float, help="of the photos, that the first champion learns from; .3")
    sub.add_argument("--days", type=int, help="30 by default")
    sub.add_argument(
        "--per-day", type=int, help="photos served a day; 260 by default; 0: so many that none comes twice"
    )
    sub.add_argument("--shift-day", type=int, help="from which on photos are changed; 5 by default")
    sub.add_argument("--protocol", help="what the validator does to them: crop224, letterbox224 (default)")
    sub.add_argument("--level", type=int, help="of that protocol; 3 by default")
    sub.add_argument("--alpha", type=float, help="risk of exits that is promised; .05 by default")
    sub.add_argument("--audit-rate", type=float, help="chance with which any photo is reviewed; .8 by default")
    sub.add_argument("--budget", type=int, help="answers a day that reviewers have time for; 260 by default")
    sub.add_argument(
        "--least-certify", type=int, help="labels since the last alarm that a round waits for; 800 by default"
    )
    sub.add_argument("--delay", type=float, help="days between a photo and its label, on average; 2 by default")
    sub.add_argument("--seed", type=int, help="of all that is drawn; 0 by default")
    sub.add_argument("--quick", action="store_true", help="6 days of 120 photos, shift on day 2: a look, no evidence")


def _add_streetvision(parent: argparse.ArgumentParser) -> None:
    parent.epilog = _STREETVISION
    kinds = parent.add_subparsers(dest="streetvision", metavar="WHAT", required=True)

    def command(name: str, text: str, handler: Callable[[argparse.Namespace], Any]) -> argparse.ArgumentParser:
        sub = kinds.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", formatter_class=_Formatter)
        # Left out, it must not undo a --json before the word.
        sub.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="print the result as JSON on stdout"
        )
        sub.set_defaults(run_station=handler)
        return sub

    sub = command("tune", "pick threshold and abstain band by the simulated reward, print the YAML", _tune)
    sub.epilog = _TUNE
    which = sub.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, help="calibrated run folder")
    which.add_argument("--bundle", type=Path, help="bundle folder; needs --labels and --out")
    sub.add_argument("--labels", type=Path, help="with --bundle: CSV with file,label[,group] of photos not trained on")
    sub.add_argument("--train-prior", type=float, help="share of positives in training; the run's own by default")
    sub.add_argument("--serve-prior", type=float, default=0.5, help="share of positives that is asked")
    sub.add_argument("--out", type=Path, help="record to write; RUN/streetvision.json by default")
    sub.add_argument("--settings", type=Path, help="YAML of the miner to write")
    sub.add_argument("--replicates", type=int, default=300, help="resamples of groups for the intervals")
    sub.add_argument("--seed", type=int, default=0, help="seed of folds, resamples and simulated rounds")

    sub = command("answer", "answer for photos as the miner would, to try its YAML", _streetvision_answer)
    sub.add_argument("--settings", type=Path, required=True, help="YAML of the miner")
    sub.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="photos")

    sub = command("launch", "register the detector, then run the miner's own entry point", _launch)
    sub.epilog = _LAUNCH
    sub.add_argument("--repo", type=Path, required=True, help="checkout of the miner's code")
    sub.add_argument(
        "--layout", choices=["auto", "base_miner", "natix"], default="auto", help="where its registry is; auto looks"
    )
    sub.add_argument("--settings", type=Path, help="YAML of the miner; names detector and YAML to the miner, too")
    sub.add_argument("--entry", default="neurons/miner.py", help="the miner's script, within its checkout")
    sub.add_argument("arguments", nargs="*", metavar="-- ARGUMENT", help="the miner's own")


def _add_bench_latency(kinds: Any) -> None:
    text = "what a service sees: p50 to p99 of single calls, bytes to decision, cold start, deferral rates, peers"
    sub = kinds.add_parser(
        "latency", help=text, description=f"W{text[1:]}.", formatter_class=_Formatter, epilog=_LATENCY
    )
    sub.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="print the result as JSON on stdout"
    )
    sub.set_defaults(run_station=_bench_latency)
    sub.add_argument("--bundle", type=Path, help="bundle folder")
    sub.add_argument(
        "--run", type=Path, help="run folder; alone it is measured in torch, beside --bundle it is for torch peers"
    )
    sub.add_argument(
        "--runtime",
        help=f"what executes: {', '.join(RUNTIME_NAMES)}, torch; onnxruntime for a bundle, torch for a run by default",
    )
    sub.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64], metavar="N", help="batch sizes")
    sub.add_argument(
        "--rates", type=float, nargs="+", default=[0.0, 0.1, 0.3, 0.5, 1.0], metavar="R",
        help="deferral rates to force; over the calls exactly this share of rows goes to Stage B",
    )  # fmt: skip
    sub.add_argument("--samples", type=int, default=1000, help="calls of each; a p99 takes 1,000")
    sub.add_argument("--warmup", type=float, default=200, metavar="MS", help="milliseconds before the first call")
    sub.add_argument("--limit", type=float, default=30, metavar="S", help="seconds a batch size may take at most")
    sub.add_argument("--quick", action="store_true", help="50 samples and one cold start: a look, not a measurement")
    sub.add_argument("--deferral", type=float, default=0.3, help="rate of requests, of throughput and of peers")
    sub.add_argument("--budget", type=float, default=50, metavar="MS", help="milliseconds the p99 of a batch may take")
    sub.add_argument("--photos", type=Path, help="encoded photos to answer from; drawn JPEGs of 1280 x 720 otherwise")
    sub.add_argument(
        "--against", type=lambda text: text.split(","), default=[], metavar="PEER[,PEER]",
        help="full passes on the same inputs: onnxruntime, torch-eager, torch-compile; one that cannot run says why",
    )  # fmt: skip
    sub.add_argument("--threads", type=int, default=0, help="threads of an operator; 0 = as the runtime has them")
    sub.add_argument("--seed", type=int, default=0, help="seed of orders, noise, deferred rows and resamples")
    sub.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of torch; cuda replays CUDA graphs")
    sub.add_argument("--trust-engines", action="store_true", help="run engines neither built here nor signed")
    sub.add_argument("--out", type=Path, help="folder for latency.json and latency.png")


def _add_bench_compare(kinds: Any) -> None:
    text = "two results of bench latency: ratios of their quantiles with bootstrap intervals"
    sub = kinds.add_parser("compare", help=text, description=f"T{text[1:]}.", formatter_class=_Formatter)
    sub.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="print the result as JSON on stdout"
    )
    sub.set_defaults(run_station=_bench_compare)
    sub.add_argument("first", type=Path, metavar="A.json", help="latency.json that is compared with")
    sub.add_argument("second", type=Path, metavar="B.json", help="latency.json that is judged; below 1 it is faster")
    sub.add_argument("--level", type=float, default=0.95, help="level of the intervals")
    sub.add_argument("--out", type=Path, help="JSON file to write")


_Command = Callable[[str, str, Callable[[argparse.Namespace], Any]], argparse.ArgumentParser]


def _add_receiving(command: _Command) -> None:
    sub = command("verify", "check a bundle from elsewhere: hashes, limits, signature, engines; runs nothing", _verify)
    sub.epilog = _VERIFY
    sub.add_argument("bundle", type=Path, help="bundle folder")
    sub.add_argument("--require-signature", action="store_true", help="refuse it unless a trusted key signed it")
    sub.add_argument("--trust-engines", action="store_true", help="say what would run if its engines were trusted")

    sub = command("sign", "sign a bundle with an Ed25519 key: writes bundle.sig", _sign)
    sub.epilog = (
        "changing or exporting a bundle afterwards voids its signature.\n\n  stage1 sign RUN/bundle --key maker.key"
    )
    sub.add_argument("bundle", type=Path, help="bundle folder")
    sub.add_argument("--key", type=Path, required=True, help="PEM file of the private key; `stage1 keys new` makes one")

    sub = command("keys", "make keys for signing, and say whose bundles' engines may run here", _keys)
    sub.epilog = _KEYS
    sub.add_argument("action", choices=["new", "trust", "list", "forget"], help="what to do")
    sub.add_argument("key", nargs="?", help="new: file to write; trust: the .pub file; forget: identifier or name")
    sub.add_argument("--name", help="trust: what messages call the key; the file's name by default")

    sub = command("migrate", "write a bundle of an older format anew in today's", _migrate)
    sub.add_argument("bundle", type=Path, help="bundle folder; it stays as it is")
    sub.add_argument("--out", type=Path, required=True, help="folder to write")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; return its exit code."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.version:
        from stage1_pro import __version__

        print(__version__)
        return 0
    if options.command is None:
        parser.print_help()
        return 2
    try:
        return int(options.run_station(options) or 0)
    except Stage1Error as error:
        return _fail(error, as_json=options.json)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        extra = "train" if package in _TRAIN_PACKAGES else "continual" if package in _CONTINUAL_PACKAGES else None
        if extra is None:
            raise
        return _fail(need(extra, package), as_json=options.json)
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept", file=sys.stderr)
        return 130
    except ImportError as error:
        return _fail(DependencyError(f"a library cannot be loaded: {error}; see `stage1 doctor`"), as_json=options.json)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            sys.stderr.close()
            return 0
        where = f"{error.filename} " if error.filename else ""
        return _fail(InputError(f"{where}cannot be used: {error.strerror or error}"), as_json=options.json)


def _fail(error: Stage1Error, *, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"error": str(error), "kind": type(error).__name__, "exit_code": error.exit_code}))
    kind = "not reachable" if isinstance(error, NotReachableError) else "error"
    print(f"stage1: {kind}: {error}", file=sys.stderr)
    return error.exit_code


def _emit(options: argparse.Namespace, data: Any, text: str) -> None:
    print(json.dumps(_strict(data), default=str, allow_nan=False) if options.json else text)


def _strict(data: Any) -> Any:
    """The same with null for NaN and infinities, which are no JSON."""
    if isinstance(data, dict):
        return {key: _strict(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_strict(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _run(cls: type[Command], options: argparse.Namespace) -> int:
    found = cls.of_flags(vars(options)).run()
    _emit(options, found.record, found.text)
    return found.exit_code


def _fractions(text: str) -> dict[str, float]:
    try:
        return {key.strip(): float(value) for key, _, value in (part.partition("=") for part in text.split(","))}
    except ValueError:
        raise InputError(
            f"--fractions must be like train=.6,val_select=.1,val_calib=.15,val_test=.15, got '{text}'"
        ) from None


def _given_config(options: argparse.Namespace) -> Config | None:
    from stage1_pro.config import load_config

    overrides = [*options.overrides, *([f"train.mode={options.mode}"] if getattr(options, "mode", None) else [])]
    return load_config(options.config, overrides) if options.config is not None or overrides else None


def _explora(options: argparse.Namespace) -> None:
    from stage1_pro.training.exploration import explora, render

    record = explora(
        options.images,
        options.run,
        _given_config(options),
        base=options.base,
        resume=options.resume,
        overwrite=options.overwrite,
    )
    _emit(options, record.model_dump(mode="json"), render(record, options.run))


def _train(options: argparse.Namespace) -> None:
    config = _given_config(options)
    # Tell mistakes before the seconds that torch takes to load.
    from stage1_pro.training.run import check_run

    given_flags = {"resume": options.resume, "overwrite": options.overwrite, "explora": options.explora}
    check_run(options.run, config, **given_flags)
    from stage1_pro.training.loop import train

    result = train(options.run, config, **given_flags)
    best = result.best
    _emit(
        options,
        {**asdict(result), "run": str(result.run)},
        f"trained {result.epochs} epochs in {result.seconds:.0f} s; best epoch {result.best_epoch + 1}: "
        f"accuracy {best['accuracy']:.4f}, AUROC {best['auroc']:.4f}, AUGRC {best['augrc']:.5f} on val_select\n"
        f"wrote {result.run}/model_best.pth; next: stage1 calibrate --run {result.run}",
    )


def _compare(options: argparse.Namespace) -> None:
    from stage1_pro.studies.comparing import compare, read_arms, render

    names = [name.strip() for name in options.names.split(",")] if options.names else None
    arms = read_arms(options.config, names=names, overrides=options.overrides, study=options.study)
    found, tested = compare(
        options.out,
        options.data,
        arms,
        seeds=options.seeds,
        images=options.images,
        positive=options.positive,
        fractions=_fractions(options.fractions) if options.fractions else None,
        hold_split=options.hold_split,
        metric=options.metric,
        min_coverage=options.min_coverage,
        max_exit_error=options.max_exit_error,
        n_replicates=options.replicates,
        level=options.level,
        test=options.test,
        second_look=options.second_look,
    )
    both = {"val_select": found.model_dump(mode="json"), "val_test": tested and tested.model_dump(mode="json")}
    _emit(options, both, f"{render(found, tested)}\nwrote {options.out}/compare.json, compare.csv, compare.md, figures")


def _calibrate(options: argparse.Namespace) -> None:
    from stage1_pro.training.calibration import calibrate, render

    policy = calibrate(
        options.run,
        logits=options.logits,
        policy=options.policy,
        guarantee=options.guarantee,
        target_fnr=options.target_fnr,
        max_exit_error=options.max_exit_error,
        min_coverage=options.min_coverage,
        alpha=options.alpha,
        variant=options.variant,
        loss=options.loss,
        score=options.score,
        cells=options.cells,
        allow_empty=options.allow_empty,
        delta=options.delta,
        claims=options.claims,
        positive=options.positive,
        out=options.out,
    )
    _emit(options, policy.model_dump(mode="json"), render(policy))


def _evaluate(options: argparse.Namespace) -> int:
    if options.protocol is not None:
        return _evaluate_protocol(options)
    if options.photo_seed is not None:
        raise InputError(
            "--photo-seed must stand beside --protocol, got no protocol; photos are not changed without one"
        )
    from stage1_pro.training.evaluation import evaluate
    from stage1_pro.training.summary import render

    evaluation = evaluate(options.run, n_replicates=options.replicates, seed=options.seed, beside=options.beside)
    _emit(options, evaluation.model_dump(mode="json"), render(evaluation))
    broken = any(one.outcome == "FAIL" for one in evaluation.exit_promises) or (
        evaluation.verification is not None and evaluation.verification.outcome == "FAIL"
    )
    # Who promised nothing breaks nothing, and one calibration refutes no average over many.
    return PROMISE_FAILED if broken and evaluation.guarantee not in ("none", "expectation") else 0


def _evaluate_protocol(options: argparse.Namespace) -> int:
    from stage1_pro.training.robustness import evaluate_protocol, render

    if options.beside:
        raise InputError("--beside must stand without --protocol, got both; costs do not depend on the photos")
    found = evaluate_protocol(
        options.run,
        options.protocol,
        n_replicates=options.replicates,
        seed=options.seed,
        photo_seed=options.photo_seed or 0,
    )
    _emit(options, found.model_dump(mode="json"), render(found))
    return 0


def _metrics(options: argparse.Namespace) -> None:
    from stage1_pro.studies.measuring import measure, render

    names = [name.strip() for name in options.metrics.split(",") if name.strip()]
    found = measure(
        options.file,
        compare_with=options.compare,
        positive=options.positive,
        threshold=options.threshold,
        metrics="all" if names == ["all"] else names,
        n_replicates=options.replicates,
        level=options.level,
        method=options.method,
        seed=options.seed,
        out=options.out,
    )
    _emit(options, found.model_dump(mode="json"), render(found))


def _add_recipe(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--recipe", type=Path, help="YAML engine recipe, see engines/; the default recipe otherwise")
    sub.add_argument(
        "--precision",
        nargs="+",
        default=[],
        choices=["fp32", "fp16", "bf16", "res32", "int8", "fp8"],
        metavar="PRECISION",
        help="fp32, res32 (fp16 products on an fp32 residual stream), fp16 or bf16: the first is of the engines, and a "
        "runtime steps down to the others; without engines, graphs to write beside fp32",
    )


def _export(options: argparse.Namespace) -> None:
    from stage1_pro.deploy.exporting import export
    from stage1_pro.deploy.inspection import inspect

    bundle = export(
        options.run,
        options.out,
        target=options.target,
        recipe=options.recipe,
        precisions=options.precision,
        overwrite=options.overwrite,
    )
    _emit(options, inspect(bundle), f"wrote {bundle}; next: stage1 predict --bundle {bundle} IMAGES")


def _build(options: argparse.Namespace) -> None:
    from stage1_pro.deploy.building import build
    from stage1_pro.deploy.inspection import inspect

    bundle = build(
        options.bundle,
        options.out,
        target=options.target,
        recipe=options.recipe,
        precisions=options.precision,
        overwrite=options.overwrite,
    )
    _emit(options, inspect(bundle), f"wrote {bundle}; next: stage1 inspect {bundle}")


def _predict(options: argparse.Namespace) -> int:
    from stage1_pro.deploy.prediction import load, predict
    from stage1_pro.policies.promises import check_prior

    check_prior(options.prior)
    cascade = load(options.bundle, options.runtime, trust_engines=options.trust_engines)
    found = predict(cascade, options.inputs, out=options.out, batch_size=options.batch_size, log=options.log)
    started = {"runtime": cascade.runtime.name, "steps": [asdict(step) for step in cascade.steps]}
    return _answered(options, options.bundle, *found, started)


def _infer(options: argparse.Namespace) -> int:
    from stage1_pro.deploy.prediction import infer
    from stage1_pro.policies.promises import check_prior

    check_prior(options.prior)
    found = infer(options.run, options.inputs, split=options.split, out=options.out, batch_size=options.batch_size)
    return _answered(options, options.run, *found)


def _answered(
    options: argparse.Namespace,
    source: Path,
    rows: list[dict[str, Any]],
    failures: int,
    started: dict[str, Any] | None = None,
) -> int:
    from stage1_pro.deploy.prediction import count, promised, render

    found = promised(source, options.prior)
    data = {"rows": rows, "failures": failures, **count(rows), "promise": asdict(found), **(started or {})}
    _emit(options, data, render(rows, options.out, found))
    return 1 if failures else 0


def _plan_audits(options: argparse.Namespace) -> None:
    from stage1_pro.continual.watch.power import plan_audits, render

    found = plan_audits(
        options.alpha, harms=options.harm, delta=options.delta, power=options.power, exit_rate=options.exit_rate,
        audit_rate=options.audit_rate,
    )  # fmt: skip
    _emit(options, found.model_dump(mode="json"), render(found))


def _continual(options: argparse.Namespace) -> int:
    import getpass

    from stage1_pro.continual.loop import folder as station

    what, root = options.continual, options.root
    by = getattr(options, "by", None) or getpass.getuser()
    if what == "review":
        from stage1_pro.continual.ledger.reviewing import render, review

        with station.opened(root) as (config, *_):
            store, log = config.store, config.log
        answered = review(store, Path(log), reviewer=options.reviewer, port=options.port, browser=options.browser)
        _emit(options, answered, render(answered))
        return 0
    found: dict[str, Any] = {
        "init": lambda: station.init(
            root, options.run, bundle=options.bundle, alpha=options.alpha, store=options.store, log=options.log,
            config=options.config, by=by,
        ),
        "ingest": lambda: station.ingest_log(root),
        "status": lambda: station.status(
            root, page=options.page, metrics=options.metrics, grafana=options.grafana, test_alert=options.test_alert,
        ),
        "labels": lambda: station.labels(
            root, imported=options.imported, exported=options.exported, source=options.source,
            annotator=options.annotator,
        ),
        "run": lambda: station.run(root, every=options.every),
        "propose": lambda: station.run(root, manual=True, until="EVALUATE"),
        "evaluate": lambda: station.evaluate(root),
        "promote": lambda: station.promote(root, candidate=options.candidate, by=by),
        "rollback": lambda: station.rollback(root, to=options.to, by=by),
        "audit": lambda: station.audit(root, exported=options.exported, file=options.file, head=options.head),
    }[what]()  # fmt: skip
    _emit(options, found, station.render(what, found))
    return int(not all(one["delivered"] for one in found.get("deliveries", ())))


def _simulate(options: argparse.Namespace) -> None:
    from stage1_pro.studies.simulation import QUICK, render, simulate

    names = ("epochs", "past_share", "days", "per_day", "shift_day", "protocol", "level", "alpha", "audit_rate",
             "budget", "least_certify", "seed")  # fmt: skip
    given = {name: getattr(options, name) for name in names} | {"delay_days": options.delay}
    found = simulate(
        options.data, options.out, run=options.run, positive=options.positive, backbone=options.backbone,
        image_size=options.image_size, store=options.store,
        **(QUICK if options.quick else {}) | {name: value for name, value in given.items() if value is not None},
    )  # fmt: skip
    _emit(options, found.model_dump(mode="json"), render(found))


def _review(options: argparse.Namespace) -> None:
    from stage1_pro.continual.ledger.reviewing import render, review

    def ready(url: str) -> None:
        # Whoever starts the page from a program waits for this line.
        if options.json:
            print(json.dumps({"url": url}), flush=True)

    found = review(
        options.store,
        options.log,
        reviewer=options.reviewer,
        port=options.port,
        lease=options.lease,
        blind=options.blind,
        browser=options.browser,
        purge=options.purge,
        ready=ready,
    )
    _emit(options, found, render(found))


def _bench_cascade(options: argparse.Namespace) -> None:
    from stage1_pro.commands.bench import BenchCascade, render_cascade
    from stage1_pro.deploy.bench import bench_cascade

    found = bench_cascade(_asked(BenchCascade, options))
    _emit(options, found.model_dump(mode="json"), render_cascade(found))


def _asked(kind: Any, options: argparse.Namespace) -> Any:
    return kind(**{field.name: getattr(options, field.name) for field in dataclasses.fields(kind)})


def _tune(options: argparse.Namespace) -> None:
    from stage1_pro.integrations.streetvision.tuning import render, tune, yaml_of

    found = tune(
        options.run,
        bundle=options.bundle,
        labels=options.labels,
        train_prior=options.train_prior,
        serve_prior=options.serve_prior,
        out=options.out,
        settings=options.settings,
        n_replicates=options.replicates,
        seed=options.seed,
    )
    _emit(options, {**found.model_dump(mode="json"), "yaml": yaml_of(found)}, render(found))


def _streetvision_answer(options: argparse.Namespace) -> None:
    from stage1_pro.integrations.streetvision import Settings, StreetVision

    absent = [path for path in options.images if not path.is_file()]
    if absent:
        raise InputError(f"images must be files, got {absent[0]}, which is none; nothing was answered")
    miner = StreetVision(Settings.read(options.settings))
    answers = {str(path): miner.answer(path.read_bytes()) for path in options.images}
    _emit(options, answers, "\n".join(f"{value:>9.6f}  {path}" for path, value in answers.items()))


def _launch(options: argparse.Namespace) -> int:
    from stage1_pro.integrations.streetvision import launch

    try:
        launch(options.repo, options.arguments, layout=options.layout, settings=options.settings, entry=options.entry)
    except Stage1Error:
        raise
    except Exception:  # noqa: BLE001  the miner's own, which no message of ours explains
        traceback.print_exc()
        return 1
    return 0


def _bench_latency(options: argparse.Namespace) -> None:
    from stage1_pro.commands.bench import BenchLatency, render_latency
    from stage1_pro.deploy.bench import bench_latency

    found = bench_latency(_asked(BenchLatency, options))
    _emit(options, found.model_dump(mode="json"), render_latency(found))


def _bench_compare(options: argparse.Namespace) -> None:
    from stage1_pro.commands.bench import render_comparison
    from stage1_pro.deploy.bench import compare_latency

    found = compare_latency(options.first, options.second, level=options.level, out=options.out)
    _emit(options, found.model_dump(mode="json"), render_comparison(found))


def _verify(options: argparse.Namespace) -> None:
    from stage1_pro.deploy.receiving import render, verify

    facts = verify(options.bundle, require_signature=options.require_signature, trust_engines=options.trust_engines)
    _emit(options, facts, render(facts))


def _sign(options: argparse.Namespace) -> None:
    from stage1_pro.deploy.receiving import sign

    done = sign(options.bundle, options.key)
    _emit(options, done, f"wrote {done['path']}/{done['file']}, signed by key {done['key_id']}")


def _keys(options: argparse.Namespace) -> None:
    from stage1_pro.deploy import trust

    if (options.key is None) != (options.action == "list"):
        raise InputError(
            f"key must {'not ' * (options.action == 'list')}be given for `keys {options.action}`; see --help"
        )
    if options.name is not None and options.action != "trust":
        raise InputError(f"--name must go with `keys trust`, got `keys {options.action}`")
    if options.action == "list":
        keys = trust.trusted_keys()
        lines = [f"{key.key_id}  {key.name}" for key in keys] or ["no key is trusted; stage1 keys trust FILE.pub"]
        _emit(options, {"folder": str(trust.config_folder()), "keys": [k.model_dump() for k in keys]}, "\n".join(lines))
    elif options.action == "new":
        made = trust.new_key(options.key)
        _emit(
            options,
            {"key_id": made, "private": options.key, "public": f"{options.key}.pub"},
            f"wrote {options.key} (keep it to yourself) and {options.key}.pub (hand it out): key {made}",
        )
    else:
        key = (
            trust.forget_key(options.key) if options.action == "forget" else trust.trust_key(options.key, options.name)
        )
        text = "is trusted no longer" if options.action == "forget" else "is trusted: engines it signed run here"
        _emit(options, key.model_dump(), f"key {key.key_id} '{key.name}' {text}")


def _migrate(options: argparse.Namespace) -> None:
    from stage1_pro.deploy.receiving import migrate

    done = migrate(options.bundle, options.out)
    lines = [f"wrote {done['out']}, format {done['format_version']}", *done["notes"]]
    if done["signature_dropped"]:
        lines.append("the signature was of the old manifest and stayed behind; sign the new bundle")
    _emit(options, done, "\n".join(lines))


def _inspect(options: argparse.Namespace) -> None:
    from stage1_pro.deploy.inspection import inspect, render

    facts = inspect(options.bundle)
    _emit(options, facts, render(facts))


def _demo(options: argparse.Namespace) -> None:
    from stage1_pro.commands.demo import demo

    result = demo(options.out, seed=options.seed)
    _emit(options, result, f"open {result['report']}")


if __name__ == "__main__":
    sys.exit(main())
