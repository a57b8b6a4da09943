"""Few-shot adaptation of CLIP: one run.

python main.py                                                       # SO on the embedded digits
python main.py --shots 4 --method zero_shot                          # the same without training
python main.py --dataset dtd --shots 4 --root_path $DATA             # the released protocol on ViT-B/16
python main.py --shots 4 --search lr=3e-4,1e-3,3e-3                  # lr is chosen on the val images
python main.py --config configs/so_paper.yaml --dataset dtd --shots 4 --root_path $DATA
"""

import os

# Before torch is imported: its threads wait for each other by spinning, and shall give up soon and sleep. Where cores
# are shared with other programs, long spinning makes a small model's run ten times slower (GNU OpenMP, so on Linux).
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import errno
import functools
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch

import clip
import datasets
import run_utils
import train
import utils
from clip.delta import checkpoint_metadata
from common import note, printable
from configs.arguments import ignored
from configs.settings import one_by_one
from methods import MethodError

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
        if unused := ignored(argv, settings.method):
            note(f"the method {settings.method} has no use for {', '.join(unused)}")
        records = [run_once(run, task) for run, task in single_runs(settings)]
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


def single_runs(settings: run_utils.Settings) -> list[tuple[run_utils.Run, datasets.Task]]:
    """One run or, with --eval_datasets, one for each of them, with its data."""
    # Data first, all of them: they are checked faster than weights are loaded, or downloaded.
    tasks = [(single, read_data(single)) for single in one_by_one(settings)]
    return [(run_utils.Run(single.settled(len(task.train))), task) for single, task in tasks]


def read_data(settings: run_utils.Settings) -> datasets.Task:
    """The task that a run trains or is tested on, with all of its images in place and prompts that CLIP can read."""
    trains = settings.method != "zero_shot" and not settings.eval_only
    task = datasets.build(
        settings.test_dataset,
        settings.root_path,
        settings.shots if trains or settings.split else None,  # without training, the test part is all that is read
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
    record = recorded(run, task)
    if record is None:
        with run:
            # Another process may have done it, until this one had the run for itself.
            record = recorded(run, task) or newly_done(run, task)
    report(record, run)
    return record


def recorded(run: run_utils.Run, task: datasets.Task) -> dict | None:
    """The record of a run that was done before, unless it is to be done anew."""
    record = None if run.settings.force else run.finished(task.split_sha256, task.data_sha256)
    if record is not None:
        print(f"already done, not run again (--force does): {run.folder}")
        run_utils.rebuild_table(run.results)
    return record


def newly_done(run: run_utils.Run, task: datasets.Task) -> dict:
    """The record of a run that is done here and now."""
    with run.log() as log:
        try:
            return experiment(run.settings, task, run, log)
        except train.TrainingDiverged:
            run.forget_states()  # it would diverge again
            raise


def experiment(
    settings: run_utils.Settings, task: datasets.Task, run: run_utils.Run, log: Callable[[dict], None]
) -> dict:
    """From settings and data to the recorded result; `log` is given the curve's rows as they come, and the result."""
    run_utils.make_reproducible(settings.seed)
    run_utils.reset_peak_memory(settings.device)
    model, preprocess = clip.load(settings.backbone, settings.device)
    base_sha256 = clip.weights_sha256(model)
    evaluator = train.Evaluator(model, task, preprocess, settings, base_sha256)
    belongs_to = {"split": task.split_sha256, "data": task.data_sha256, "weights": base_sha256, "format": 1}
    states = functools.partial(run.states, belongs_to=belongs_to)
    trials, search_seconds = [], 0.0
    if settings.search:
        evaluator.read_images()  # damaged ones are found now; what is right or wrong is not asked before the choice
        settings, trials, search_seconds = train.search(model, task, preprocess, settings, base_sha256, states)
    own_states = states("training")
    adaptation, loader = train.prepare(model, task, settings, own_states.number)
    on = f"trained on {settings.dataset}, tested on {task.name}" if settings.eval_only else f"on {task.name}"
    does = "evaluates" if settings.eval_only else "trains"
    print(
        f"{settings.method} {on} ({len(task.class_names)} classes), shots {settings.shots}, seed {settings.seed}, "
        f"{settings.backbone} on {settings.device}: {does} {len(adaptation.parameters)} tensors, "
        f"{adaptation.trainable_weights:,} weights"
    )
    zero_shot = evaluator.zero_shot()
    print(f"zero-shot accuracy {zero_shot:.2f} % on {len(task.test)} test images")

    fit, checkpoint_bytes = train.Fit(), None
    if settings.eval_only:
        adaptation.load(settings.checkpoint, base_sha256)
        checkpoint_bytes = settings.checkpoint.stat().st_size
        note_other_split(settings, task)
    else:
        if own_states.number:
            print(f"goes on after iteration {own_states.number}, where this run was stopped")
        fit = train.fit(model, task, adaptation, loader, settings, evaluator, own_states, log)
    if fit.stopped_early:
        print(f"stopped at iteration {fit.iterations}: the training loss fell below {settings.early_stop_loss}")
    start = time.perf_counter()
    accuracy = zero_shot if settings.method == "zero_shot" else evaluator.adapted(adaptation)
    eval_seconds = time.perf_counter() - start
    log({"iteration": fit.iterations, "test_accuracy": accuracy})
    if settings.checkpoint and not settings.eval_only and adaptation.has_weights:
        metadata = {"run_id": run.settings.run_id, "method": settings.method, "test_sha256": task.test_sha256}
        metadata["settings"] = json.dumps(asdict(settings))
        checkpoint_bytes = adaptation.save(settings.checkpoint, base_sha256, metadata)

    result = {
        **settings.hyperparameters,  # after a search, those that it chose
        "test_accuracy": accuracy,
        "zero_shot_accuracy": zero_shot,
        "train_accuracy": fit.last["train_accuracy"],
        "final_loss": fit.last["loss"],
        "iterations": fit.iterations,
        "stopped_early": fit.stopped_early,
        "train_seconds": fit.seconds,
        "eval_seconds": eval_seconds,
        "search_seconds": search_seconds,
        "peak_memory_mb": run_utils.peak_memory_mb(model.device),
        "trainable_weights": adaptation.trainable_weights,
        "changed_weights": adaptation.changed_weights(),
        "optimizer_bytes": adaptation.optimizer_bytes,
        "checkpoint_bytes": checkpoint_bytes,
        "template": " | ".join(task.templates),
        "tuned_on": settings.tuned_on,
        "split_sha256": task.split_sha256,
        "data_sha256": task.data_sha256,
        "weights_sha256": base_sha256,
    }
    return run.record(result, fit.curve, fit.timing, datasets.to_json(task), trials)


def note_other_split(settings: run_utils.Settings, task: datasets.Task) -> None:
    """Say on stderr that one's own images have another test part than when the weights were trained."""
    if "test" not in task.parts_to_record or settings.classes == "new":
        return
    if checkpoint_metadata(settings.checkpoint).get("test_sha256") != task.test_sha256:
        note(
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
    print(f"error: {printable(message)}", file=sys.stderr)
    return 2


def stop(*_) -> None:
    """On SIGTERM, as at a preemption: the way out goes through the run's folder and lock, as for Ctrl-C."""
    print("terminated", file=sys.stderr)
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    main()
