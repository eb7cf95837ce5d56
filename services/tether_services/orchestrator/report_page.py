"""report.html: one self-contained page with the curves, the table before/after and a few response pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tether_services.orchestrator.report_charts import draw_charts

__all__ = ["render_page"]

_NUM_PAIRS = 4
_STYLE = """
:root { color-scheme: light; --ink: #1f2933; --soft: #616e7c; --line: #e4e7eb; --card: #ffffff; --accent: #2563eb;
        --good: #15803d; --bad: #b91c1c; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7fa; color: var(--ink); font: 15px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 40px 0 12px; }
p.lead { color: var(--soft); margin: 0 0 24px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px; }
.card, .panel { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 14px 16px; } .card b { display: block; font-size: 24px; font-weight: 650; }
.card span { color: var(--soft); font-size: 13px; } .panel { padding: 16px; overflow-x: auto; }
.panel svg { width: 100%; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 7px 10px; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; font-size: 13px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; margin-bottom: 16px; }
.pair .panel { white-space: pre-wrap; overflow-wrap: anywhere; } .pair h3 { grid-column: 1 / -1; margin: 4px 0 0;
  font-size: 14px; font-weight: 600; color: var(--soft); }
.tag { display: block; font-size: 12px; color: var(--soft); margin-bottom: 6px; } .good { color: var(--good); }
.bad { color: var(--bad); } pre { margin: 0; font-size: 12.5px; overflow-x: auto; } details summary { cursor: pointer; }
@media (max-width: 700px) { .pair { grid-template-columns: 1fr; } }
"""
_ROWS = (
    ("Mean score", "score_mean"),
    ("Standard deviation of scores", "score_std"),
    ("KL per response (nats)", "kl_per_response"),
    ("KL per 64 tokens (nats)", "kl_per_64_tokens"),
    ("Tokens per response", "response_length_mean"),
    ("Share that reached the length limit", "truncated_ratio"),
)


def render_page(report: Mapping[str, Any]) -> str:
    """Return the page of a report; every text of the run is escaped."""
    title = f"Run {escape(report['run_id'])}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><main><h1>{title}</h1>{_lead(report)}{_cards(report)}"
        f"{_charts(report)}{_table(report)}{_pairs(report)}{_details(report)}</main></body></html>\n"
    )


def _lead(report: Mapping[str, Any]) -> str:
    state = report["state"]
    kind = "good" if state == "SUCCEEDED" else "bad"
    planned = report["config"]["total_steps"]
    text = f'<b class="{kind}">{escape(state.lower())}</b>, {len(report["steps"])} of {planned} steps'
    error = f'<br><span class="bad">{escape(report["error"])}</span>' if report["error"] else ""
    model = escape(str(report["config"]["model"]))
    back = "".join(f"<br>{_rollback(rollback)}" for rollback in report["rollbacks"])
    return f'<p class="lead">{text} in {report["wall_seconds"]:.0f} s from {model}{error}{back}</p>'


def _rollback(rollback: Mapping[str, Any]) -> str:
    return f"rolled back from {rollback['from_step']} to {rollback['to_step']} steps: {escape(rollback['reason'])}"


def _cards(report: Mapping[str, Any]) -> str:
    samples = report["samples"]
    as_expected = "yes" if report["versions_as_expected"] else "NO"
    cards = [
        (_number(report["gain_in_sd"], "+.2f"), "gain, standard deviations of the scores before"),
        (_number(report["kl_per_response"], ".2f"), "KL per held-out response, nats"),
        (_number(report["mean_abs_dlogp_max"], ".1e"), "largest trainer-generator gap, nats per token"),
        (f"{samples['trained']:,}", f"samples trained on; {samples['dropped']:,} dropped"),
        (as_expected, "every sample from the expected version"),
    ]
    inner = "".join(f'<div class="card"><b>{value}</b><span>{label}</span></div>' for value, label in cards)
    return f'<div class="cards">{inner}</div>'


def _charts(report: Mapping[str, Any]) -> str:
    if not report["steps"]:
        return ""
    return f'<h2>Training</h2><div class="panel">{draw_charts(report["steps"])}</div>'


def _table(report: Mapping[str, Any]) -> str:
    before, after = report["before"], report["after"]
    if before is None:
        return ""
    rows = "".join(
        f"<tr><td>{label}</td><td>{_number(before[key], '.3f')}</td>"
        f"<td>{_number(after[key] if after else None, '.3f')}</td></tr>"
        for label, key in _ROWS
    )
    versions = [f"version {side['policy_version']}" if side else "not reached" for side in (before, after)]
    count = len(before["samples"])
    return (
        f'<h2>{count} held-out prompts</h2><div class="panel"><table><tr><th></th><th>before<br>{versions[0]}</th>'
        f"<th>after<br>{versions[1]}</th></tr>{rows}</table></div>"
    )


def _pairs(report: Mapping[str, Any]) -> str:
    """Return the first prompts that both evaluations answered, in their order: not chosen by result."""
    if report["before"] is None or report["after"] is None:
        return ""
    after = {sample["prompt"]: sample for sample in report["after"]["samples"]}
    both = [(sample, after[sample["prompt"]]) for sample in report["before"]["samples"] if sample["prompt"] in after]
    pairs = "".join(_pair(old, new) for old, new in both[:_NUM_PAIRS])
    return f"<h2>Before and after, side by side</h2>{pairs}"


def _pair(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    sides = "".join(_side(name, sample) for name, sample in (("before", old), ("after", new)))
    return f'<div class="pair"><h3>{escape(old["prompt"])}</h3>{sides}</div>'


def _side(name: str, sample: Mapping[str, Any]) -> str:
    tag = f"{name}, score {sample['score']:.2f}, KL {sample['kl']:.1f}"
    return f'<div class="panel"><span class="tag">{tag}</span>{escape(sample["response"])}</div>'


def _details(report: Mapping[str, Any]) -> str:
    blocks = (("Configuration", report["config"]), ("Services", report["services"]), ("Versions", report["versions"]))
    inner = "".join(
        f"<h3>{title}</h3><pre>{escape(_lines(content))}</pre>" for title, content in blocks if content is not None
    )
    return (
        f'<h2>Details</h2><details class="panel"><summary>Configuration, services, versions</summary>{inner}</details>'
    )


def _lines(content: Mapping[str, Any], prefix: str = "") -> str:
    lines: list[str] = []
    for key, value in content.items():
        if isinstance(value, Mapping):
            lines.append(_lines(value, f"{prefix}{key}."))
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else value
            lines.append(f"{prefix}{key} = {shown}")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "&ndash;" if value is None else format(value, form)
