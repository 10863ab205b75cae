"""The comparison's report: Markdown for people, one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_MARKS = "osD^vPX*"


def markdown(report: dict[str, Any]) -> str:
    """Tables of all rows, of memory and of who was compared, with what is absent or left out."""
    parts = [_machine(report["machine"]), _rows(report["rows"]), _memory(report["memory"]), _peers(report["peers"])]
    parts.append(_reasons("Absent", [(entry["peer"], entry["reason"]) for entry in report["absent"]]))
    left = [(f"{entry['peer']}, {entry['work']}", entry["reason"]) for entry in report["left_out"]]
    parts.append(_reasons("Left out", left))
    return "\n\n".join(part for part in parts if part) + "\n"


def joined(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Two reports of one machine as one: what the later one has stands in the place of the earlier one's.

    Each row tells how fast memory was read in its own run; the machine and the settings are the later one's.
    """
    again = {(row["peer"], row["work"], row["context"]) for row in later["rows"]}
    kept = [row for row in earlier["rows"] if (row["peer"], row["work"], row["context"]) not in again]
    whole = {**later, "rows": kept + later["rows"], "peers": {**earlier["peers"], **later["peers"]}}
    measured = {entry["peer"] for entry in later["memory"]}
    whole["memory"] = [entry for entry in earlier["memory"] if entry["peer"] not in measured] + later["memory"]
    for name in ("absent", "left_out"):
        whole[name] = [entry for entry in earlier[name] if entry["peer"] not in later["peers"]] + later[name]
    return whole


def _machine(found: dict[str, Any]) -> str:
    return (
        f"{found['processor']}, {found['threads']} of {found['cores']} cores, {found['instructions']}; memory is read "
        f"at {found['read_gb_per_s']} GB/s, matrices are multiplied at {found['gflop_per_s_float32']} (float32) and "
        f"{found['gflop_per_s_bfloat16']} GFLOP/s (bfloat16); load average {found['load_average']} before the run, "
        f"{found['load_average_after']} after it. Medians with quartiles; the ratio is the peer's time "
        "over midstream's."
    )


def _rows(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    lines = ["| work | context | peer | peer | midstream | ratio |", "|---|--:|---|--:|--:|--:|"]
    for row in rows:
        peer, ours, ratio = (row["spread"][name] for name in ("peer", "midstream", "ratio"))
        lines.append(
            f"| {row['work']} | {row['context']} | {row['peer']} | {_seconds(peer)} | {_seconds(ours)} "
            f"| {row['ratio']:.2f} [{ratio['q1']:.2f}, {ratio['q3']:.2f}] |"
        )
    return "\n".join(lines)


def _seconds(found: dict[str, float]) -> str:
    """Median and quartiles in the unit that suits the median."""
    scale, unit, digits = (1, "s", 2) if found["median"] >= 1 else (1000, "ms", 1)
    middle, low, high = (f"{found[key] * scale:.{digits}f}" for key in ("median", "q1", "q3"))
    return f"{middle} {unit} [{low}, {high}]"


def _memory(entries: Sequence[dict[str, Any]]) -> str:
    if not entries:
        return ""
    lines = ["| peak memory | peer | midstream | ratio |", "|---|--:|--:|--:|"]
    for entry in entries:
        sizes = [f"{entry[key] / 2**20:.0f} MiB" for key in ("peer_bytes", "midstream_bytes")]
        lines.append(f"| {entry['peer']} | {' | '.join(sizes)} | {entry['ratio']:.2f} |")
    return "\n".join(lines)


def _peers(found: dict[str, dict[str, Any]]) -> str:
    if not found:
        return ""
    lines = ["| peer | version | format | adapters | answers equal in float32 | in its format |", "|---" * 6 + "|"]
    for name, entry in found.items():
        facts = entry.get("facts", {}).get("peer", {})
        told = [str(facts.get(key) or "-") for key in ("version", "format", "adapters")]
        lines.append(
            f"| {name} | {' | '.join(told)} | {_equality(entry.get('check'))} | {_equality(entry.get('equal'))} |"
        )
    return "\n".join(lines)


def _equality(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not compared"
    text = f"{found['compared'] - found['differing']} of {found['compared']}"
    if "largest_logprob_difference" in found:
        text += f", log-probabilities within {found['largest_logprob_difference']:.0e}"
    return text


def _reasons(title: str, entries: Sequence[tuple[str, str]]) -> str:
    return "\n".join([f"{title}:", "", *(f"- {what}: {reason}" for what, reason in entries)]) if entries else ""


def draw(report: dict[str, Any], path: Path) -> None:
    """Each row's ratio with its quartiles, one mark a peer, on a logarithmic axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    rows = report["rows"]
    names = list(dict.fromkeys(f"{row['work']}, {row['context']}" for row in rows))
    figure = Figure(figsize=(9, 1.5 + 0.28 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for mark, peer in zip(_MARKS, dict.fromkeys(row["peer"] for row in rows), strict=False):
        own = [row for row in rows if row["peer"] == peer]
        ratios = [row["ratio"] for row in own]
        heights = [names.index(f"{row['work']}, {row['context']}") for row in own]
        # The median of the ratios may differ from the ratio of the medians, which is what is shown.
        low = [max(0.0, row["ratio"] - row["spread"]["ratio"]["q1"]) for row in own]
        high = [max(0.0, row["spread"]["ratio"]["q3"] - row["ratio"]) for row in own]
        axes.errorbar(ratios, heights, xerr=[low, high], fmt=mark, capsize=2, markersize=5, label=peer)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="x", which="both", alpha=0.3)
    axes.set_xlabel("peer's time / midstream's (right of 1: midstream is ahead)")
    if rows:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
