"""Means and spread over runs of several seeds, from their leaderboards.

    for s in 0 1 2 3 4; do for a in dt.py rwr.py mle_filter.py "mle_filter.py --keep 1.0"; do
        python $a --seed $s --out runs/seed$s; done; done
    python benchmarks/seeds.py runs/seed?
"""
import json
import sys
from pathlib import Path

import numpy as np

COLUMNS = {"gold": ".2f", "reward": ".2f", "win_rate": ".2f", "kl_to_base": ".1f", "response_tokens": ".1f",
           "distinct_2": ".3f", "train_flops": ".1e"}


def main(folders: list[str]) -> None:
    """Prints a Markdown table: a row a method, mean ± sample standard deviation over the runs."""
    rows: dict[str, list[dict]] = {}
    for folder in folders:
        for line in (Path(folder) / "leaderboard.jsonl").read_text().splitlines():
            row = json.loads(line)
            rows.setdefault(f"{row['algorithm']} {row['variant']}".strip(), []).append(row)
    columns = {c: f for c, f in COLUMNS.items() if all(r[c] is not None for group in rows.values() for r in group)}
    print("| | runs | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 2) + "|")
    for name, group in rows.items():
        cells = []
        for column, form in columns.items():
            values = np.array([r[column] for r in group])
            spread = (
                f" ± {values.std(ddof=1):{form}}"
                if len(values) > 1 and "seconds" not in column and "flops" not in column
                else ""
            )
            cells.append(f"{values.mean():{form}}{spread}")
        print(f"| {name} | {len(group)} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(sys.argv[1:]) if len(sys.argv) > 1 else sys.exit(__doc__)
