"""The report: self-contained, escaped, and a table that marks the best value and nothing else."""

import base64
import math
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from foveate import report
from foveate.types import Evaluation, InputError

DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
EVALUATION = Evaluation(
    {"error": 1.12, "accuracy_greedy": 0.9921},
    {"random_places": {"error": 12.5, "accuracy_greedy": 0.874}, "centre": {"error": math.nan}},
)


class Page(HTMLParser):
    """Collects tags, cells and whether what was opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.rows, self.text = [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append((dict(attributes).get("class"), ""))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            kind, text = self.rows[-1][-1]
            self.rows[-1][-1] = (kind, text + data)


@pytest.fixture
def write(tmp_path):
    def writer(**changes):
        entries = {
            "title": "RAM", "summary": "What was done.\n\nHow it went.", "table": EVALUATION, "pictures": {},
            "config": {"steps": 200, "data": "digits"}, "command": "foveate train ram",
        } | changes  # fmt: skip
        report.write_report(tmp_path / "report.html", **entries)
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return writer


def test_report_is_one_file_that_refers_to_nothing_outside(write, tmp_path):
    Image.new("RGB", (8, 6), "red").save(tmp_path / "path.gif")
    text = write(pictures={"drawn": Image.new("RGB", (900, 20)), "animated": tmp_path / "path.gif"})
    page = Page(text)
    assert "http:" not in text
    assert "https:" not in text
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert "@import" not in text
    assert "url(" not in text
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [image["src"].split(";")[0] for image in images] == ["data:image/png", "data:image/gif"]
    content = base64.b64decode(images[1]["src"].split(",")[1])
    assert content == (tmp_path / "path.gif").read_bytes()
    assert [image["alt"] for image in images] == ["drawn", "animated"]
    assert any(attributes.get("name") == "viewport" for _, attributes in page.tags)
    assert "prefers-color-scheme: dark" in text
    assert sorted(file.name for file in tmp_path.iterdir()) == ["path.gif", "report.html"]


def test_everything_is_escaped(write):
    evil = '<script>alert("1")</script>&"\''
    table = Evaluation({evil: 1.0}, {evil: {evil: 2.0}})
    text = write(
        title=evil,
        summary=evil,
        table=table,
        pictures={evil: Image.new("L", (4, 4))},
        config={evil: evil},
        command=evil,
    )
    assert "<script" not in text
    page = Page(text)
    assert page.text.count(evil) == 9  # title twice, summary, caption, two fields, command, a column and a row
    assert next(attributes["alt"] for tag, attributes in page.tags if tag == "img") == evil


def test_table_begins_with_the_trained_policy_and_marks_the_best(write):
    head, ours, places, centre, *_ = Page(write()).rows
    assert [text for _, text in head] == ["", "error ↓", "accuracy greedy ↑"]
    assert ours == [(None, "trained"), ("best", "1.12"), ("best", "0.9921")]
    assert places == [(None, "random places"), (None, "12.50"), (None, "0.8740")]
    assert centre == [(None, "centre"), (None, DASH), (None, DASH)]


def test_a_baseline_that_is_better_is_marked_and_ties_all_are():
    table = Page(report.metric_table({"trained": {"error": 2.0}, "a": {"error": 1.0}, "b": {"error": 1.0}}))
    assert [[kind for kind, _ in row][1:] for row in table.rows] == [[None], [None], ["best"], ["best"]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_the_best(value):
    table = Page(report.metric_table({"trained": {"accuracy": value}, "a": {"accuracy": 0.5}}))
    assert [row[1][0] for row in table.rows] == [None, None, "best"]


def test_nothing_is_marked_where_the_direction_is_unknown_or_there_is_nothing_to_compare():
    assert "best" not in report.metric_table({"trained": {"places": 3.0}, "a": {"places": 4.0}})
    assert "class='best'" not in report.metric_table({"trained": {"accuracy": 0.5}})


@pytest.mark.parametrize(
    ("name", "sign"),
    [("error", -1), ("error_greedy", -1), ("accuracy", 1), ("reward_loss", -1), ("AP50", 1), ("terror", 0), ("", 0)],
)
def test_direction_is_read_from_the_words_of_the_name(name, sign):
    assert report.direction(name) == sign


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([1.12, 88.651], ["1.12", "88.65"]),
        ([0.9921, 0.1], ["0.9921", "0.1000"]),
        ([12345.0, 7.0], ["12,345", "7"]),
        ([123.456, math.nan], ["123.46", DASH]),
        ([-0.5, 0.25], [f"{MINUS}0.5000", "0.2500"]),
        ([math.inf, 1.5], ["∞", "1.50"]),
        ([0.0, 0.012345], ["0.0000", "0.0123"]),
        ([0.00001234], [f"1.23e{MINUS}05"]),
        ([0.98, 64.2], ["0.98", "64.20"]),
        ([1234.56, 0.5], ["1,234.6", "0.5"]),
        ([0.0], ["0"]),
        ([math.nan], [DASH]),
    ],
)
def test_numbers_of_a_column_share_sensible_digits(values, texts):
    assert report.format_column(values) == texts


def test_config_lies_folded_away_and_none_and_lists_are_readable(write, tmp_path):
    text = write(config={"minutes": None, "sizes": [1, 2], "root": tmp_path, "name": "ünï"})
    fields = [[cell for _, cell in row] for row in Page(text[text.index("<details>") :].split("</body>")[0]).rows]
    assert fields == [["minutes", "null"], ["sizes", "[1, 2]"], ["root", str(tmp_path)], ["name", "ünï"]]
    assert "<details open" not in text


def test_without_pictures_or_scores_their_headings_are_left_out(write):
    headings = re.findall("<h2>(.*?)</h2>", write(table=Evaluation({}, {})))
    assert headings == ["Command"]
    assert re.findall("<h2>(.*?)</h2>", write(pictures={"a": Image.new("L", (2, 2))})) == [
        "Scores",
        "Pictures",
        "Command",
    ]


def test_a_missing_or_foreign_picture_is_one_line_and_leaves_the_older_report(write, tmp_path):
    before = write()
    Image.new("RGB", (4, 4)).save(tmp_path / "picture.bmp")
    (tmp_path / "text.png").write_text("not a picture")
    for name, found in (("absent.png", "no picture"), ("picture.bmp", "a BMP picture"), ("text.png", "no picture")):
        with pytest.raises(InputError, match=f"{name}: found {found}") as error:
            write(pictures={"x": tmp_path / name})
        assert "\n" not in str(error.value)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before
