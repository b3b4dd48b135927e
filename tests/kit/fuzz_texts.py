"""Texts that people hand in, mutated by their grammar: YAML, CSV and Label Studio's JSON; see ``fuzz.py``."""

from __future__ import annotations

import codecs
import json

import numpy as np
import yaml
from PIL import Image

from kit.fuzz_bundles import INTERESTING, at_path, mutate_bytes, mutate_json, paths_of


def some(rng, choices, most=3):
    return [rng.choice(choices) for _ in range(rng.randint(1, most))]


def encoded(rng, text):
    """Text as some program would write it, or as none should."""
    kind = rng.randrange(12)
    data = text.encode("utf-8", "surrogatepass")
    if kind == 0:
        return text.encode(rng.choice(("utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "utf-7")), "replace")
    if kind == 1:
        return codecs.BOM_UTF8 + data
    if kind == 2:
        return data.replace(b"\n", rng.choice((b"\r\n", b"\r", b"\0", b"\n\n\n")))
    if kind == 3:
        return mutate_bytes(rng, data)
    return data


# --------------------------------------------------------------------------------------------
# YAML


class Yaml:
    """A configuration, its overrides, an engine's recipe, a miner's settings, a loop's."""

    def __init__(self, folder):
        from stage1_pro.config import Config
        from stage1_pro.continual.loop.config import RoundsConfig
        from stage1_pro.continual.watch.status import MonitorConfig
        from stage1_pro.deploy.engine import EngineRecipe
        from stage1_pro.integrations.streetvision.answering import Settings

        rounds = RoundsConfig(monitor=MonitorConfig(alpha=0.1)).model_dump(mode="json")
        self.path = folder / "x.yaml"
        self.seeds = {
            "config": Config().model_dump(mode="json"),
            "recipe": EngineRecipe(target="rtx").model_dump(mode="json"),
            "miner": Settings(bundle="b").model_dump(mode="json"),
            "loop": {"rounds": rounds, "alerts": {"webhooks": ["https://x.example/1"]}, "metrics": "m.prom"},
        }

    def make(self, rng):
        name = rng.choice(sorted(self.seeds))
        values, kinds = self.seeds[name], [name]
        if rng.random() < 0.6:
            kinds.append("values")
            text = mutate_json(rng, json.dumps(values).encode()).decode("utf-8", "surrogatepass")
            if rng.random() < 0.5:
                try:
                    text = yaml.safe_dump(
                        json.loads(text), allow_unicode=True, default_flow_style=rng.choice((None, False))
                    )
                except (ValueError, yaml.YAMLError, RecursionError):
                    kinds.append("as it was")
        else:
            text = yaml.safe_dump(values, sort_keys=False)
        for _ in range(rng.choice((0, 1, 1, 2))):
            kinds.append("text")
            text = self.rewrite(rng, text)
        self.path.write_bytes(encoded(rng, text))
        if name == "config" and rng.random() < 0.3:
            kinds[0] = "override"
            key = rng.choice(
                ("seed", "train.lr", "a" + ".a" * rng.choice((1, 100, 3000)), "", "=", "model.backbone", "\x1b[31m")
            )
            return (name, f"{key}={text[: rng.choice((20, 2000, 10**6))]}"), kinds
        return (name, None), kinds

    def rewrite(self, rng, text):
        lines = text.split("\n")
        at = rng.randrange(len(lines))
        key = lines[at].split(":")[0] or "x"
        many = rng.choice((3, 45, 3000))
        value = rng.choice((
            "&a [*a]", "*nobody", "!!binary x", "!!python/object/apply:os.system [id]", "!!int ''", "!!float x",
            "!!bool x",
            "!!timestamp x", "!!set {a}", "!!omap [a]", "!!pairs [[a]]", "!!null x", "!!merge x", "!!str {a: b}",
            "!x y", "0x" + "f" * many,
            "9" * many, "1:30:15", "1e" + "9" * many, ".inf", "-.nan", "2026-12-01", "2026-99-99 99:99:99", "0o7",
            "|\n  a\n b",
            "[" * many + "]" * many, "{a: " * many + "1" + "}" * many, "? " * many, "- " * many, "'" + "x" * many * 30,
            '"\\x', "\t", "%YAML 9.9",
            "--- a\n--- b", "...", "{<<: {a: 1}, a: 2}", "[" + "1," * many + "]",
            "{" + "".join(f"k{i}: 1, " for i in range(many)) + "}",
            "".join(f"\n  k{i}: {i}" for i in range(many * 3)), "~user/x", "\x07", "\u2028", "\U0010ffff", "@x", "`x",
            "# x", "<<: *a", "<<: [1]",
        ))  # fmt: skip
        kind = rng.randrange(6)
        if kind == 0:
            lines.insert(at, lines[rng.randrange(len(lines))])
        elif kind == 1:
            lines[at] = rng.choice((" ", "\t", "- ", "")) * rng.choice((1, 2, 50)) + lines[at]
        elif kind == 2:
            lines = ["a: &a [x,x,x,x,x,x,x,x,x]", *(f"b{i}: &b{i} [{','.join(['*a'] * 9)}]" for i in range(8)), *lines]
        elif kind == 3:
            lines += [f"{rng.choice(('seed', 'k', '? '))}{i}: {i}" for i in range(rng.choice((10, 3000, 30_000)))]
        else:
            lines[at] = f"{key}: {value}"
        return "\n".join(lines)

    def read(self, what):
        from stage1_pro.config import load_config
        from stage1_pro.continual.loop import folder
        from stage1_pro.deploy.engine import choose_recipe
        from stage1_pro.integrations.streetvision.answering import Settings

        name, override = what
        if override is not None:
            load_config(None, [override])
        elif name == "config":
            load_config(self.path)
        elif name == "recipe":
            choose_recipe(None, self.path)
        elif name == "miner":
            Settings.read(self.path)
        else:
            folder._described(folder._read_config(self.path), {"store": "s", "log": "l"}, 0.1)


# --------------------------------------------------------------------------------------------
# CSV

CELLS = (
    "", " ", "0", "1", "-1", "0.5", "0,5", "1e309", "-0.0", "nan", "inf", "1e-400", "9" * 5000, "0x10", "1_000",
    "none", "NONE", "roadwork",
    '"', '""', "'", "=cmd|' /C calc'!A0", "\x1b[31m", "\u202e", "\0", "\ud800", "e\u0301", "../../etc/passwd",
    "/dev/zero", "a" * 140_000,
    "a\nb", "a;b", "a\tb", "1.png", "2.PNG", "2026-12-01T00:00:00Z", "2026-12-01", "9999999999999999999", "review",
    "owner", "e0", "e1", "٣", "½",
)  # fmt: skip


TABLES = {
    "labels": [["file", "label", "label_name", "group", "source"], *([f"{i}.png", str(i % 2), "", f"g{i // 3}",
    "a"] for i in range(12))],
    "list": [["file"], *([f"{i}.png"] for i in range(8))],
    "predictions": [["label", "prob", "group", "id"], *([("none", "roadwork")[i % 2], str(i / 20), str(i // 2),
    str(i)] for i in range(20))],
    "classes": [["label", "prob_a", "prob_b", "prob_c"], *(["abc"[i % 3], "0.2", "0.3",
    "0.5"] for i in range(12))],
    "errors": [["error", "confidence"], *([str(i % 2), str(i / 20)] for i in range(20))],
    "answers": [["event_id", "label", "source", "annotator", "time"], *([f"e{i}", "none", "review", "x",
    str(i)] for i in range(3))],
}  # fmt: skip


class Csv:
    """Label tables, lists of photos, predictions, and labels of a loop."""

    def __init__(self, folder):
        self.seeds, self.path, self.store = TABLES, folder / "x.csv", loop_store(folder)
        for i in range(12):
            Image.new("RGB", (2, 2), (i, i, i)).save(folder / f"{i}.png")

    def make(self, rng):
        name = rng.choice(sorted(self.seeds))
        rows, kinds = [list(row) for row in self.seeds[name]], [name]
        kinds += [self.change(rng, rows) for _ in range(rng.choice((1, 1, 2, 4)))]
        delimiter = rng.choice((",", ",", ",", ";", "\t", "|"))
        quote = rng.choice((False, False, True))
        lines = []
        for row in rows:
            cells = [
                '"' + cell.replace('"', '""') + '"' if quote or set(cell) & {delimiter, "\n"} else cell for cell in row
            ]
            lines.append(delimiter.join(cells))
        text = rng.choice(("\n", "\n", "\r\n")).join(lines) + rng.choice(("\n", "\n", "", "\n\n\n", "\x1a", '"'))
        text = text[: 2**24]  # a long cell of many rows
        if rng.random() < 0.05:
            text = text[: rng.randrange(len(text) + 1)]
        self.path.write_bytes(encoded(rng, text))
        return name, kinds

    def change(self, rng, rows):
        row = rng.choice(rows)
        kind = rng.choice(("cell", "cell", "cell", "header", "ragged", "rows", "columns", "column", "shuffle", "many"))
        if kind == "cell" and row:
            row[rng.randrange(len(row))] = rng.choice(CELLS)
        elif kind == "header" and rows[0]:
            other = rng.choice(rng.choice(sorted(self.seeds.items()))[1][0])
            rows[0][rng.randrange(len(rows[0]))] = rng.choice(
                (rng.choice(CELLS), rng.choice(rows[0]), other, other.upper(), f" {other} ")
            )
        elif kind == "ragged":
            row[:] = row + some(rng, CELLS) if rng.random() < 0.5 else row[: rng.randrange(len(row) + 1)]
        elif kind == "rows":
            rows[1:] = rng.choice(([], rows[1:2], rows[1:] * 2, rows[1:][::-1], [[]]))
        elif kind == "columns":
            place = rng.randrange(len(rows[0]) + 1)
            for one in rows:
                one.insert(place, rng.choice(CELLS[:12]))
        elif kind == "column" and rows[0]:
            place, cell = rng.randrange(len(rows[0])), rng.choice(CELLS)
            for one in rows[1:]:
                if place < len(one):
                    one[place] = cell
        elif kind == "shuffle":
            rng.shuffle(rows)
        elif kind == "many":
            count = rng.choice((100, 3000))
            if rng.random() < 0.5:
                rows += [list(row) for _ in range(count)]
            else:
                for one in rows[:3]:
                    one += [f"c{i}" for i in range(count)]
        return kind

    def read(self, name):
        from stage1_pro.continual.ledger.exchange import import_csv
        from stage1_pro.data.labels import classes_of, read_labels, read_list

        if name == "labels":
            classes_of(read_labels(self.path)[1], None)
        elif name == "list":
            read_list(self.path)
        elif name == "answers":
            import_csv(self.store, self.path, now=99.0, source="review", annotator="x")
        else:
            measured(self.path)


def measured(path):
    """As ``stage1 metrics`` reads it; of every eighth file all metrics, on fewer resamples than are usual."""
    from stage1_pro.commands.metrics import measure
    from stage1_pro.studies.measuring import read_predictions

    if path.stat().st_size % 8:
        read_predictions(path)
    else:
        measure(path, n_replicates=20)


def loop_store(folder):
    from stage1_pro.continual.ledger.labels import add_events
    from stage1_pro.continual.ledger.store import Store
    from stage1_pro.continual.serving.events import Event

    store = Store(folder / "loop.db")
    add_events(store, [
        Event(
            id=f"e{index}", time=float(index), bundle="b" * 64, image_sha256=f"{index:064x}", action="exit", stage="A",
            label="none", prob_a=0.1, prob_b=None, confidence=0.9, gate_logit=None, exit_score=0.9, threshold=0.8,
            propensity=0.5, selected=True, sketch=np.zeros(64),
        )
        for index in range(3)
    ])  # fmt: skip
    return store


# --------------------------------------------------------------------------------------------
# Label Studio


class Labels:
    """Exports of Label Studio."""

    def __init__(self, folder):
        self.path, self.store = folder / "x.json", loop_store(folder)
        choice = {
            "from_name": "label",
            "to_name": "image",
            "type": "choices",
            "value": {"choices": ["none"]},
            "meta": {"time": 1.5},
        }
        self.seed = [
            {
                "id": i, "project": 4, "updated_at": "2026-12-01T00:00:00Z", "total_annotations": 1,
                "data": {"event_id": f"e{i}", "image": "/x.jpg"}, "predictions": [],
                "annotations": [{
                    "id": 9, "completed_by": {"email": "a@b.c", "id": 3}, "created_at": "2026-11-01T00:00:00Z",
                    "updated_at": "2026-11-02T00:00:00+02:00", "was_cancelled": False, "result": [choice],
                }],
            }
            for i in range(3)
        ]  # fmt: skip

    def make(self, rng):
        data, kinds = json.dumps(self.seed).encode(), ["values"]
        if rng.random() < 0.4:
            tasks, kinds = json.loads(data), ["leaf"]
            for path in some(rng, [p for p in paths_of(tasks) if p]):
                try:
                    at_path(tasks, path[:-1])[path[-1]] = rng.choice((
                        *INTERESTING, "e1", 1e300, -1e300, "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00",
                        "2026-12-01", ["none", "none"],
                        {"choices": ["none"] * 3}, ["\x1b[31m"], "none",
                    ))  # fmt: skip
                except (KeyError, IndexError, TypeError):
                    continue  # an earlier change took its place away
            data = json.dumps(tasks).encode("utf-8", "surrogatepass")
        elif rng.random() < 0.7:
            data = mutate_json(rng, data)
        else:
            many = rng.choice((5, 900, 3000, 10**5))
            kinds = ["text"]
            old, new = rng.choice((
                (b"[]", b"[" * many + b"]" * many), (b"[]", b"{" * many), (b"[]", b"[" + b"{}," * many + b"{}]"),
                (b"9", b"9" * many), (b"none", b"n" * many),
                (b'"id"', b'"id":1,"id"'), (b"false", b"NaN"), (b"false", b"Infinity"), (b"1.5", b"1e" + b"9" * many),
                (b"1.5", b"-0"), (b"false", b"\xff"),
                (b'"none"', b'"\\ud800"'), (b'"none"', b'"\\u0000"'), (b'"none"',
                b"[" * (many % 950) + b'"none"' + b"]" * (many % 950)),
            ))  # fmt: skip
            data = data.replace(old, new, 1)
        self.path.write_bytes(mutate_bytes(rng, data) if rng.random() < 0.1 else data)
        return None, kinds

    def read(self, _):
        from stage1_pro.continual.ledger.exchange import import_label_studio

        import_label_studio(self.store, self.path, now=99.0, source="review", annotator="x")
