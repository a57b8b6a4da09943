"""Folders of made-up records, and reports on them."""

import itertools
import json

import pandas as pd

from scripts.reporting.results import read_results

SO = {"encoder": "both", "position": "all", "lr": 0.0002, "batch_size": 32, "early_stop_loss": 0.01, "min_area": 0.08}
SO |= {"flip": True, "prune_first": False, "density_ratio": 5e-05, "t": 5, "eval_every": 0, "sampled_gradients": True}
OWN = {
    "so": SO,
    "lora": {"lr": 0.0002, "rank": 2},
    "adam": {"lr": 0.0002},
}
PER_SHOT = {"so": 2000, "lora": 500, "adam": 2000}


class Folder:
    """A results folder with made-up records."""

    def __init__(self, path):
        self.path = path
        self.number = itertools.count(1)

    def add(self, method="so", dataset="dtd", shots=4, seed=1, accuracy=50.0, curve=None, search=None, **changes):
        number = next(self.number)
        record = {
            **{"run_id": f"run{number}", "method": method, "dataset": dataset, "backbone": "ViT-B/16"},
            **{"shots": shots, "seed": seed, "test_accuracy": accuracy, "zero_shot_accuracy": 44.0 + number / 7},
            **{"iterations": 7, "train_seconds": number / 3, "peak_memory_mb": 900.5, "trainable_weights": 100},
            **{"changed_weights": 0 if method == "zero_shot" else 1000, "checkpoint_bytes": None},
            **{"precision": "fp32", "draw": "released", "classes": "all", "prompts": "released"},
            **{"template": "a photo of a {}.", "test_dataset": dataset, "root_path": None, "eval_only": False},
            **{"split_sha256": f"{dataset} {shots} {seed}", "weights_sha256": "f" * 64, "git_commit": "abc"},
            **{"torch_version": "2.6.0", "device": "cpu", "tuned_on": "none"},
            **{"finished_at": f"2026-01-01T00:{number // 60:02}:{number % 60:02}"},
            **OWN.get(method, {}),
            **({"total_iters": PER_SHOT[method] * shots} if method in PER_SHOT else {}),
            **changes,
        }
        folder = self.path / record["run_id"]
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(record))
        if curve is not None:
            pd.DataFrame(curve).to_csv(folder / "curve.csv", index=False)
        if search is not None:
            pd.DataFrame(search | {"val_accuracy": 1.0, "chosen": True}).to_csv(folder / "search.csv", index=False)

    def read(self):
        return read_results(self.path)


def texts(sheet):
    return {row[0].text: [cell.text for cell in row[1:]] for row in sheet.rows}
