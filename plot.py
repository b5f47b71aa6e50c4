"""Draw the curves of runs from their metrics files.

    python plot.py PTB.metrics.jsonl WT2.metrics.jsonl --out curves.png
    python plot.py PTB.metrics.jsonl --x hours --metric bpc --no-log --out curves.svg
    python plot.py short.metrics.jsonl long.metrics.jsonl --x minutes --log-x --metric loss

Thick lines are validation, thin ones training. Letters in circles mark what happened between epochs. The runs are told
apart by dashes and markers as well as by colour. Needs matplotlib, which nothing else here does.
"""

if __name__ == "__main__":  # before torch, whose import takes seconds
    import process

    process.begin()


import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from curves import LARGEST, read_stages
from errors import BadInput
from files import check_writable, replacing, same_file
from flags import Parser
from metrics import log, loss_metrics
from process import run_script

FORMATS = ("png", "svg", "pdf")
X_LABELS = {"epochs": "epoch", "hours": "hours of training", "minutes": "minutes of training",
            "tokens": "million tokens trained"}
Y_LABELS = {"ppl": "perplexity", "bpc": "bits per character", "loss": "loss, nats per token"}
ENDING = ".metrics.jsonl"

# What is marked: the kind of its line in the record, its letter, its meaning.
MARKS = {"switch": ("A", "ASGD begins"), "decay": ("R", "learning rate drops"), "finetune": ("F", "fine-tuning begins"),
         "pointer": ("C", "with the cache"), "dynamic": ("D", "with dynamic evaluation"), "both": ("B", "with both")}

# Of the runs, in turn. The colours differ for colour-blind readers too (Okabe and Ito), the first ones also in grey.
COLOURS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00")
DASHES = ("-", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1.5, 1)))
MARKERS = ("o", "s", "^", "D", "v", "X", "P")  # 84 runs differ: the least common multiple of 6, 4 and 7

TICKS = ((1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9), (1, 1.5, 2, 3, 4, 5, 6, 7, 8),
         (1, 2, 3, 4, 6, 8), (1, 2, 5), (1,))
MAX_TICKS = 12      # of a logarithmic axis: the first of TICKS, in each decade, that has no more
LOG_RANGE = 3       # largest value / smallest, from which on an axis is logarithmic
MAX_NAME = 40       # letters of a run's name; the middle of a longer one is left out
INSIDE = 5          # runs at most whose legend stands inside the axes
LETTER = 14         # points, the size of a letter in its circle
UP, ASIDE = 15, 18  # points from the curve, and from letter to letter
MAX_STEPS = 8       # from letter to letter; one that finds no place by then shares the first
SPACING = 0.03      # of the markers of a line: a share of the diagonal of the axes


def parse_flags(argv):
    parser = Parser(description="Draw the curves of runs from their metrics files.",
                    epilog="The stages in a file follow each other on the x axis. So do files joined by cat.")
    parser.add_argument("files", nargs="+", metavar="FILE", help=f"the record of a run, NAME{ENDING}")
    parser.add_argument("--out", default="curves.png", metavar="FILE",
                        help=f"where the picture goes; its ending, of {', '.join(FORMATS)}, is its format "
                             "(default: %(default)s)")
    parser.add_argument("--x", choices=list(X_LABELS), default="epochs",
                        help="hours and minutes are those of training, without validation and stops "
                             "(default: %(default)s)")
    parser.add_argument("--metric", choices=list(Y_LABELS), default="ppl",
                        help="perplexity, bits per character, or nats per token (default: %(default)s)")
    parser.add_argument("--log", action=argparse.BooleanOptionalAction,
                        help=f"logarithmic y axis (default: if the largest value is {LOG_RANGE} times the smallest)")
    parser.add_argument("--log-x", action="store_true", help="logarithmic x axis, for runs of very different lengths")
    return parser.parse_args(argv)


def import_matplotlib():
    """Import matplotlib; raises BadInput when it is not installed."""
    try:  # an extra, so that all the rest runs without it: the one place that imports it
        import matplotlib.figure
    except ImportError as error:
        raise BadInput(f"pictures need another package: pip install matplotlib ({error})") from error
    return matplotlib


def draw(paths, out, x="epochs", metric="ppl", log_axis=None, log_x=False):
    """Draw the records at `paths` into the file `out`; returns the matplotlib Figure.

    The other arguments are flags of the script. Raises BadInput when a record has no epoch, when `out` has another
    ending or cannot be written, and when matplotlib is missing.
    """
    ending = Path(out).suffix[1:].lower()
    if ending not in FORMATS:
        raise BadInput(f"--out {out}: its ending is none of {', '.join(FORMATS)}")
    for path in paths:
        if same_file(path, out):
            raise BadInput(f"--out {out}: is one of the records")
    check_writable(out)
    matplotlib = import_matplotlib()
    runs = dict(zip(run_names(paths), map(read_stages, paths)))
    if x == "tokens":
        for path, stages in zip(paths, runs.values()):
            if not stages[-1].end()["tokens"]:
                raise BadInput(f"{path}: does not say how many tokens were trained, which --x tokens needs")
    figure = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")
    draw_runs(figure.add_subplot(), runs, x, metric, log_axis, log_x)
    undated = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[ending]  # the same file every time
    try:
        with replacing(out) as file, matplotlib.rc_context({"svg.hashsalt": "curves"}):
            figure.savefig(file, format=ending, dpi=120, metadata=undated)
    except OSError as error:
        raise BadInput(f"--out {out}: could not be written: {error.strerror}") from error
    return figure


def run_names(paths):
    """Name each run after its file, with folders if names would be the same, and numbers if they still are.

    The middle of a long name is left out.
    """
    names = [Path(path).name.removesuffix(ENDING) for path in paths]
    names = [name if names.count(name) == 1 else str(path).removesuffix(ENDING) for name, path in zip(names, paths)]
    names = [name if len(name) <= MAX_NAME else f"{name[:MAX_NAME // 2]}…{name[-MAX_NAME // 2:]}" for name in names]
    names = ["".join(letter if letter.isprintable() else "?" for letter in name) for name in names]
    return [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names, 1)]


@dataclass
class Mark:
    """Hold a letter: what it marks, and where."""
    kind: str
    name: str              # of the run
    colour: str
    point: tuple           # (x, y) on the curve
    place: tuple           # (x, y) that the letter stands near
    offset: tuple = (0, 0)  # from there, in points


def draw_runs(axes, runs, x, metric, log_axis, log_x=False, y_range=None):
    """Draw `runs`, stages by name, each in a style of its own; then axes and legend. `y_range` cuts the y axis."""
    handles, marks, values, trained = [], [], [], False
    for index, (name, stages) in enumerate(runs.items()):
        style = {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)]}
        marker = MARKERS[index % len(MARKERS)]
        best = min(epoch.valid for stage in stages for epoch in stage.epochs.values())
        label = f"{name} (best {value_of(best, metric):.{2 if metric == 'ppl' else 3}f})"
        label = label.replace("$", r"\$")  # else a formula
        handles.append((axes.plot([], [], marker=marker, markersize=4, linewidth=2, **style)[0], label))
        for stage in stages:
            values += draw_stage(axes, stage, x, metric, name, marker, style)
            trained |= any(epoch.train is not None for epoch in stage.epochs.values())
            for kind, point, place in (*stage_events(stage, x, metric), *stage_scores(stage, x, metric)):
                if math.isfinite(point[1]) and math.isfinite(place[1]) and (place[0] > 0 or not log_x):
                    marks.append(Mark(kind, name, style["color"], point, place))
    values += [mark.place[1] for mark in marks]
    handles.append((axes.plot([], [], color="black", linewidth=2)[0], "validation (thick)"))
    if trained:
        handles.append((axes.plot([], [], color="black", linewidth=0.8)[0], "training, with dropout (thin)"))
    handles += [(legend_mark(axes, letter), meaning) for kind, (letter, meaning) in MARKS.items()
                if kind in {mark.kind for mark in marks}]
    axes.set_xlabel(X_LABELS[x])
    axes.set_ylabel(Y_LABELS[metric])
    axes.grid(color="0.88", linewidth=0.6)
    axes.set_axisbelow(True)
    if marks:
        axes.update_datalim([mark.place for mark in marks])
    axes.autoscale_view()
    if log_x and math.isfinite(axes.dataLim.minposx):  # something drawn has a place there
        axes.set_xscale("log")
    elif x == "epochs":
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    linear = axes.get_yticks()
    set_scale(axes, [value for value in values if math.isfinite(value) and value > 0], log_axis)
    if y_range:
        axes.set_ylim(y_range)
    draw_legend(axes, handles, beside=len(runs) > INSIDE)
    axes.figure.draw_without_rendering()  # so that the axes have their size
    low, high = axes.get_ylim()
    place_marks(axes, [mark for mark in marks if low <= mark.place[1] <= high])
    set_ticks(axes, linear)


def draw_legend(axes, handles, beside):
    """Draw the legend inside the axes, or `beside` them, for which the picture grows."""
    where = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if beside else {
        "loc": "best"}  # which is the default, but with a warning where that takes a second
    legend = axes.legend(*zip(*handles), fontsize="small", framealpha=0.9, **where)
    if beside:
        figure, size = axes.figure, legend.get_window_extent()
        figure.set_size_inches(figure.get_figwidth() + size.width / figure.dpi,
                               max(figure.get_figheight(), size.height / figure.dpi + 0.5))


def draw_stage(axes, stage, x, metric, name, marker, style):
    """Draw validation and training of a stage; returns the values drawn."""
    places = stage.positions(x)
    valid = [(places[number], stage.epochs[number].valid) for number in places]
    if stage.loaded is not None:
        valid.insert(0, (stage.start[x], stage.loaded))
    train = [(places[number], stage.epochs[number].train) for number in places
             if stage.epochs[number].train is not None]
    values = []
    for split, points, look in (
            ("valid", valid, {"linewidth": 2, "marker": marker, "markersize": 4}),
            ("train", train, {"linewidth": 0.8, "marker": marker if len(train) == 1 else "", "markersize": 2})):
        drawn = [value_of(loss, metric) for _, loss in points]
        axes.plot([place for place, _ in points], drawn, gid=f"{name} {stage.name} {split}",
                  markevery=SPACING if sum(map(math.isfinite, drawn)) > 1 else 1, **look, **style)
        values += drawn
    return values


def value_of(loss, metric):
    """Express a loss in nats by the `metric` drawn; infinity, which is not drawn, if it is too large for an axis."""
    value = loss_metrics(loss)[metric]
    return value if value <= LARGEST else math.inf


def stage_events(stage, x, metric):
    """Yield (kind, point, place) of each event of a stage; both are its place on the curve of validation."""
    places = stage.positions(x)
    if stage.name == "finetune":
        first = min(places)
        if stage.loaded is None:
            point = places[first], value_of(stage.epochs[first].valid, metric)
        else:
            point = stage.start[x], value_of(stage.loaded, metric)
        yield "finetune", point, point
    for number, kinds in sorted(stage.events.items()):
        if number in places:
            point = places[number], value_of(stage.epochs[number].valid, metric)
            yield from ((kind, point, point) for kind in sorted(kinds))


def stage_scores(stage, x, metric):
    """Yield (kind, point, place) of each score of the best model of a stage, with the cache or dynamic evaluation.

    The point is where the stage ends, at its best loss. The place is the score on validation.
    """
    best = min(epoch.valid for epoch in stage.epochs.values())
    best = value_of(best if stage.loaded is None else min(best, stage.loaded), metric)
    for kind in MARKS:
        if (kind, "valid") in stage.scores:
            end = stage.end()[x]
            yield kind, (end, best), (end, value_of(stage.scores[kind, "valid"], metric))


def is_score(mark):
    return mark.kind in ("pointer", "dynamic", "both")


def place_marks(axes, marks):
    """Draw `marks`, side by side while there is room: events above their place, scores to the right of it.

    The axes grow until all letters are inside.
    """
    for _ in range(3):  # what grows moves the places
        taken = []
        for mark in sorted(marks, key=lambda mark: (is_score(mark), list(MARKS).index(mark.kind))):
            left, bottom = axes.transData.transform(mark.place) * 72 / axes.figure.dpi
            for step in (*range(1, MAX_STEPS + 1), 1):
                mark.offset = (step * ASIDE, 0) if is_score(mark) else (0, step * UP)
                spot = left + mark.offset[0], bottom + mark.offset[1]
                if all(max(abs(spot[0] - other[0]), abs(spot[1] - other[1])) >= LETTER for other in taken):
                    break
            taken.append(spot)
        make_room(axes, marks)
    for mark in marks:
        draw_mark(axes, mark)


def make_room(axes, marks):
    """Move the upper ends of the axes until they hold the letters of `marks`."""
    box, data = axes.get_window_extent(), axes.transScale + axes.transLimits
    sizes, grown = (box.width * 72 / axes.figure.dpi, box.height * 72 / axes.figure.dpi), [1.0, 1.0]
    for mark in marks:
        for side, share in enumerate(data.transform(mark.place)):
            free = 1 - (mark.offset[side] + 0.75 * LETTER) / sizes[side]
            grown[side] = max(grown[side], share / max(free, 0.2))
    right, top = data.inverted().transform(grown)
    axes.set_xlim(right=right)
    axes.set_ylim(top=top)


def draw_mark(axes, mark):
    """Draw the letter of a mark in a circle, and the line that leads to it: a step where it is a score."""
    line = {"arrowstyle": "-", "color": mark.colour, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
    if is_score(mark):
        line |= {"linestyle": ":", "connectionstyle": "angle,angleA=90,angleB=0,rad=0"}
    circle = {"boxstyle": "circle,pad=0.25", "facecolor": "white", "edgecolor": mark.colour, "linewidth": 1.2}
    order = 5 - mark.offset[1] / 1000  # no line crosses a lower circle
    axes.annotate(MARKS[mark.kind][0], mark.point, mark.place, textcoords=shifted(axes, mark.offset), ha="center",
                  va="center", fontsize=7, weight="bold", zorder=order, gid=f"{mark.name} {mark.kind}",
                  arrowprops=line, bbox=circle)


def shifted(axes, offset):
    """Return the transform from data to places that are `offset` points away."""
    return import_matplotlib().transforms.offset_copy(axes.transData, axes.figure, *offset, units="points")


def legend_mark(axes, letter):
    """Make the two parts of a mark in the legend."""
    circle, = axes.plot([], [], linestyle="", marker="o", markersize=10, color="white", markeredgecolor="black")
    inside, = axes.plot([], [], linestyle="", marker=f"${letter}$", markersize=5, color="black", markeredgewidth=0.3)
    return circle, inside


def set_scale(axes, values, log_axis):
    """Make the y axis logarithmic if `log_axis` says so, or if it is None and the values reach far."""
    low, high = min(values, default=1), max(values, default=1)
    if values and (high >= LOG_RANGE * low if log_axis is None else log_axis):
        axes.set_yscale("log")


def set_ticks(axes, linear):
    """Label the logarithmic ones of the axes with round values, or with `linear` ones where the range is short."""
    if axes.get_xscale() == "log":
        axes.set_xticks(ticks := log_ticks(*axes.get_xlim()), labels=map(format_tick, ticks))
        axes.xaxis.minorticks_off()
    if axes.get_yscale() == "log":
        bottom, top = axes.get_ylim()
        ticks = log_ticks(bottom, top)
        if len(ticks) < 3:
            ticks = [tick for tick in linear if bottom <= tick <= top]
        axes.set_yticks(ticks, labels=map(format_tick, ticks))
        axes.yaxis.minorticks_off()


def format_tick(value):
    return f"{value:,.10g}" if value < 1e6 else f"{value:g}"


def log_ticks(low, high):
    """List round values from `low` to `high` for a logarithmic axis, more than powers of ten."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in TICKS:
        ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(ticks) <= MAX_TICKS:
            break
    return ticks


def main(argv=None):
    args = parse_flags(argv)
    draw(args.files, args.out, args.x, args.metric, args.log, args.log_x)
    log(f"plot: {len(args.files)} run{'s' if len(args.files) > 1 else ''} drawn into {args.out}")
    log.check()


if __name__ == "__main__":
    run_script(main)
