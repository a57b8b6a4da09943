"""Few-shot adaptation of CLIP: one run.

python main.py                                                       # SO on the embedded digits
python main.py --shots 4 --method zero_shot                          # the same without training
python main.py --dataset dtd --shots 4 --root_path $DATA             # the released protocol on ViT-B/16
python main.py --config configs/so_paper.yaml --dataset dtd --shots 4 --root_path $DATA
"""

import os

# Before torch is imported: its threads wait for each other by spinning, and shall give up soon and sleep. Where cores
# are shared with other programs, long spinning makes a small model's run ten times slower (GNU OpenMP, so on Linux).
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import errno
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

import torch

import clip
import datasets
import run_utils
import train
import utils
from clip.preprocess import train_transform
from methods import METHODS, MethodError

MISTAKES = (run_utils.UserError, datasets.DatasetError, clip.WeightsError, MethodError, train.TrainingDiverged)
FULL = {errno.ENOSPC, errno.EDQUOT}
NO_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}
NO_PLACE |= {errno.ENAMETOOLONG}


def main(argv: Sequence[str] | None = None) -> dict | list[dict]:
    """Runs one experiment and returns its record; with --eval_datasets, one for each of them and their list.

    A mistake of the user ends in one line and exit code 2.
    """
    try:
        settings = run_utils.parse(argv)
        runs = [run_utils.Run(one) for one in run_utils.one_by_one(settings)]
        # Data first, all of them: they are checked faster than weights are loaded, or downloaded.
        tasks = [read_data(run.settings) for run in runs]
        records = [run_once(run, task) for run, task in zip(runs, tasks)]
        return records[0] if settings.eval_datasets is None else records
    except MISTAKES as error:
        sys.exit(fail(str(error)))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except torch.OutOfMemoryError:
        sys.exit(fail("the GPU's memory is too small for this; lower --batch_size or use --precision bf16"))
    except OSError as error:
        if error.errno not in FULL | NO_PLACE:
            raise
        remedy = "free space there" if error.errno in FULL else "choose another folder"
        sys.exit(fail(f"{error.filename or 'disk'}: {error.strerror}; {remedy}"))


def read_data(settings: run_utils.Settings) -> datasets.Task:
    """The task that a run trains or is tested on, with all of its images in place and prompts that CLIP can read."""
    transfers = settings.test_dataset != settings.dataset
    task = datasets.build(
        settings.test_dataset,
        settings.root_path,
        None if transfers or datasets.is_test_only(settings.dataset) else settings.shots,
        settings.seed,
        settings.prompts,
        templates=settings.template,
        order=settings.draw,
        classes=settings.classes,
        split=settings.split,
    )
    datasets.check_images_exist(task)
    for template in task.templates:
        try:
            utils.tokenize_classes(task.class_names, template)
        except ValueError as error:
            raise run_utils.UserError(f"{error}; shorten the class's name or the --template") from None
    return task


def run_once(run: run_utils.Run, task: datasets.Task) -> dict:
    """The record of a run, which is done unless it was before."""
    record = None if run.settings.force else run.finished(task.split_sha256, task.data_sha256)
    if record is not None:
        print(f"already done, not run again (--force does): {run.folder}")
        run_utils.rebuild_table(run.results)
    else:
        with run:
            record = experiment(run.settings, task, run)
    report(record, run)
    return record


def experiment(settings: run_utils.Settings, task: datasets.Task, run: run_utils.Run) -> dict:
    """From settings and data to the recorded result."""
    run_utils.make_reproducible(settings.seed)
    model, preprocess = clip.load(settings.backbone, settings.device)
    base_sha256 = clip.weights_sha256(model)
    adaptation = METHODS[settings.method].prepare(model, task, settings)
    print(
        f"{settings.method} on {task.name} ({len(task.class_names)} classes), shots {settings.shots}, seed "
        f"{settings.seed}, {settings.backbone} on {settings.device}: trains {len(adaptation.parameters)} tensors, "
        f"{adaptation.trainable_weights:,} weights"
    )
    loader = None
    if adaptation.optimizer is not None and not settings.eval_only:  # made first: it finds damaged training images
        augment = train_transform(model.arch.resolution, settings.min_area, settings.flip)
        loader = datasets.training_loader(
            task,
            augment,
            settings.batch_size,
            settings.iterations,
            settings.seed,
            settings.workers,
            settings.image_cache_mb,
            pin_memory=model.device.type == "cuda",
        )
    evaluator = train.Evaluator(model, task, preprocess, settings, base_sha256)
    zero_shot = evaluator.zero_shot()
    print(f"zero-shot accuracy {zero_shot:.2f} % on {len(task.test)} test images")

    fit, checkpoint_bytes = train.Fit(), None
    if settings.eval_only:
        adaptation.load(settings.checkpoint, base_sha256)
        checkpoint_bytes = settings.checkpoint.stat().st_size
        note_other_split(settings, task)
    elif loader is not None:
        fit = train.fit(model, task, adaptation, loader, settings, evaluator)
        if fit.stopped_early:
            print(f"stopped at iteration {fit.iterations}: the training loss fell below {settings.early_stop_loss}")
    start = time.perf_counter()
    accuracy = zero_shot if settings.method == "zero_shot" else evaluator.adapted(adaptation)
    eval_seconds = time.perf_counter() - start
    if settings.checkpoint and not settings.eval_only and adaptation.parameters:
        metadata = {"run_id": settings.run_id, "method": settings.method, "settings": json.dumps(asdict(settings))}
        metadata["split_sha256"] = task.split_sha256
        checkpoint_bytes = adaptation.save(settings.checkpoint, base_sha256, metadata)

    result = {
        "test_accuracy": accuracy,
        "zero_shot_accuracy": zero_shot,
        "train_accuracy": fit.last["train_accuracy"],
        "final_loss": fit.last["loss"],
        "iterations": fit.iterations,
        "stopped_early": fit.stopped_early,
        "train_seconds": fit.seconds,
        "eval_seconds": eval_seconds,
        "peak_memory_mb": run_utils.peak_memory_mb(model.device),
        "trainable_weights": adaptation.trainable_weights,
        "changed_weights": adaptation.changed_weights(),
        "checkpoint_bytes": checkpoint_bytes,
        "template": task.templates[0],
        "split_sha256": task.split_sha256,
        "data_sha256": task.data_sha256,
        "weights_sha256": base_sha256,
    }
    return run.record(result, fit.curve, fit.timing, datasets.to_json(task) if task.train else None)


def note_other_split(settings: run_utils.Settings, task: datasets.Task) -> None:
    """Say on stderr that weights are evaluated on another division of one's own images than they were trained on."""
    if "test" not in task.parts_to_record or settings.classes == "new":
        return
    if run_utils.checkpoint_metadata(settings.checkpoint).get("split_sha256") != task.split_sha256:
        datasets.note(
            f"{settings.checkpoint} was trained on another split of {settings.root_path}: some of its training images "
            "may be tested on here. --split with the split.json of its run leaves them out"
        )


def report(record: dict, run: run_utils.Run) -> None:
    """The last lines that a run prints."""
    accuracies = f"zero-shot {record['zero_shot_accuracy']:.2f} %"
    if record["method"] != "zero_shot":
        accuracies += f"  ->  {record['method']} {record['test_accuracy']:.2f} %"
    print(accuracies)
    if run.settings.checkpoint and run.settings.checkpoint.is_file():
        print(f"weights: {run.settings.checkpoint}")
    print(f"record:  {run.folder / 'result.json'}\nresults: {run.csv}")


def fail(message: str) -> int:
    print(f"error: {datasets.printable(message)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
