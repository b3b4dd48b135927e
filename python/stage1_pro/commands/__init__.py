"""Commands: one light file each. This is their list, so that root help imports none of them.

A summary is the first line of its command's docstring. Commands from elsewhere are entry points of the group
``stage1_pro.commands``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stage1_pro.command import Command

GROUP = "stage1_pro.commands"
# Name on the command line: home and summary, in the order of root help.
COMMANDS: dict[str, tuple[str, str]] = {
    "split": (".split:Split", "cut labelled images into train, val_select, val_calib and val_test"),
    "explora": (".train:Explora", "adapt the backbone to unlabelled images, and keep it where that helps"),
    "train": (".train:Train", "train both stages on the splits of a run"),
    "compare": (".compare:Compare", "train configurations alike but for their keys, over seeds, and compare them"),
    "merge": (".merge:Merge", "write the plain backbone that an adapter makes of its base"),
    "plan": (".plan:Plan", "say how many calibration rows a promise takes, and what rows you have can promise"),
    "calibrate": (".calibrate:Calibrate", "choose the exit policy on val_calib"),
    "certify": (".certify:Certify", "label photos on a local page until a promise of the exits is proven"),
    "evaluate": (".evaluate:Evaluate", "measure the best model and its policy on val_test, once it is final"),
    "metrics": (".metrics:Metrics", "measure anybody's predictions: AUGRC and the suite with intervals, no model"),
    "infer": (".predict:Infer", "answer for images or a split with a run's own model in torch, before any export"),
    "export": (".export:Export", "write the bundle: ONNX per stage, engines, exactly one policy"),
    "build": (".export:Build", "compile engines on this machine from a received bundle's graphs, into a new bundle"),
    "predict": (".predict:Predict", "answer for images with a bundle (needs no torch)"),
    "review": (".continual:Review", "answer on a local page what was selected for review while serving"),
    "bench cascade": (".bench:BenchCascade", "time both stages, a full pass and the cascade, by deferral rate"),
    "bench latency": (".bench:BenchLatency", "time single calls, p50 to p99: bytes to decision, cold start, peers"),
    "bench compare": (".bench:CompareLatency", "compare two results of bench latency by ratios of quantiles"),
    "continual plan": (".continual:PlanAudits", "say how many audited exits tell which risk from the limit"),
    "continual init": (".continual:Init", "begin a loop with the bundle of a run as its first champion"),
    "continual ingest": (".continual:Ingest", "put what serving logged into the store"),
    "continual status": (".continual:Status", "say where the loop is, what serves, and whether the risk is kept"),
    "continual review": (".continual:ReviewLoop", "answer on a local page what was selected for review"),
    "continual labels": (".continual:Labels", "import or export labels"),
    "continual run": (".continual:Run", "take steps until one has to wait"),
    "continual propose": (".continual:Propose", "begin a round now and go on up to its candidate"),
    "continual evaluate": (".continual:EvaluateCandidate", "judge the candidate, and show the last verdict"),
    "continual promote": (".continual:Promote", "approve the candidate in the shadow"),
    "continual rollback": (".continual:Rollback", "bring back the champion before, at once"),
    "continual compact": (".continual:Compact", "remove what the loop no longer needs"),
    "continual audit": (".continual:Audit", "verify the chain of all that was done"),
    "continual simulate": (".simulate:Simulate", "let the loop live through days of your photos on a simulated clock"),
    "streetvision tune": (".streetvision:Tune", "pick threshold and abstain band by the simulated reward"),
    "streetvision answer": (".streetvision:Answer", "answer for photos as the miner would, to try its YAML"),
    "streetvision launch": (".streetvision:Launch", "register the detector, then run the miner's own entry point"),
    "verify": (".bundle:Verify", "check a bundle from elsewhere: hashes, limits, signature, engines; runs nothing"),
    "sign": (".bundle:Sign", "sign a bundle with an Ed25519 key: writes bundle.sig"),
    "keys": (".bundle:Keys", "make keys for signing, and say whose bundles' engines may run here"),
    "migrate": (".bundle:Migrate", "write a bundle of an older format anew in today's"),
    "inspect": (".bundle:Inspect", "say what a bundle is, what it promises and for which GPUs"),
    "doctor": (".doctor:Doctor", "print versions, devices, compiled modules, builders, and what is missing"),
    "demo": (".demo:Demo", "run every command on rendered street scenes (minutes, no data needed)"),
    "help": (".help:Help", "print a page of the manual, or the list of pages"),
}
# The word before a command's own: its summary, and its page of the manual.
FAMILIES: dict[str, tuple[str, str]] = {
    "bench": ("measure what an exit saves on this machine", "latency"),
    "continual": ("keep learning from labels, and promote only what is better", "loop"),
    "streetvision": ("mine on NATIX StreetVision with a bundle: tune, answer, launch", "streetvision"),
}


def load(home: str) -> type[Command]:
    """The command at ``module:class``; a module that begins with a dot is of this folder."""
    module, _, name = home.partition(":")
    found: type[Command] = getattr(importlib.import_module(module, __name__), name)
    return found


def outside() -> dict[str, str]:
    """Names and homes of commands that other installed packages bring."""
    from importlib.metadata import entry_points

    return {point.name: point.value for point in entry_points(group=GROUP) if point.name not in COMMANDS}
