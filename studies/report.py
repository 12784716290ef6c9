"""The tables of docs/numerics.md from what `studies.rules` collected: `python -m studies.report`.

Each score is compared with that of the default on the same items by a paired sign-flip permutation test, objects of one
picture counting as one observation.
"""

from fastrel.evaluation.store import Score
from fastrel.evaluation.summary import Row, summarise
from studies.forms import FORMS
from studies.rules import RESULTS, SUBJECTS, read

QUALITY = ("pointing", "energy", "mean_ap", "mean_iou", "average_precision")
STABILITY = ("float32_error", "float32_spearman", "bfloat16_spearman")
BASE = "default"


def scores(subject: str, start: str) -> list[Score]:
    return [
        Score(line["item"], line["item"].split("/")[0], line["form"], "study", line["metric"], float(line["value"]))
        for line in read(subject)
        if line["start"] == start
    ]


def cell(row: Row | None) -> str:
    if row is None:
        return "–"
    stars = "" if not row.p < 0.05 else " ∗∗" if row.p < 0.01 else " ∗"
    return f"{row.mean:.3f} ± {row.error:.3f}{stars}"


def table(subject: str, start: str) -> str:
    order = [BASE, *(name for name in FORMS if name != BASE)]
    made = scores(subject, start)
    rows = {(row.configuration, row.metric): row for row in summarise(made, order)}
    columns = [metric for metric in QUALITY if (BASE, metric) in rows]
    worst = {}
    for score in made:
        if score.metric in STABILITY:
            pick = max if score.metric == "float32_error" else min
            key = score.configuration, score.metric
            worst[key] = pick(worst.get(key, score.value), score.value)
    items = len({score.item for score in made})
    lines = [
        f"**{subject}**, start layer {start}, {items} items",
        "",
        "| form | "
        + " | ".join(name.replace("_", " ") for name in columns)
        + " | float32 error, worst | bfloat16 Spearman, worst |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for name in order:
        cells = [cell(rows.get((name, metric))) for metric in columns]
        error, rank = worst.get((name, "float32_error")), worst.get((name, "bfloat16_spearman"))
        cells += ["–" if error is None else f"{error:.1e}", "–" if rank is None else f"{rank:.4f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    for subject in SUBJECTS:
        if not (RESULTS / f"{subject}.csv").exists():
            print(f"({subject}: not collected)\n")
            continue
        for start in dict.fromkeys(line["start"] for line in read(subject)):
            print(table(subject, start), end="\n\n")
