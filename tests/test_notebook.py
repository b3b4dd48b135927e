"""Results in a notebook: short words, small tables, plain Python and pandas that hold what the fields hold."""

from __future__ import annotations

import json
import sys
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from stage1_pro.errors import DependencyError
from stage1_pro.metrics import (
    bootstrap_errors,
    cheapest_threshold,
    coverage_at_risk,
    delong,
    dual_threshold,
    risk_band,
    risk_coverage,
    sweep,
)
from stage1_pro.metrics.measured import Metric
from stage1_pro.policies import conformal_sets
from stage1_pro.record import Record

RNG = np.random.default_rng(0)
SURE = RNG.random(5000)
WRONG = RNG.random(5000) > SURE
PROBS = np.stack([SURE, 1 - SURE], 1)
RESULTS = {
    "sweep": sweep(SURE, WRONG),
    "curve": risk_coverage(SURE, WRONG),
    "band": risk_band(SURE, WRONG, points=8),
    "point": coverage_at_risk(SURE, WRONG, 0.1),
    "dual": dual_threshold(SURE, ~WRONG, max_fnr=0.2, max_exit_error=0.4),
    "cost": cheapest_threshold(SURE, WRONG, wrong=5, deferral=1),
    "test": delong(SURE, ~WRONG),
    "intervals": bootstrap_errors(SURE, WRONG, n_replicates=20),
    "sets": conformal_sets(PROBS, WRONG.astype(int), by_class=True),
}


class Cells(HTMLParser):
    """Rows of a table, and whether every tag was closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_short_and_its_table_is_whole(name):
    found = RESULTS[name]
    lines = str(found).splitlines()
    assert max(map(len, lines)) < 500
    assert len(lines) == (1 if name != "intervals" else 1 + len(found))
    cells = Cells(found._repr_html_())
    assert not cells.open
    assert len({len(row) for row in cells.rows}) == 1
    assert len(cells.rows) <= 14
    assert {"to_dict", "to_pandas"} <= set(dir(found))
    assert all(hasattr(found, one) for one in dir(found))


@pytest.mark.parametrize("name", ["sweep", "curve", "band"])
def test_tables_hold_the_arrays(name):
    found = RESULTS[name]
    frame = found.to_pandas()
    for column in frame:
        np.testing.assert_array_equal(frame[column], getattr(found, column))
    assert len(frame) == found.threshold.size
    assert found.to_dict()["coverage"] == found.coverage.tolist()
    assert len(Cells(found._repr_html_()).rows) == min(len(frame), 11) + 1
    if name == "band":
        assert frame.attrs["level"] == 0.95


def test_scalars_are_one_row_and_intervals_one_each():
    assert RESULTS["point"].to_pandas().to_dict("records") == [RESULTS["point"].to_dict()]
    frame = RESULTS["intervals"].to_pandas().set_index("metric")
    assert frame.attrs == {"rows": 5000, "unit": "rows", "units": 5000}
    for name, one in RESULTS["intervals"].items():
        assert (frame.loc[name, "low"], frame.loc[name, "method"]) == (one.low, one.method)
    assert "replicates" not in RESULTS["intervals"].to_dict()["augrc"]
    json.dumps(RESULTS["intervals"].to_dict())


class Report(Record):
    title: str
    figures: list[Metric]


def test_records_show_their_list_of_records():
    rows = [Metric(metric="augrc", value=0.1, note="a < b & <script>"), Metric(metric="nll")]
    report = Report(title="two", figures=rows)
    frame = report.to_pandas()
    assert frame["metric"].tolist() == ["augrc", "nll"]
    assert pd.isna(frame["value"][1])
    assert frame.attrs == {"title": "two"}
    assert report.to_dict() == json.loads(report.model_dump_json())
    assert str(report) == repr(report) == "Report(title=two, figures=[Metric(…), Metric(…)])"
    assert repr(rows[1]) == "Metric(metric=nll, method=none)"
    html = report._repr_html_()
    assert "<script>" not in html
    assert Cells(html).rows[1][-1] == "a < b & <script>"
    assert {"title", "figures", "write", "read", "to_pandas"} <= set(dir(report))
    assert not [name for name in dir(report) if name.startswith("model_") or name == "parse_raw"]
    assert Report.parse(report.model_dump_json(), "report") == report


def test_without_pandas_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(DependencyError, match="pip install pandas"):
        RESULTS["point"].to_pandas()
    assert RESULTS["point"]._repr_html_()
