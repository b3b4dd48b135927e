"""Label until it is proven, on a run: from a table and on the page, ended and continued, replayed, and forged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

pytest.importorskip("torch", reason="a run's model looks at photos")

from kit.browser import Browser
from kit.tiny import CLASSES, make_solved_run
from PIL import Image

from stage1_pro import cli
from stage1_pro.continual.ledger.certify_page import CertifyPage
from stage1_pro.continual.ledger.page import Request
from stage1_pro.data.predictions import Predictions
from stage1_pro.data.splits import Splits
from stage1_pro.errors import ArtifactError, InputError
from stage1_pro.files import sha256_bytes, sha256_file, write_csv
from stage1_pro.policies.policy import read_policy
from stage1_pro.policies.sequential import SequentialCertificate
from stage1_pro.policies.softmax import Thresholds
from stage1_pro.policies.standing import standing
from stage1_pro.training.certifying import Certification, check_log
from stage1_pro.training.labelling import Labelling, PoolAnswers

N = 140
ALPHA = 0.2


def make_pool(folder: Path, n: int = N) -> None:
    """Small photos of noise whose brightness is their class."""
    (folder / "pool").mkdir(parents=True)
    rng, rows = np.random.default_rng(9), []
    for number in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(
            (60, 50), Image.Resampling.BICUBIC
        )
        pixels = np.asarray(coarse) // 2 + 127 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "pool" / f"{number:03d}.png")
        rows.append({"file": f"{number:03d}.png", "label": CLASSES[number % 2]})
    write_csv(folder / "labels.csv", rows, ["file", "label"])


@pytest.fixture(scope="module")
def solved(once: Callable[..., Path]) -> Path:
    """A run that is nearly always right, photos for it to look at, and their labels; certification has begun."""

    def make(folder: Path) -> None:
        folder.mkdir()
        make_solved_run(folder / "run")
        make_pool(folder)

    return once("solved", make)


@pytest.fixture
def work(solved: Path, tmp_path: Path) -> Path:
    """A copy of it, to change."""
    shutil.copytree(solved, tmp_path / "work")
    run = tmp_path / "work" / "run"
    splits = Splits.read(run / "splits.json")
    splits.model_copy(update={"root": str(run / "images")}).write(run / "splits.json")
    return tmp_path / "work"


def words(work: Path, *more: str) -> list[str]:
    return ["certify", "--run", str(work / "run"), *more]


def begin(work: Path, *more: str) -> list[str]:
    first = ["--images", str(work / "pool"), "--rows-independent", "--exit-error", str(ALPHA), "--floor", ".5"]
    return words(work, *first, *more, "--json")


def table(work: Path, share: float = 1.0, wrong: float = 0.0, empty: int = -1) -> Path:
    """Labels of some of the photos, some of them of the other class, and of one nobody can tell."""
    rows = []
    for number in range(N):
        name = f"{number:03d}.png"
        if (number * 37) % N < share * N:
            label = CLASSES[(number + ((number * 53) % N < wrong * N)) % 2]
            rows.append({"file": name, "label": "" if number == empty else label})
    write_csv(work / "some.csv", rows, ["file", "label"])
    return work / "some.csv"


def test_a_table_of_labels_proves_it_and_the_policy_says_how(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = work / "run"
    assert cli.main(begin(work, "--labels", str(work / "labels.csv"))) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["proven"] and found["wrong"] == 0 and found["policy"] == "thresholds.json"
    # None of what was not drawn counts, and fewer are labelled than are looked through.
    assert 10 < found["labels"] < found["photos"] <= N and found["ignored"] == N - found["labels"]
    policy = read_policy(run)
    assert isinstance(policy, Thresholds) and policy.certificate is not None
    made = policy.certificate
    assert (made.method, made.labelled, made.n, made.unit) == ("sequential", found["labels"], found["photos"], "rows")
    assert made.p_value is not None and made.p_value <= 0.05 == made.delta
    assert [str(one) for one in policy.promises] == [f"exit error at most {ALPHA:g} (certified, delta 0.05)"]
    for said in (f"{made.n} of {N} photos were looked through", "24 photos of val_select", "a chance below 0.5"):
        assert said in policy.statement, policy.statement
    # Said again, it changes nothing, and the photos are claimed.
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    assert cli.main(words(work, "--labels", str(work / "labels.csv"), "--json")) == 0
    again = json.loads(capsys.readouterr().out)
    assert again == {**found, "ignored": N}
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    assert cli.main(words(work, "--check")) == 0
    assert "the policy is what it proves" in capsys.readouterr().out
    # Photos of val_test are no judges of it, nor is a prior.
    assert cli.main(["evaluate", "--run", str(run), "--replicates", "20"]) == 0
    assert "not judged: photos of no split certified it" in capsys.readouterr().out
    assert "so nothing is judged" in (run / "report.html").read_text()
    left = standing(policy, Splits.read(run / "splits.json").summary(), 0.5)
    assert left.void == ("exit error",) and "is not known" in left.note


def test_it_goes_on_where_labels_ended_and_replays_to_the_same_bytes(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(begin(work, "--labels", str(table(work, 0.9)))) == 3
    half = json.loads(capsys.readouterr().out)
    assert not half["proven"] and half["can_go_on"] and read_policy(work / "run") is None
    assert cli.main(words(work, "--labels", str(work / "labels.csv"), "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["labels"] > half["labels"] > 0
    state = Certification(work / "run" / "certify").proof.state
    other = work.parent / "other"
    shutil.copytree(work, other)
    shutil.rmtree(other / "run" / "certify")
    (other / "run" / "claims.json").unlink()
    assert cli.main(begin(other, "--labels", str(work / "labels.csv"))) == 0
    assert Certification(other / "run" / "certify").proof.state.fingerprint() == state.fingerprint()


def test_other_options_are_refused_and_a_new_beginning_is_another_claim(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = work / "run"
    assert cli.main(begin(work, "--claims", "2", "--labels", str(table(work, 0.9)))) == 3
    lines = (run / "certify" / "labels.jsonl").read_text()
    for flag, value, said in (("--exit-error", ".3", "0.2, as it was begun"), ("--seed", "1", "0, as it was begun")):
        assert cli.main(words(work, flag, value, "--labels", str(work / "labels.csv"))) == 2
        assert said in capsys.readouterr().err
    given = begin(work, "--claims", "2", "--overwrite", "--seed", "4", "--labels", str(work / "labels.csv"))
    assert cli.main(given) == 0
    assert (run / "certify.before" / "labels.jsonl").read_text() == lines
    policy = read_policy(run)
    assert isinstance(policy, Thresholds) and policy.certificate is not None
    assert (policy.certificate.use, policy.certificate.claims, policy.certificate.delta) == (2, 2, 0.025)
    kept = (run / "certify" / "plan.json").read_bytes()
    capsys.readouterr()
    assert cli.main(given) == 2
    assert "certify nothing more" in capsys.readouterr().err
    assert (run / "certify" / "plan.json").read_bytes() == kept and read_policy(run) == policy


@pytest.mark.parametrize(
    ("file", "label", "said"), [("002", "roadwrk", "did you mean 'roadwork'"), ("001", "none", "got two for one photo")]
)
def test_tables_that_are_refused_begin_nothing(
    work: Path, file: str, label: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"file": "001.png", "label": "roadwork"}, {"file": f"{file}.png", "label": label}]
    write_csv(work / "some.csv", rows, ["file", "label"])
    assert cli.main(begin(work, "--labels", str(work / "some.csv"))) == 2
    assert said in capsys.readouterr().err
    assert not (work / "run" / "certify").exists() and not (work / "run" / "claims.json").exists()


@pytest.fixture
def begun(work: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Work of which a part is labelled; nothing is proven."""
    write_csv(work / "some.csv", [], ["file", "label"])
    assert cli.main(begin(work, "--batch", "3", "--labels", str(work / "some.csv"))) == 3
    capsys.readouterr()
    return work


def truth(work: Certification) -> str:
    assert work.at is not None
    return CLASSES[int(str(work.photos.arrays["files"][work.at]).split(".")[0]) % 2]


def test_a_changed_or_cut_log_is_found(begun: Path) -> None:
    folder = begun / "run" / "certify"
    work = Certification(folder)
    while work.won is None:
        assert work.photo is not None
        work.answer(work.photo, truth(work), "ada")
    assert check_log(begun / "run")[0].proven
    log, head, policy = folder / "labels.jsonl", folder / "head.json", begun / "run" / "thresholds.json"
    data, end, lines = log.read_bytes(), head.read_bytes(), log.read_text().splitlines(keepends=True)

    def refused(said: str) -> None:
        with pytest.raises(ArtifactError, match=said):
            check_log(begun / "run")
        log.write_bytes(data)
        head.write_bytes(end)

    log.write_text("".join(lines).replace("none", "roadwork", 1))
    refused("not what was written")
    log.write_text("".join(lines[:-1]))
    refused("cut off")
    log.write_text("".join([*lines[:3], *lines[4:]]))
    refused("row 4 is missing")
    log.write_text("".join([*lines[:-1], lines[-1][:30]]))
    refused("cut off")
    # Whoever cuts both is given away by the policy.
    log.write_text("".join(lines[:-1]))
    before = json.loads(lines[-2])
    head.write_text(json.dumps({"rows": before["seq"], "hash": before["hash"]}))
    refused("the policy that .* proves, got none proven")
    # A line that its writer did not finish was told to nobody.
    log.write_bytes(data + b'{"body":"')
    assert check_log(begun / "run")[0].labels == work.labels
    assert log.read_bytes() != data
    Certification(folder)
    assert log.read_bytes() == data
    changed = json.loads(policy.read_text())
    changed["exit_threshold"] = changed["exit_upper_threshold"] = 0.6
    policy.write_text(json.dumps(changed))
    refused("got another")
    photos = folder / "photos.npz"
    photos.write_bytes(photos.read_bytes()[:-1] + b"x")
    refused("photos.npz must be as it was begun")


def test_answers_are_taken_back_only_before_anybody_saw_what_came_of_them(begun: Path) -> None:
    folder = begun / "run" / "certify"
    work = Certification(folder)
    page = CertifyPage(work, "ada")
    try:
        first = work.photo
        assert first is not None
        other = CLASSES[1 - CLASSES.index(truth(work))]
        shown = page.act("answer", Request(event_id=first, label=other))
        assert shown["progress"]["can_undo"] and shown["progress"]["share"] == 0 and work.wrong == 1
        state = work.proof.state
        again = page.act("undo", Request())
        assert again["item"]["event_id"] == first and (work.labels, work.wrong) == (0, 0)
        assert "stands" in page.act("undo", Request())["note"]
        page.act("answer", Request(event_id=first, label=other))
        assert work.proof.state == state
        # A late copy of a request answers nothing.
        assert "already" in page.act("answer", Request(event_id=first, label=other))["note"]
        for _ in range(2):
            assert work.photo is not None
            shown = page.act("answer", Request(event_id=work.photo, label=truth(work)))
        # Three labels are a batch: the bar has moved.
        assert not shown["progress"]["can_undo"] and work.shown["labels"] == 3
        page.act("undo", Request())
        assert work.labels == 3
        assert work.photo is not None
        shown = page.act("skip", Request(event_id=work.photo))
        assert "wrong answer" in shown["note"] and work.stands().cannot_tell == 1 and work.wrong == 2
        with pytest.raises(InputError, match="label must be one of none, roadwork"):
            page.act("answer", Request(event_id=work.photo or "", label="x"))
        # Nothing that is sent says what the model answers, or under which name the photo lies.
        assert {*shown["item"]} == {"event_id", "classes", "facts"} and ".png" not in json.dumps(shown)
        again_work = Certification(folder)
        assert again_work.proof.state == work.proof.state and not again_work.can_undo
        kinds = [json.loads(line)["kind"] for line in (folder / "labels.jsonl").read_text().splitlines()]
        assert kinds == ["begun", "answer", "undo", "answer", "answer", "answer", "cannot tell"]
    finally:
        page._server.server_close()


def test_a_full_disk_counts_no_answer(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Certification(begun / "run" / "certify")
    assert work.photo is not None
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            work.answer(work.photo, truth(work), "ada")
    assert work.labels == 0
    work.answer(work.photo, truth(work), "ada")
    assert Certification(begun / "run" / "certify").labels == 1


# --------------------------------------------------------------------------------------------
# In a browser


def test_a_person_certifies_a_run_in_the_page(begun: Path, chromium: Browser, tmp_path: Path) -> None:
    """By key and by button, from the first photo to the end of the command."""
    import threading

    seen = {sha256_file(path): CLASSES[int(path.stem) % 2] for path in (begun / "pool").iterdir()}
    work = Certification(begun / "run" / "certify")
    with CertifyPage(work, "ada") as page:
        thread = threading.Thread(target=page.serve, daemon=True)
        thread.start()
        chromium.events.clear()
        chromium.size(1200, 800)
        chromium.open(page.url)

        def asked() -> str | None:
            chromium.until(
                "document.querySelector('#title')?.textContent === 'Certify' && document.body.ariaBusy !== 'true'"
            )
            loaded = "document.querySelector('#item').hidden || document.querySelector('#photo').naturalWidth === 60"
            chromium.until(loaded)
            hidden = chromium.run("document.querySelector('#item').hidden")
            return None if hidden else str(chromium.run("item.event_id"))

        first, labelled = asked(), 0
        assert first is not None
        body = chromium.run("document.body.innerText")
        assert "at most 20 in 100 are answered wrongly" in body and "Stage B" not in body
        chromium.shoot(tmp_path / "begun.png")
        while (photo := asked()) is not None:
            chromium.press("12"[CLASSES.index(seen[photo])])
            labelled += 1
            chromium.until(f"document.body.ariaBusy !== 'true' && (item === null || item.event_id !== '{photo}')")
        assert labelled == work.labels > 5
        for width in (1200, 390):
            chromium.size(width, 800)
            chromium.shoot(tmp_path / f"proven{width}.png")
            assert chromium.run("document.documentElement.scrollWidth") <= width
        body = chromium.run("document.body.innerText")
        assert "Proven" in body and "95% certainty" in body and f"({labelled} labels)" in body
        chromium.press("e")
        thread.join(30)
        assert not thread.is_alive()
        assert chromium.complaints() == []
    chromium.size(1200, 800)
    policy = read_policy(begun / "run")
    assert policy is not None and policy == work.policy() and check_log(begun / "run")[0].proven


# --------------------------------------------------------------------------------------------
# Truth


def known_world(
    rng: np.random.Generator, error: float, n_order: int, n: int
) -> tuple[PoolAnswers, np.ndarray[Any, Any]]:
    """Rows of val_select and photos whose answers are wrong with one chance, however sure they are."""

    def logits(size: int) -> np.ndarray[Any, Any]:
        margin = rng.exponential(2.0, size) * rng.choice([-1, 1], size)
        return np.stack([-margin / 2, margin / 2], axis=1).astype(np.float32)

    first, photos = logits(n_order), logits(n)
    wrong = rng.random(n_order) < error
    text = np.array([""] * n_order)
    order = Predictions(
        row_ids=np.array([str(i) for i in range(n_order)]), groups=np.array([str(i) for i in range(n_order)]),
        sources=text, halves=text, logits_a=first, logits_b=first, gate_logits=first[:, 0],
        labels=np.where(wrong, 1 - first.argmax(axis=1), first.argmax(axis=1)), classes=CLASSES, positive="roadwork",
        split="val_select", split_hash="", model_fingerprint="", preprocessing_fingerprint="",
    )  # fmt: skip
    names = np.array([sha256_bytes(rng.bytes(8)) for _ in range(n)])
    arrays = {"sha256": names, "files": names, "groups": names, "logits_a": photos, "logits_b": photos,
              "gate_logits": photos[:, 0]}  # fmt: skip
    found = PoolAnswers.of(Thresholds, order, arrays)
    return found, np.where(rng.random(n) < error, 1 - photos.argmax(axis=1), photos.argmax(axis=1))


def proofs(error: float, runs: int, n: int = 160) -> int:
    """How many of many certifications prove something: the order frozen, drawn, labelled and stopped as on a run."""
    rng, proven = np.random.default_rng(1), 0
    for run in range(runs):
        photos, labels = known_world(rng, error, 80, n)
        proof = SequentialCertificate(photos.thresholds(ALPHA, n)[::4], alpha=ALPHA, floor=0.4, budget=40, seed=run)
        work = Labelling(proof, photos, CLASSES, seed=run, batch=10)
        while work.at is not None and work.won is None:
            work.count(CLASSES[labels[work.at]])
        proven += work.won is not None
    return proven


def test_false_proofs_are_as_rare_as_promised_and_true_ones_are_not() -> None:
    runs = 40
    assert proofs(ALPHA, runs) <= binom.isf(1e-4, runs, 0.05)
    assert proofs(ALPHA / 8, 12) >= 6


def test_one_photo_of_a_group_is_looked_through_whatever_order_photos_come_in() -> None:
    rng = np.random.default_rng(0)
    photos, _ = known_world(rng, 0.1, 20, 60)
    photos.arrays["groups"] = np.array([str(i // 3) for i in range(60)])
    units = photos.units(3)
    assert sorted(photos.groups[at] for at in units) == sorted({*photos.groups})
    assert len({at % 3 for at in units}) == 3 and units != photos.units(4)
    shuffled = rng.permutation(60)
    again, _ = known_world(np.random.default_rng(0), 0.1, 20, 60)
    again.arrays.update({name: photos.arrays[name][shuffled] for name in ("sha256", "groups")})
    assert [again.sha256[at] for at in again.units(3)] == [photos.sha256[at] for at in units]
