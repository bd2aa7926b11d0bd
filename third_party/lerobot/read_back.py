"""Reads a dataset with LeRobot's own reader: `python read_back.py DATASET OUT.npz`.

Stores every key of `LeRobotDataset`'s rows, stacked, images as float [N, 3, H, W]; the instructions
as `task`; and the means that LeRobot read from the statistics as `mean/KEY`.
"""

import sys

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset


def main(directory: str, target: str) -> None:
    dataset = LeRobotDataset("local/export", root=directory)
    rows = [dataset[i] for i in range(len(dataset))]
    arrays = {key: np.stack([np.asarray(row[key]) for row in rows]) for key in rows[0]}
    means = {f"mean/{key}": stats["mean"] for key, stats in dataset.meta.stats.items()}
    np.savez(target, **arrays, **means, num_episodes=dataset.num_episodes, fps=dataset.fps)


if __name__ == "__main__":
    main(*sys.argv[1:])
