"""The study as one page, ``report.html``: nothing is fetched from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape

from coordinator.study.cells import Fleet
from coordinator.study.charts import accuracy_chart, race_chart
from coordinator.study.data import describe_choice
from coordinator.study.methods import Method
from coordinator.study.output import CSV_FILE, JSON_FILE, StudyDocument
from coordinator.study.settings import DelayModel, StudySettings
from coordinator.study.summary import UGS, Finding, Group, Interval
from coordinator.study.tables import interval_text, percent_text

# What versions 1 and 2 of the paper, those with LDS, claim at most.
_PAPER = "https://arxiv.org/abs/2407.15738"
PAPER_GAIN_POINTS = 34.1
PAPER_TIME_SAVED_PERCENT = 62

_CSS = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 72rem;
       margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
p, li { max-width: 46rem; } .lead { font-size: 1.1rem; }
table { border-collapse: collapse; margin: .6rem 0 1.2rem; font-size: .93rem; }
th, td { padding: .28rem .8rem; text-align: right; border-bottom: 1px solid #dfe3e8;
         white-space: nowrap; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #8a949e; }
.wide { overflow-x: auto; } svg { max-width: 100%; height: auto; }
.note { color: #59636e; font-size: .93rem; } .warn { background: #fff4d6; padding: .5rem .8rem; }
"""


def render_page(document: StudyDocument) -> str:
    """The whole page as HTML."""
    body = "\n".join(_sections(document))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Allocation study</title>\n<style>{_CSS}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _sections(document: StudyDocument) -> Iterator[str]:
    yield "<h1>What the allocation policy does to accuracy and time</h1>"
    yield f'<p class="note">{escape(_what_was_run(document.settings))}</p>'
    if not document.is_complete:
        yield (
            f'<p class="warn">Stopped early: {len(document.results)} of {document.cells} results '
            "are here. The same command goes on with the rest.</p>"
        )
    yield _findings(document)
    yield _method_text(document.settings)
    if document.groups:
        yield from _results(document.groups)
    yield _repeat_text(document)


def _what_was_run(settings: StudySettings) -> str:
    training = settings.training
    network = training.network or "the small network for samples of this shape"
    arguments = "".join(f", {key} {value}" for key, value in training.network_arguments.items())
    return (
        f"{describe_choice(training.data)}; {network}{arguments}; {training.epochs} epochs, global "
        f"batch {training.global_batch}, {training.optimiser.name} with learning rate "
        f"{training.optimiser.lr:g}; seeds {', '.join(map(str, settings.seeds))}."
    )


def _findings(document: StudyDocument) -> str:
    rows = [
        _finding_row(
            "most accuracy over FLS on the same fleet",
            f"{PAPER_GAIN_POINTS} points",
            document.largest_gain_over_fls,
            lambda value: f"{percent_text(value)} points",
        ),
        _finding_row(
            "most time saved against UGS",
            f"{PAPER_TIME_SAVED_PERCENT} %",
            document.most_time_saved,
            lambda value: f"{percent_text(_rest_of(value))} %",
        ),
    ]
    head = _row(["", "paper, up to", "here, up to", "with"], "th")
    return (
        f'<h2>The two claims</h2>\n<p>The policies are those of <a href="{_PAPER}">Parallel Split '
        "Learning with Global Sampling</a>. Its network, data and fleet differ from these, so the "
        "numbers tell whether the effect is there, not whether it has the same size.</p>\n"
        f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _finding_row(
    what: str, paper: str, finding: Finding | None, text: Callable[[Interval], str]
) -> str:
    if finding is None:
        return _row([what, paper, "not compared", ""])
    where = f"{finding.method.label}; {_fleet_title(finding.fleet)}"
    return _row([what, paper, text(finding.value), where])


def _rest_of(share: Interval) -> Interval:
    return Interval(1 - share.mean, share.half_width, share.n)


def _method_text(settings: StudySettings) -> str:
    return (
        "<h2>How it was measured</h2>\n<p>All client segments of a fleet hold the same weights, "
        "and the sum of the devices' gradients is exactly the gradient of the undivided network "
        "on the global batch. So <strong>one network that is fed the batches which a policy plans "
        "is the fleet</strong>: nothing but the order of floating-point sums differs. The batches "
        "come from the planner of real runs, with the seeds that devices would be given.</p>\n"
        "<p>Undivided is the same network on all samples in one place, shuffled. "
        "FLS and FPLS take fixed numbers of samples from each device until it runs out. Everybody "
        f"trains every sample once an epoch. {escape(_delay_text(settings.training.delays))} The "
        "modelled time of a step is that of its slowest device. A policy that does not look at "
        "delays trains the same batches whoever is slow: only its time differs.</p>\n"
        "<p>&#177; is Student's 95 % interval over the seeds, which deal the samples, choose the "
        "slow devices and set the first weights; ratios are taken seed by seed.</p>"
    )


def _delay_text(delays: DelayModel) -> str:
    per_sample = f" and {delays.per_sample_s:g} s per sample" if delays.per_sample_s else ""
    return (
        f"A device's part of a step takes {delays.fixed_s:g} s{per_sample}; a slow one "
        f"takes {delays.factor:g} times as long."
    )


def _results(groups: Sequence[Group]) -> Iterator[str]:
    yield "<h2>Accuracy</h2>"
    yield accuracy_chart(groups) or ""
    yield _table(
        groups, "Test accuracy after the last epoch, %", lambda g: percent_text(g.accuracy)
    )
    race = race_chart(groups)
    if race is not None:
        yield "<h2>Accuracy over time</h2>\n<p>Each mark is the end of an epoch.</p>"
        yield race
    yield "<h2>Time and batches</h2>"
    yield _table(groups, "Modelled time as a share of UGS's", _time_text)
    yield _table(
        groups,
        "Mean batch deviation (L1 distance of a step's class mix from the pooled one)",
        lambda g: interval_text(g.deviation, digits=3),
    )
    yield _table(
        groups,
        "Steps with a slow device, of all steps",
        lambda g: (
            "-"
            if g.straggler_steps is None
            else f"{g.straggler_steps.mean:,.0f} of {g.steps.mean:,.0f}"
        ),
    )


def _time_text(group: Group) -> str:
    return "1" if group.method == UGS else interval_text(group.time_ratio, digits=2)


def _table(groups: Sequence[Group], title: str, text: Callable[[Group], str]) -> str:
    """A row per fleet, a column per method."""
    methods = list(dict.fromkeys(group.method for group in groups))
    fleets = list(dict.fromkeys(group.fleet for group in groups if group.fleet is not None))
    found = {(group.method, group.fleet): group for group in groups}
    rows = [
        _row([_fleet_title(fleet), *(_cell(found, method, fleet, text) for method in methods)])
        for fleet in fleets
    ]
    head = _row(["fleet", *(method.label for method in methods)], "th")
    return (
        f'<h3>{escape(title)}</h3>\n<div class="wide"><table><thead>{head}</thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(
    found: dict[tuple[Method, Fleet | None], Group],
    method: Method,
    fleet: Fleet,
    text: Callable[[Group], str],
) -> str:
    group = found.get((method, None if method.policy is None else fleet))
    return "-" if group is None else text(group)


def _fleet_title(fleet: Fleet) -> str:
    slow = f", {fleet.stragglers:.0%} slow" if fleet.stragglers else ""
    return f"{fleet.scheme.description}, {fleet.devices} devices{slow}"


def _row(cells: Sequence[str], tag: str = "td") -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _repeat_text(document: StudyDocument) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in document.environment.items())
    return (
        f"<h2>Numbers and settings</h2>\n<p>Every result is in <code>{CSV_FILE}</code>, all of it "
        f"with the settings in <code>{JSON_FILE}</code>, both beside this page. "
        "<code>coordinator study --help</code> names the options.</p>\n"
        f'<p class="note">{escape(versions)}</p>'
    )
