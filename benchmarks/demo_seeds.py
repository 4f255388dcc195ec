# SPDX-License-Identifier: MIT
"""How far do the demonstration's numbers depend on the seed? Mean and spread of several, as in docs/demo.md.

    python benchmarks/demo_seeds.py FOLDER [--deep] [--seeds 0 1 2 3 4]

Each seed gets a folder of its own in FOLDER, and a run that was interrupted goes on.
"""

import argparse
from pathlib import Path

import numpy as np

from prompt_cam_hf.training.demo import run_demo


def flat(numbers, prefix=""):
    """The numbers of a report in one level, by their path."""
    found = {}
    for name, value in numbers.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name} / ")
        elif isinstance(value, float):
            found[prefix + name] = value
    return found


def main():
    parser = argparse.ArgumentParser(description="Mean and spread of the demonstration's numbers over seeds.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--deep", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    given = parser.parse_args()
    reports = [
        flat(run_demo(given.folder / f"seed_{seed}", deep=given.deep, seed=seed).numbers) for seed in given.seeds
    ]
    print(f"\n| seeds {' '.join(map(str, given.seeds))} | mean | lowest | highest | standard deviation |")
    print("| --- | --- | --- | --- | --- |")
    for name in reports[0]:
        values = [report[name] for report in reports]
        columns = (np.mean(values), min(values), max(values), np.std(values, ddof=1))
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in columns) + " |")


if __name__ == "__main__":
    main()
