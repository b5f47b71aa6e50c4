"""A picture shows what the record says: what is drawn is read back from it."""

import json
import math
import sys

import pytest

import curves
import plot
from errors import BadInput
from metrics import Metrics
from process import run_script

figure = pytest.importorskip("matplotlib.figure")


def record(path, *lines):
    """Write a record of (kind, values) lines, or of text that is none."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps({"kind": line[0], **line[1]})) + "\n"
                            for line in lines), encoding="utf-8")
    return path


def run(stage="train"):
    return "run", {"stage": stage, "epoch": 1, "batch": 0}


def epoch(number, loss, **values):
    return "epoch", {"epoch": number, "loss": loss, "train_loss": loss + 1, "seconds": 1800.0, **values}


def score(kind, split, loss):
    return kind, {"split": split, "loss": loss}


def drawn(picture):
    """The lines of a picture that have a name, and the places of its letters, by name."""
    (axes,) = picture.axes
    lines = {line.get_gid(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines if line.get_gid()}
    return lines, {note.get_gid(): note.xyann for note in axes.texts if note.get_gid()}


def letters(picture):
    """The places of the letters of a picture that was drawn, in points: an array (letters, 2)."""
    (axes,) = picture.axes
    return [note.get_transform().transform(note.get_position()) * 72 / picture.dpi for note in axes.texts]


def legend(picture):
    return [text.get_text() for text in picture.axes[0].get_legend().get_texts()]


def shape(picture):
    return picture.axes[0].get_yscale()


WHOLE = [run(), epoch(1, 5.0), epoch(2, 4.0), ("switch", {"epoch": 2}), epoch(3, 3.5), run("finetune"),
         ("loaded", {"loss": 3.4}), epoch(1, 3.3), epoch(2, 3.2), score("grid", "valid", 1.0),
         score("pointer", "valid", 3.0), score("pointer", "test", 2.9), score("dynamic", "valid", 2.8),
         score("dynamic", "test", 2.7)]


def test_curves_and_marks_are_those_of_the_record(tmp_path):
    picture = plot.draw([record(tmp_path / "a.metrics.jsonl", *WHOLE)], tmp_path / "c.png", metric="loss")
    lines, marks = drawn(picture)
    assert lines == {"a train valid": ([1, 2, 3], [5.0, 4.0, 3.5]), "a train train": ([1, 2, 3], [6.0, 5.0, 4.5]),
                     "a finetune valid": ([3, 4, 5], [3.4, 3.3, 3.2]), "a finetune train": ([4, 5], [4.3, 4.2])}
    assert marks == {"a switch": (2, 4.0), "a finetune": (3, 3.4), "a pointer": (5, 3.0), "a dynamic": (5, 2.8)}
    assert [note.xy for note in picture.axes[0].texts[-2:]] == [(5, 3.2)] * 2, "both begin with the best model"
    assert legend(picture) == ["a (best 3.200)", "validation (thick)", "training, with dropout (thin)",
                               *(plot.MARKS[kind][1] for kind in ("switch", "finetune", "pointer", "dynamic"))]


@pytest.mark.parametrize("metric, value", [("loss", 4.0), ("ppl", math.exp(4)), ("bpc", 4 / math.log(2))])
def test_metrics_are_made_from_the_loss(tmp_path, metric, value):
    picture = plot.draw([record(tmp_path / "a", run(), epoch(1, 4.0, ppl=None))], tmp_path / "c.png", metric=metric)
    assert drawn(picture)[0]["a train valid"][1] == [pytest.approx(value)]
    assert picture.axes[0].get_ylabel() == plot.Y_LABELS[metric]


def test_hours_add_up_over_stages(tmp_path):
    lines, marks = drawn(plot.draw([record(tmp_path / "a", *WHOLE)], tmp_path / "c.png", x="hours"))
    assert lines["a train valid"][0] == [0.5, 1.0, 1.5]
    assert lines["a finetune valid"][0] == [1.5, 2.0, 2.5]
    assert marks["a switch"][0] == 1.0


def test_tokens_are_those_trained_since_the_run_began(tmp_path):
    path = record(tmp_path / "a", run(), epoch(1, 5.0, total_tokens=3e6), epoch(2, 4.0, total_tokens=6e6),
                  run("finetune"), epoch(1, 3.0, total_tokens=2e6))
    lines, _ = drawn(plot.draw([path], tmp_path / "c.png", x="tokens"))
    assert lines["a train valid"][0] == [3.0, 6.0]
    assert lines["a finetune valid"][0] == [6.0, 8.0]


def test_tokens_of_older_records_are_those_of_log_intervals(tmp_path):
    windows = [("batch", {"epoch": of, "batch": batch, "tokens": 1e6}) for of in (1, 2) for batch in (200, 400, 400)]
    path = record(tmp_path / "a", run(), *windows[:3], epoch(1, 5.0), *windows[3:], epoch(2, 4.0))
    assert drawn(plot.draw([path], tmp_path / "c.png", x="tokens"))[0]["a train valid"][0] == [2.0, 4.0]
    with pytest.raises(BadInput, match="how many tokens"):
        plot.draw([record(tmp_path / "b", run(), epoch(1, 5.0))], tmp_path / "c.png", x="tokens")


def test_what_is_done_once_more_replaces_what_was_done(tmp_path):
    path = record(tmp_path / "a", run(), epoch(1, 5.0), epoch(2, 4.0), ("switch", {"epoch": 2}), epoch(3, 9.0),
                  ("resume", {"stage": "train", "epoch": 2, "batch": 7}), epoch(2, 4.5), epoch(3, 3.0),
                  ("decay", {"epoch": 3}))
    lines, marks = drawn(plot.draw([path], tmp_path / "c.png", metric="loss"))
    assert lines["a train valid"] == ([1, 2, 3], [5.0, 4.5, 3.0])
    assert marks == {"a decay": (3, 3.0)}


def test_older_lines_of_resume_do_not_say_where(tmp_path):
    path = record(tmp_path / "a", run(), epoch(1, 5.0), epoch(2, 4.0), ("resume", {"stage": "train"}), epoch(2, 3.0))
    assert drawn(plot.draw([path], tmp_path / "c.png", metric="loss"))[0]["a train valid"] == ([1, 2], [5.0, 3.0])


def test_training_goes_on_beside_the_fine_tuning_of_before(tmp_path):
    path = record(tmp_path / "a", run(), epoch(1, 5.0), run("finetune"), epoch(1, 3.0),
                  ("resume", {"stage": "train", "epoch": 2, "batch": 0}), epoch(2, 4.0), run("finetune"), epoch(1, 2.0))
    stages = curves.read_stages(path)
    assert [(stage.name, stage.start["epochs"], list(stage.epochs)) for stage in stages] == [
        ("finetune", 1, [1]), ("train", 0, [1, 2]), ("finetune", 2, [1])]
    assert [stage.loaded for stage in stages] == [5.0, None, 4.0]


def test_a_score_is_that_of_the_last_model(tmp_path):
    path = record(tmp_path / "a", run(), epoch(1, 5.0), score("pointer", "valid", 1.0), epoch(2, 4.0))
    assert drawn(plot.draw([path], tmp_path / "c.png"))[1] == {}
    path = record(path, run(), epoch(1, 5.0), score("pointer", "valid", 1.0), score("pointer", "valid", 2.0))
    assert drawn(plot.draw([path], tmp_path / "c.png", metric="loss"))[1] == {"a pointer": (1, 2.0)}


def test_the_best_epoch_counts_where_it_is_not_the_last(tmp_path):
    """... in the legend, for the cache, and for the fine-tuning that begins with its model."""
    lines = run(), epoch(1, 5.0), epoch(2, 3.0), epoch(3, 4.0)
    path = record(tmp_path / "a.metrics.jsonl", *lines, score("pointer", "valid", 2.0))
    picture = plot.draw([path], tmp_path / "c.png", metric="loss")
    assert legend(picture)[0] == "a (best 3.000)"
    assert picture.axes[0].texts[0].xy == (3, 3.0)
    path = record(path, *lines, run("finetune"), epoch(1, 2.0))
    assert [stage.loaded for stage in curves.read_stages(path)] == [None, 3.0]


def test_runs_differ_without_colour(tmp_path):
    paths = [record(tmp_path / f"r{number}.metrics.jsonl", run(), epoch(1, 5.0), epoch(2, 4.0)) for number in range(14)]
    (axes,) = plot.draw(paths, tmp_path / "c.png").axes
    looks = {(line.get_marker(), str(line._dash_pattern)) for line in axes.lines
             if str(line.get_gid()).endswith("valid")}
    assert len(looks) == 14
    widths = [{line.get_linewidth() for line in axes.lines if str(line.get_gid()).endswith(split)}
              for split in ("valid", "train train")]
    assert not widths[0] & widths[1]


def test_runs_of_one_name_are_told_apart(tmp_path):
    (tmp_path / "x").mkdir()
    one, other = (record(folder / "$_a$.metrics.jsonl", run(), epoch(1, 5.0)) for folder in (tmp_path, tmp_path / "x"))
    names = legend(plot.draw([one, other, other], tmp_path / "c.svg", metric="loss"))[:3]
    assert len(set(names)) == 3
    assert [name.split("/")[-1] for name in names] == [
        r"\$_a\$ (best 5.000)", r"\$_a\$ (2) (best 5.000)", r"\$_a\$ (3) (best 5.000)"]


def test_a_long_name_is_shortened_and_still_its_own(tmp_path):
    paths = [record(tmp_path / f"{'a' * 60}{middle}{'z' * 60}.metrics.jsonl", run(), epoch(1, 5.0)) for middle in "12"]
    short = f"{'a' * 20}…{'z' * 20}"
    assert plot.run_names(paths) == [f"{short} (1)", f"{short} (2)"]
    assert plot.run_names([tmp_path / ("b" * plot.MAX_NAME)]) == ["b" * plot.MAX_NAME]
    assert plot.run_names(["c\a", "c\b"]) == ["c? (1)", "c? (2)"], "letters that cannot be printed"


# --- what a reader sees ----------------------------------------------------------------------------------------------

def eventful(path, number=0):
    """A record with marks of all kinds; two of them after one epoch."""
    lift = number / 50
    return record(path, run(), *(epoch(place, 4 + 2 / place + lift) for place in range(1, 9)),
                  ("switch", {"epoch": 4 + number % 3}), ("decay", {"epoch": 8}), run("finetune"),
                  ("loaded", {"loss": 4.25 + lift}), epoch(1, 4.2 + lift), score("pointer", "valid", 4.1 + lift),
                  score("dynamic", "valid", 4.09 + lift))


def finished(paths, out, **how):
    """The picture and its axes as they are on paper: (picture, axes, box of the axes)."""
    picture = plot.draw(paths, out, **how)
    picture.draw_without_rendering()
    return picture, picture.axes[0], picture.axes[0].get_window_extent()


@pytest.mark.parametrize("how", [{}, {"x": "minutes", "log_x": True}, {"log_axis": False}, {"metric": "bpc"}])
@pytest.mark.parametrize("count", [1, 3])
def test_no_letter_hides_another_or_leaves_the_axes(tmp_path, count, how):
    paths = [eventful(tmp_path / f"r{number}.metrics.jsonl", number) for number in range(count)]
    picture, axes, box = finished(paths, tmp_path / "c.png", **how)
    places = letters(picture)
    assert len(places) == 5 * count
    for number, place in enumerate(places):
        assert all(max(abs(place - other)) > 11 for other in places[:number])
        assert box.x0 < place[0] * picture.dpi / 72 < box.x1 - 7 * picture.dpi / 72
        assert box.y0 < place[1] * picture.dpi / 72 < box.y1 - 7 * picture.dpi / 72


def test_many_runs_leave_the_axes_most_of_the_picture(tmp_path):
    """The letters stay inside, the legend covers no curve and is whole."""
    paths = [eventful(tmp_path / f"r{number:02}.metrics.jsonl", number) for number in range(30)]
    picture, axes, box = finished(paths, tmp_path / "c.png")
    width, height = picture.get_size_inches() * picture.dpi
    assert box.height > 0.8 * height
    assert box.width > 0.6 * width
    frame = axes.get_legend().get_window_extent()
    assert box.x1 <= frame.x0
    assert frame.x1 <= width
    assert frame.y0 >= 0
    assert frame.y1 <= height


def test_an_epoch_is_a_whole_number(tmp_path):
    _, axes, _ = finished([record(tmp_path / "a", run(), epoch(1, 5.0))], tmp_path / "c.png")
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]


def test_values_beyond_a_million_are_short():
    assert [plot.format_tick(tick) for tick in (0.5, 1000, 2e5, 1e6, 1e9)] == ["0.5", "1,000", "200,000", "1e+06",
                                                                              "1e+09"]


def test_a_record_without_training_losses_has_no_line_for_them_in_the_legend(tmp_path):
    line = "epoch", {"epoch": 1, "loss": 5.0, "seconds": 1.0}
    assert legend(plot.draw([record(tmp_path / "a", run(), line)], tmp_path / "c.png"))[1:] == ["validation (thick)"]


@pytest.mark.parametrize("losses, log_axis, expected", [
    ([5.0, 3.0], None, "log"), ([5.0, 4.9], None, "linear"), ([5.0, 3.0], False, "linear"), ([5.0, 4.9], True, "log")])
def test_an_axis_is_logarithmic_where_values_reach_far(tmp_path, losses, log_axis, expected):
    lines = [epoch(number, loss, train_loss=loss) for number, loss in enumerate(losses, 1)]
    picture = plot.draw([record(tmp_path / "a", run(), *lines)], tmp_path / "c.png", log_axis=log_axis)
    assert shape(picture) == expected
    assert 3 <= len(picture.axes[0].get_yticks()) <= 15


def test_the_x_axis_is_logarithmic_when_asked(tmp_path):
    paths = [record(tmp_path / f"{name}.metrics.jsonl", run(), *(
        epoch(number, 5.0, seconds=seconds) for number in (1, 2))) for name, seconds in (("short", 6), ("long", 600))]
    axes, = plot.draw(paths, tmp_path / "c.png", "minutes", log_x=True).axes
    assert axes.get_xscale() == "log"
    low, high = axes.get_xlim()
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == [f"{tick:g}" for tick in axes.get_xticks() if low <= tick <= high]
    assert {"0.1", "1", "10"} <= set(labels)


@pytest.mark.parametrize("line", [epoch(1, 800.0), epoch(1, 5.0, seconds=0)])
def test_the_x_axis_is_linear_where_nothing_has_a_place_on_a_logarithmic_one(tmp_path, line):
    axes, = plot.draw([record(tmp_path / "a", run(), line)], tmp_path / "c.png", "minutes", log_x=True).axes
    assert axes.get_xscale() == "linear"


def test_what_begins_at_0_has_no_letter_on_a_logarithmic_axis(tmp_path):
    path = record(tmp_path / "a", run("finetune"), ("loaded", {"loss": 5.0}), epoch(1, 4.0))
    picture = plot.draw([path], tmp_path / "c.png", "minutes", log_x=True)
    assert drawn(picture)[1] == {}
    assert plot.MARKS["finetune"][1] not in legend(picture), "which would explain a letter that nobody sees"


@pytest.mark.parametrize("ending, begin", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("PDF", b"%PDF")])
def test_the_ending_is_the_format(tmp_path, capsys, ending, begin):
    path, out = record(tmp_path / "a", *WHOLE), tmp_path / f"c.{ending}"
    plot.main([str(path), "--out", str(out)])
    content = out.read_bytes()
    assert content.startswith(begin)
    plot.main([str(path), "--out", str(out)])
    assert out.read_bytes() == content, "the same record gives the same file"
    assert capsys.readouterr().out.count(f"1 run drawn into {out}") == 2
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", out.name]


def test_bad_lines_are_skipped_and_named(tmp_path, capsys):
    path = record(tmp_path / "a", run(), "no record", epoch(1, 5.0), ("epoch", {"epoch": 2, "loss": "x"}),
                  epoch(2, math.nan), epoch(True, 1.0), epoch(2, 4.0, seconds=None), ("switch", {}),
                  score("pointer", ["valid"], 1.0), epoch(3, 10**400), ("from the future", {}), epoch(4, 3.0))
    lines, _ = drawn(plot.draw([path], tmp_path / "c.png", metric="loss"))
    assert lines["a train valid"] == ([1, 4], [5.0, 3.0])
    said = capsys.readouterr().err
    assert "skipped, no record: line 2" in said
    assert [f"{number} (" in said for number in range(1, 12)] == [number in range(3, 10) for number in range(1, 12)]
    assert "3 (epoch: loss)" in said
    assert "6 (epoch: seconds)" in said, "numbers are those of records, without the line that is none"


@pytest.mark.parametrize("loss", [650.0, 699.0, 800.0])  # an axis up to e^650 has no number for its margin
def test_a_loss_beyond_all_perplexities_is_drawn_as_none(tmp_path, loss):
    picture = plot.draw([record(tmp_path / "a", run(), epoch(1, loss), ("switch", {"epoch": 1}), epoch(2, 4.0))],
                        tmp_path / "c.png")
    assert picture.axes[0].get_ylim()[1] < math.exp(6)
    assert drawn(picture)[1] == {}, "there is no place for its mark"
    nowhere = record(tmp_path / "b", run(), epoch(1, loss), epoch(2, loss))
    assert legend(plot.draw([nowhere], tmp_path / "c.png"))[0] == "b (best inf)"


@pytest.mark.parametrize("flags, message", [
    (["EMPTY"], "there is no epoch in it"), (["NONE"], "cannot be read"), (["A", "--out", "c.gif"], "its ending"),
    (["A", "--out", "c"], "its ending"), (["A", "--out", "no/c.png"], "cannot be written"),
    (["A", "--x", "days"], "--x"), (["IS.png", "--out", "IS.png"], "one of the records")])
def test_bad_input_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    record(tmp_path / "EMPTY", run())
    record(tmp_path / "A", *WHOLE)
    record(tmp_path / "IS.png", *WHOLE)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as end:
        run_script(lambda: plot.main(flags))
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_without_matplotlib_one_line_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as end:
        run_script(lambda: plot.main([str(record(tmp_path / "a", *WHOLE)), "--out", str(tmp_path / "c.png")]))
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "pip install matplotlib" in said
    assert said.count("\n") == 1


def test_what_a_run_writes_is_what_is_drawn(train, tmp_path):
    """From main.py to the picture; the tokens of an epoch are those that the corpus has."""
    _, lines = train(tmp_path / "m.pt", "--epochs", "3", "--nonmono", "1", "--log_interval", "7")
    picture = plot.draw([tmp_path / "m.metrics.jsonl"], tmp_path / "c.png", x="tokens", metric="loss")
    places, values = drawn(picture)[0]["m train valid"]
    assert values == [line["loss"] for line in lines["epoch"]]
    assert places == [line["total_tokens"] / 1e6 for line in lines["epoch"]]
    of_windows = sum(line["tokens"] for line in lines["batch"] if line["epoch"] == 1)
    assert of_windows == [line["total_tokens"] for line in lines["batch"] if line["epoch"] == 1][-1]
    assert of_windows <= lines["epoch"][0]["total_tokens"]


def test_records_of_a_crash_are_read(tmp_path):
    """The last line is cut, and the run goes on: Metrics sets it apart."""
    path = record(tmp_path / "m.metrics.jsonl", run(), epoch(1, 5.0))
    path.write_text(path.read_text() + '{"kind": "epo', encoding="utf-8")
    Metrics(path).write("epoch", **epoch(2, 4.0)[1])
    assert list(curves.read_stages(path)[0].epochs) == [1, 2]
