"""A story as one self-contained HTML page without scripts: sections in a fixed order, each left out where nothing is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape
from importlib.resources import files

from depgraph.page import broken, colours, filled, style
from depgraph.report import METRICS
from depgraph.story.figures import scores_section, sensitivity_section, tradeoff_section
from depgraph.story.parts import Quality, Story
from depgraph.story.picture import map_section, widths_section
from depgraph.story.tables import Row, number, rows_of, table, times_table

MORE_COLOURS = 12  # for recipes in a plot, beside those of families


def story_page(story: Story) -> str:
    """The page as text; it needs nothing from the network."""
    made = [(key, title, body) for key, (title, make) in _SECTIONS.items() if (body := make(story))]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in made)
    parts = {
        "title": escape(story.model),
        "style": style(),
        "colours": colours(max(len(story.families), MORE_COLOURS)),
        "head": f"{_kept(story)}{''.join(_verdicts(story))}<nav>{links}</nav>",
        "sections": "\n".join(f'<section id="{key}"><h2>{title}</h2>\n{body}</section>' for key, title, body in made),
    }
    return filled(files("depgraph.story").joinpath("page.html").read_text(encoding="utf-8"), parts)


def _kept(story: Story) -> str:
    """What is left, as meters; bytes are those of a file, where one was made beside a dense one."""
    costs = {m: (word, getattr(story.before, m), getattr(story.after, m)) for m, word in METRICS.items()}
    file = next((file for file in story.files if file.dense_bytes), None)
    if file is not None and file.dense_bytes:
        costs["bytes"] = (f"the bytes of {escape(file.name)}", file.dense_bytes, file.bytes)
    return f'<div class="kept">{"".join(_meter(*cost) for cost in costs.values())}</div>'


def _meter(word: str, before: int, after: int) -> str:
    share = after / max(before, 1)
    return (
        f'<div><b>{share:.1%}</b> of {word}<span class="meter"><i style="width:{min(100 * share, 100):.2f}%">'
        f'</i></span><span class="w">{before:,} → {after:,}</span></div>'
    )


def _verdicts(story: Story) -> Iterator[str]:
    """The lines that matter most: quality, speed, the check."""
    for quality in story.quality:
        on = f" on {escape(quality.data)}" if quality.data else ""
        yield f"<p><b>{escape(quality.name)}</b>{on}: {number(quality.before)} → {number(quality.after)}{_change(quality)}</p>"
    for timing in story.timings:
        if timing.kind == "measured" and timing.speedup:
            yield f"<p><b>{timing.speedup:.2f} times</b> as fast, measured: {escape(timing.what)}</p>"
            break
    if story.check is not None:
        right = "bad" if story.check.vacuous or story.check.skipped else "good"
        yield f'<p class="{right}">Check: {escape(str(story.check))}</p>'


def _change(quality: Quality) -> str:
    if not quality.before or quality.after is None:
        return ""
    change = quality.after / quality.before - 1
    better = change > 0 if quality.higher_is_better else change < 0
    return f' <span class="{"good" if better else "bad" if change else ""}">({change:+.1%})</span>'


def _check(story: Story) -> str:
    check = story.check
    if check is None:
        return ""
    if check.skipped:
        return f"<p>Not compared by value: {escape(check.skipped)}.</p>"
    rows = [
        ("error: the largest difference to the reference, as a share of the largest output", f"{check.error:.2e}"),
        (f"sensitivity: how far {escape(check.moved_by)} moved the outputs", f"{check.sensitivity:.2e}"),
        ("tolerance of the error", f"{check.tolerance:.2e}"),
        ("axes compared with the original, its removed groups filled with zeros", f"{check.exact_axes}"),
        ("axes compared with the cut program, as an operator looks at all of them", f"{check.mixed_axes}"),
        ("branches compared with the program without them", f"{check.branches}"),
    ]
    said = "The check says nothing: the removal hardly moves the outputs." if check.vacuous else ""
    return (f'<p class="bad">{said}</p>' if said else "") + table(
        (), [Row((name, f"#{value}")) for name, value in rows]
    )


def _times(story: Story) -> str:
    return times_table(story.timings) if story.timings else ""


def _files(story: Story) -> str:
    rows = [
        Row(
            (
                escape(f.name),
                escape(f.what),
                f"#{f.bytes:,}",
                f"#{f.bytes / f.dense_bytes:.1%}" if f.dense_bytes else "#–",
            )
        )
        for f in story.files
    ]
    return table(("file", "what", "#bytes", "#of the dense one"), rows) if rows else ""


def _steps(story: Story) -> str:
    """What every step was to keep and left, of a model that was pruned in several."""
    names = list(dict.fromkeys(metric for step in story.steps for metric in step.keep))
    left = [name for name in (*METRICS, *names) if all(name in step.left for step in story.steps)]
    left, rows = list(dict.fromkeys(left)), []
    for step in story.steps:
        asked = ", ".join(f"{_word(name)} {step.keep[name]:.1%}" for name in names if name in step.keep)
        error = "#–" if step.error is None else f"#{step.error:.1e}"
        rows.append(Row((f"#{step.number}", escape(asked), *(f"#{step.left[m]:.1%}" for m in left), error)))
    head = ("#step", "to keep at most", *(f"#{_word(name)}" for name in left), "#check's error")
    return table(head, rows) if rows else ""


def _word(measure: str) -> str:
    """What a measure is called; those without a word of their own are one."""
    return METRICS.get(measure, measure)


def _making(story: Story) -> str:
    making, parts = story.making, []
    if making.command:
        parts.append(f"<pre>{escape(making.command)}</pre>")
    facts = {"recipe": making.recipe, "target": making.target, "form": story.form, "made": making.made}
    facts |= {name: str(value) for name, value in making.settings.items()}
    facts |= {f"seed of {name}": str(value) for name, value in making.seeds.items()}
    parts += [table((), rows_of(facts))] if any(facts.values()) else []
    if making.versions:
        parts.append(f'<p class="hint">{", ".join(f"{escape(n)} {escape(v)}" for n, v in making.versions.items())}</p>')
    return "".join(parts)


def _notes(story: Story) -> str:
    return f"<ul>{''.join(f'<li>{broken(note)}</li>' for note in story.notes)}</ul>" if story.notes else ""


_SECTIONS: dict[str, tuple[str, Callable[[Story], str]]] = {
    "tradeoff": ("Cost against quality", tradeoff_section),
    "latency": ("Latency", _times),
    "steps": ("Steps", _steps),
    "widths": ("Widths of layers, before and after", widths_section),
    "map": ("What went of every axis, block by block", map_section),
    "scores": ("Scores", scores_section),
    "sensitivity": ("Sensitivity", sensitivity_section),
    "check": ("Check", _check),
    "files": ("Files", _files),
    "making": ("To make it again", _making),
    "notes": ("Notes", _notes),
}
