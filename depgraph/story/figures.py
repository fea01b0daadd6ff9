"""The plots of a story: scores with the cut, sensitivity of axes, cost against quality."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from depgraph.page import broken, colours
from depgraph.report import METRICS
from depgraph.story.kinds import kind_of, kinds_of
from depgraph.story.parts import AxisCut, Curve, Sensitivity, Story, TradeOff, Trial
from depgraph.story.svg import Plot, plot, scale, short, spans_decades, standalone
from depgraph.story.tables import Row, number, table
from depgraph.wording import counted

_EXTREMES = 5  # most and least sensitive axes that are listed


def scores_section(story: Story) -> str:
    """A plot for each kind of axes: scores in ascending order, the stretch that went in another colour."""
    figures = [
        _figure(_scores(axes), story, axes)
        for held in kinds_of(story, story.axes).values()
        if (axes := [axis for axis in held if len(axis.scores) > 1]) and any(axis.removed for axis in axes)
    ]
    if not figures:
        return ""
    return (
        '<p class="hint">Groups of every axis in ascending order of their scores; the dashed part went, a ring marks the cut. '
        f'Axes of one kind share a plot.</p><div class="plots">{"".join(figures)}</div>'
    )


def _figure(picture: str, story: Story, axes: Sequence[AxisCut]) -> str:
    """A plot of some axes of one kind with what they are, by their family where they are of one."""
    families = {axis.family for axis in axes}
    what = story.families[families.pop()] if len(families) == 1 else kind_of(story.families[axes[0].family])
    return f"<figure>{picture}<figcaption>{broken(what)}</figcaption></figure>"


def _scores(axes: Sequence[AxisCut]) -> str:
    values = [score for axis in axes for score in axis.scores]
    picture = plot([(0, min(values)), (1, max(values))], ("groups", "score"), log=spans_decades(values))
    picture.percent_x = True
    thin = " thin" if len(axes) > 3 else ""
    for axis in axes:
        points = [((j + 0.5) / len(axis.scores), score) for j, score in enumerate(axis.scores)]
        said = f"{axis.what}: {axis.removed:,} of {axis.groups:,} went"
        for lost, begin, end in _stretches(axis.gone):
            picture.line(points[begin : end + 1], f"{'lost' if lost else f'f{axis.family}'}{thin}", said)
        last = max((j for j, share in enumerate(axis.gone) if share >= 0.5), default=None)
        if last is not None:
            picture.dot(points[last], f"cutoff f{axis.family}", said, 2 if thin else 3)
    return picture.text()


def _stretches(gone: Sequence[float]) -> Iterator[tuple[bool, int, int]]:
    """Runs of places most of which went, and of others: (went, first, last), each up to where the next one begins."""
    begin = 0
    for j in range(1, len(gone) + 1):
        if j == len(gone) or (gone[j] >= 0.5) != (gone[begin] >= 0.5):
            yield gone[begin] >= 0.5, begin, min(j, len(gone) - 1)
            begin = j


def sensitivity_section(story: Story) -> str:
    """A plot for each kind of axes of how the loss, or another figure, changes, and a list of the axes that change it most and least."""
    found = story.sensitivity
    if found is None or not found.curves:
        return ""
    curves = {curve.axis: curve for curve in found.curves}
    figures = [
        _figure(_changes([(axis, curves[axis.name]) for axis in held], found.figure), story, held)
        for held in kinds_of(story, [axis for axis in story.axes if axis.name in curves]).values()
    ]
    what = {axis.name: axis.what for axis in story.axes}
    on = f"{number(found.loss)} on {counted(found.batches, 'batch', 'batches')}"
    return (
        f'<p class="hint">How the {escape(found.figure)} ({on}) changes when one axis alone loses the lowest scored of its groups; nothing '
        f'makes up for them.</p><div class="plots">{"".join(figures)}</div>{_extremes(found, what)}'
    )


def _changes(held: Sequence[tuple[AxisCut, Curve]], figure: str) -> str:
    lines = [(axis, [(0.0, 0.0), *_known(curve)]) for axis, curve in held]
    picture = plot([p for _, points in lines for p in points], ("of its groups gone", f"change of the {figure}"))
    picture.percent_x = True
    thin = " thin" if len(held) > 3 else ""
    for axis, points in lines:
        picture.line(points, f"f{axis.family}{thin}", axis.what)
        for point in points[1:] if not thin else ():
            picture.dot(point, f"f{axis.family}", f"{axis.what}: {point[0]:.0%} gone, {figure} {point[1]:+.4g}")
    return picture.text()


def _known(curve: Curve) -> list[tuple[float, float]]:
    pairs = zip(curve.shares, curve.changes, strict=True)
    return [(share, change) for share, change in pairs if change is not None]


def _extremes(of: Sensitivity, what: dict[str, str]) -> str:
    """The axes that change the figure most and least, each at the share nearest to half of it."""
    found = {curve.axis: min(points, key=lambda p: abs(p[0] - 0.5)) for curve in of.curves if (points := _known(curve))}
    order = sorted(found, key=lambda axis: -found[axis][1])
    rows = [Row((broken(what.get(axis, axis)), f"#{found[axis][0]:.0%}", f"#{found[axis][1]:+.4g}")) for axis in order]
    if len(rows) > 2 * _EXTREMES:
        rows = [*rows[:_EXTREMES], Row(("…", "", "")), *rows[-_EXTREMES:]]
    return table(("axis, the most sensitive first", "#gone", f"#change of the {escape(of.figure)}"), rows)


def tradeoff_section(story: Story) -> str:
    """Share of the cost against quality: a line for each recipe, the front behind them, the chosen point ringed; and a table."""
    found = story.tradeoff
    if found is None or not found.trials:
        return ""
    better = "higher" if found.higher_is_better else "lower"
    return (
        f'<p class="hint">{escape(found.quality)} ({better} is better) by what is left of the {_word(found.metric)}; the broad line is the '
        f"front, of points that no other beats in both.</p>{tradeoff_plot(found)}{_trials(found)}"
    )


def tradeoff_plot(found: TradeOff) -> str:
    """The plot, with a legend."""
    picture, names = _tradeoff(found)
    legend = "".join(f'<span class="f{k}"><b class="swatch"></b>{escape(name)}</span>' for k, name in enumerate(names))
    drawn = picture.text().replace('class="plot"', 'class="plot wide"')
    return f'{drawn}<p class="legend">{legend}</p>'


def _tradeoff(found: TradeOff) -> tuple[Plot, list[str]]:
    """The plot, and the names of which each has a colour."""
    values = [trial.quality for trial in found.trials] + ([found.dense] if found.dense is not None else [])
    shares = [trial.share for trial in found.trials] + ([1.0] if found.dense is not None else [])
    ends = list(zip((min(shares), max(shares)), (min(values), max(values)), strict=True))
    picture = plot(ends, (f"{_word(found.metric)} left", found.quality), log=spans_decades(values), size=(520, 280))
    picture.percent_x = True
    room = 0.04 * (max(shares) - min(shares) or 1)
    picture.x = scale((min(shares) - room, max(shares) + room), picture.x.start, picture.x.end)
    if found.dense is not None:
        picture.level(found.dense, "level", f"dense: {number(found.dense)}")
    front = sorted((t.share, t.quality) for t in found.trials if t.on_front)
    picture.line(front, "front", "the front")
    names = list(dict.fromkeys(trial.name for trial in found.trials))
    for k, name in enumerate(names):
        mine = sorted((t for t in found.trials if t.name == name), key=lambda t: t.share)
        picture.line([(t.share, t.quality) for t in mine], f"thin f{k}", name)
        for t in mine:
            picture.dot((t.share, t.quality), f"f{k}", _said(t), 3.5)
    if found.chosen is not None:
        chosen = found.trials[found.chosen]
        picture.dot((chosen.share, chosen.quality), "ring", f"chosen: {_said(chosen)}", 7)
    return picture, names


def tradeoff_svg(found: TradeOff) -> str:
    """The plot as a picture of its own, for light paper, with a legend."""
    picture, names = _tradeoff(found)
    return standalone(picture, names, colours(len(names)))


def _word(metric: str) -> str:
    return METRICS.get(metric, escape(metric))


def _said(trial: Trial) -> str:
    return f"{trial.name}, {trial.share:.1%} left: {short(trial.quality)}"


def _trials(found: TradeOff) -> str:
    rows = []
    order = sorted(range(len(found.trials)), key=lambda j: (-found.trials[j].share, found.trials[j].quality))
    for j in order:
        trial = found.trials[j]
        said = ", ".join(word for word, true in (("front", trial.on_front), ("chosen", j == found.chosen)) if true)
        style = " ".join(filter(None, ("front" if trial.on_front else "", "chosen" if j == found.chosen else "")))
        rows.append(Row((escape(trial.name), f"#{trial.share:.1%}", f"#{number(trial.quality)}", said), style))
    return table(("recipe", f"#{_word(found.metric)} left", f"#{escape(found.quality)}", ""), rows)
