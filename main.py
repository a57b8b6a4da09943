"""Few-shot adaptation of CLIP: one run.

python main.py                                                       # SO on the embedded digits
python main.py --shots 4 --method zero_shot                          # the same without training
python main.py --dataset dtd --shots 4 --root_path $DATA             # the released protocol on ViT-B/16
python main.py --shots 4 --search lr=3e-4,1e-3,3e-3                  # lr is chosen on the val images
python main.py --config configs/so_paper.yaml --dataset dtd --shots 4 --root_path $DATA
python main.py --method lora --help                                  # LoRA's flags
"""

import os

# Before torch is imported: its threads wait for each other by spinning, and should soon give up and sleep. Where cores
# are shared with other programs, long spinning makes a small model's run ten times slower (GNU OpenMP, so on Linux).
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import contextlib
import copy
import dataclasses
import io
import signal
import sys
import time
from collections.abc import Sequence

import torch

import clip
import datasets
import distributed
import launching
import run_utils
import train
import utils
from arguments import Config, parse
from clip.delta import checkpoint_metadata
from common import UserError, counted, note, one_line_errors
from datasets import Task
from experiment import Experiment
from methods.adaptation import Adaptation
from predictions import Predictions
from records import rebuild_table
from run_utils import Run
from settings import ALL, MAX_SHOTS


def main(argv: Sequence[str] | None = None) -> dict | list[dict]:
    """Do one run and return its record; with --eval_datasets one for each of them, and return their list.

    A mistake of the user ends in one line and exit code 2.
    """
    argv = sys.argv[1:] if argv is None else argv
    with one_line_errors(), distributed.joined():
        try:
            with distributed.said_by_launcher():
                config = parse(argv)
            if config.settings.processes > 1 and not distributed.is_member():
                records = in_processes(config, argv)
            else:
                records = [do(run) for run in planned(config)]
            return records if config.settings.eval_datasets else records[0]
        except RuntimeError as error:
            if not is_lack_of_memory(error):
                raise
            raise UserError(f"the memory is too small; {remedies(config)}") from None


def is_lack_of_memory(error: RuntimeError) -> bool:
    """Return whether an error of torch says that the GPU's or the main memory is full, which libraries say in their
    own words."""
    words = ("ALLOC_FAILED", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def remedies(config: Config) -> str:
    """Return what helps where the memory is too small, what changes no result first."""
    settings, several = config.settings, torch.cuda.device_count() > config.settings.processes
    found = [] if settings.checkpoint_blocks else ["--checkpoint_blocks changes no result"]
    found += [f"--processes {torch.cuda.device_count()} shares it between GPUs"] if several else []
    found += ["--precision bf16 changes last digits"] if settings.precision == "fp32" else []
    found += ["a smaller --batch_size is another setting of the method"]
    trains_both = getattr(config.hparams, "encoder", None) == "both"
    return ", ".join(found + ["--encoder text or vision trains one tower alone"] * trains_both)


def in_processes(config: Config, argv: Sequence[str]) -> list[dict]:
    """Do the runs in several processes, and return their records. Exit as these do if they fail."""
    code = launching.launch(config.settings.processes, [sys.executable, __file__, *map(str, argv)])
    if code:
        sys.exit(code)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # said before
        return [run.finished() for run in planned(config)]


def planned(config: Config) -> list[Run]:
    """Return the runs that are asked for, each with its data."""
    # All data first: they are checked faster than weights are loaded, or downloaded.
    read = [(single, read_data(single)) for single in config.one_by_one()]
    return [Run(single.for_images(task), task) for single, task in read]


def read_data(config: Config) -> Task:
    """Return the task of a run, with all of its images in place and prompts that CLIP can read."""
    settings = config.settings
    every = settings.draw == ALL and not settings.eval_only
    shots = MAX_SHOTS if every else settings.shots
    task = datasets.build(
        settings.test_dataset,
        settings.root_path,
        shots if config.trains or settings.split or every else None,  # without training only the test part is read
        settings.seed,
        settings.prompts,
        templates=settings.template,
        order=settings.draw,
        classes=settings.classes,
        split=settings.split,
        test_part=settings.test_part,
        reading=datasets.Reading(settings.max_megapixels, settings.white_level),
        own=settings.own_images,
        support=settings.support if config.trains else datasets.Support(),
    )
    datasets.check_images_exist(task)
    if settings.temperature_scaling and config.trains and not task.val:
        raise UserError(f"{task.name} has no val images to fit a temperature on; leave --temperature_scaling out")
    tokenize = clip.tokenizer_of(settings.backbone, settings.arch)
    for template in task.templates:
        try:
            utils.tokenize_classes(tokenize, task.class_names, template)
        except ValueError as error:
            raise UserError(f"{error}; shorten the class name or the --template") from None
    return task


def do(run: Run) -> dict:
    """Return the record of a run. It is done now unless it was done before."""
    record = distributed.from_first(lambda: recorded(run))
    if record is None:
        with distributed.held_by_first(run.claimed):
            record = distributed.from_first(lambda: recorded(run))  # another program may have done it meanwhile
            if record is None:
                run.note_replaced()
                record = do_now(run)
    print(f"zero-shot {record['zero_shot_accuracy']:.2f} %", end="")
    print(f"  ->  {record['method']} {record['test_accuracy']:.2f} %" if record["method"] != "zero_shot" else "")
    note_if_below_majority(record)
    if run.weights and run.weights.is_file():
        print(f"weights: {run.weights}")
    print(f"record:  {run.folder.path / 'result.json'}\nresults: {run.folder.table}")
    return record


def note_if_below_majority(record: dict) -> None:
    """Say on stderr that always naming the largest test class would be right more often."""
    share = record.get("largest_class_share", 0)  # older records have none
    if record["test_accuracy"] < share:
        note(
            f"{record['test_accuracy']:.2f} % lies below {share:.2f} %, the share of the largest test class: always "
            "naming that class would be right more often"
        )


def recorded(run: Run) -> dict | None:
    """Return the record of a run that was done before, unless --force asks for it again."""
    record = None if run.settings.force else run.finished()
    if record is not None:
        print(f"already done, not run again (--force does): {run.folder.path}")
        rebuild_table(run.folder.results)
    return record


def do_now(run: Run) -> dict:
    """Load the model and train, evaluate saved weights, or measure zero-shot accuracy. Return the run's record."""
    run_utils.make_reproducible(run.settings.seed)
    run_utils.use_device(run.settings.device)
    run_utils.note_slow_precision(run.settings.precision, run.settings.device)
    experiment = Experiment.load(run.settings, run.hparams, run.task)
    print(f"{run.settings.backbone}: {clip.describe(experiment.model)}")
    if run.config.trains:
        return train_and_test(run, experiment)
    return evaluate_saved(run, experiment) if run.settings.eval_only else test_zero_shot(run, experiment)


def train_and_test(run: Run, experiment: Experiment) -> dict:
    """Choose hyperparameters if that is asked for, train, test, save, and return the run's record."""

    def checkpoints(name: str) -> run_utils.Checkpoints:
        return distributed.from_first(lambda: run.checkpoints(name, experiment.base_sha256))

    trials, search_seconds = [], 0.0
    if run.config.search:
        experiment.test_features()  # damaged test images are found now; their labels are not asked before the choice
        hparams, trials, search_seconds = train.search(
            experiment, run.config.candidates(), run.config.search, checkpoints
        )
        experiment = dataclasses.replace(experiment, hparams=hparams)
    untouched = dataclasses.replace(experiment, model=copy.deepcopy(experiment.model))
    own = checkpoints("training")
    adaptation, batches = train.prepare(experiment, own.number)
    zero_shot = introduce(run, untouched, adaptation, f"on {run.task.name}", "trains")
    del untouched
    if own.number:
        print(f"resumes after iteration {own.number}, where this run was stopped")
    with run.log() as log:
        fit = train.fit(experiment, adaptation, batches, own, log)
        if fit.stopped_early:
            limit = experiment.hparams.early_stop_loss
            print(f"stopped at iteration {fit.iterations}: the training loss fell below {limit}")
        start = time.perf_counter()
        temperature = train.fit_temperature(experiment, adaptation) if run.settings.temperature_scaling else None
        adapted = train.predict(experiment, adaptation, temperature)
        seconds = {"eval_seconds": time.perf_counter() - start, "search_seconds": search_seconds}
        log({"iteration": fit.iterations, "test_accuracy": adapted.accuracy})
    if run.weights:
        about = run.metadata(experiment.hparams, adapted, temperature)
        distributed.from_first(lambda: adaptation.saved.save(run.weights, experiment.base_sha256, about))
    result = seconds | {"temperature": temperature}
    return run.record(experiment, adapted, zero_shot, result, adaptation, fit, trials)


def evaluate_saved(run: Run, experiment: Experiment) -> dict:
    """Test weights that were saved before, and return the run's record."""
    untouched = dataclasses.replace(experiment, model=copy.deepcopy(experiment.model))
    adaptation = train.adapt(experiment)
    on = f"trained on {run.settings.dataset}, tested on {run.task.name}"
    zero_shot = introduce(run, untouched, adaptation, on, "evaluates")
    adaptation.saved.load(run.weights, experiment.base_sha256)
    note_other_split(run)
    start = time.perf_counter()
    temperature = run.saved_temperature if run.settings.temperature_scaling else None
    adapted = train.predict(experiment, adaptation, temperature)
    result = {"eval_seconds": time.perf_counter() - start, "temperature": temperature}
    with run.log() as log:
        log({"iteration": 0, "test_accuracy": adapted.accuracy})
    return run.record(experiment, adapted, zero_shot, result | run.base_to_new(adapted.accuracy), adaptation)


def test_zero_shot(run: Run, experiment: Experiment) -> dict:
    """Test the model as it is, and return the run's record."""
    zero_shot = introduce(run, experiment, None, f"on {run.task.name}", "trains")
    with run.log() as log:
        log({"iteration": 0, "test_accuracy": zero_shot.accuracy})
    return run.record(experiment, zero_shot, zero_shot, {"eval_seconds": 0.0})


def introduce(run: Run, untouched: Experiment, adaptation: Adaptation | None, on: str, does: str) -> Predictions:
    """Print what the run is about and the zero-shot accuracy, and return the zero-shot predictions.

    `untouched` has the model as it was before the method prepared it.
    """
    settings, classes = run.settings, len(run.task.class_names)
    tensors, weights = (len(adaptation.parameters), adaptation.trainable_weights) if adaptation else (0, 0)
    print(
        f"{settings.method} {on} ({counted(classes, 'class')}), shots {settings.shots}, seed {settings.seed}, "
        f"{settings.backbone} on {settings.device}: {does} {counted(tensors, 'tensor')}, {counted(weights, 'weight')}"
    )
    zero_shot = train.zero_shot(untouched)
    images = counted(len(run.task.test), f"{settings.test_part} image")
    print(f"zero-shot accuracy {zero_shot.accuracy:.2f} % on {images}")
    return zero_shot


def note_other_split(run: Run) -> None:
    """Say on stderr that the user's images have another test part than when the weights were trained."""
    if "test" not in run.task.parts_to_record or run.settings.classes == "new" or run.settings.test_part != "test":
        return
    if checkpoint_metadata(run.weights).get("test_sha256") != run.task.test_sha256:
        note(
            f"{run.weights} was trained on another split of {run.settings.root_path}: some of its training images may "
            "be tested on here. --split with the split.json of its run leaves them out"
        )


def stop(*_: object) -> None:
    """On SIGTERM, as at a preemption: leave through the run's folder and lock, as with Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it may be sent twice, by slurm and by the launcher
    print("terminated", file=sys.stderr)
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    with distributed.leaving_at_once():
        main()
