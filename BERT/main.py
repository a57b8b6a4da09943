"""SO beside LoRA on BERT, few-shot GLUE-RTE: one run. In this folder:

python main.py --device cuda --kappa 5e-5 --T_sparse 10 --loss_stop 1e-3     # SO
python main.py --device cuda --rank 8 --loss_stop 1e-3                       # LoRA
python main.py --kappa 5e-5 --model $MODELS/bert --data_dir $DATA/RTE        # offline: weights and data in folders
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # at its end: the local `datasets` must not hide Hugging Face's
    sys.path.append(str(ROOT))

import BERT  # noqa: F401  sets the environment before torch is imported

# isort: split
import argparse
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from BERT import rte
from BERT.rte import UserError
from optimizers import SO, attach

# As published, with SO and LoRA alike.
LR, MINIMUM_LR, SCHEDULE_STEPS = 2e-5, 1e-6, 10_000  # cosine schedule
BETAS = (0.9, 0.999)
BATCH, EVAL_BATCH = 8, 32
LORA_ALPHA = 1
# The linear layers of the encoder's blocks: 6 a block.
LORA_TARGETS = (
    r".*\bencoder\.layer\.\d+\.(attention\.self\.(query|key|value)|(attention\.output|intermediate|output)\.dense)"
)


class TrainingDiverged(Exception):
    """The loss is no finite number any more."""


@dataclass(frozen=True)
class Settings:
    """All that determines a run; UserError for values out of range or at odds. The names are those of the flags."""

    kappa: float | None = None
    T_sparse: int | None = None  # None: 5 with SO
    rank: int | None = None
    dense: str = "all"
    model: str = "bert-base-uncased"
    data_dir: str | None = None
    protocol: str = "balanced"
    shots: int = 16
    seed: int = 42
    lr: float = LR
    loss_stop: float = 1e-3
    max_steps: int = SCHEDULE_STEPS
    device: str = "auto"

    def __post_init__(self):
        if (self.kappa is None) == (self.rank is None):
            raise UserError("give one of --kappa (SO) and --rank (LoRA)" + ("" if self.rank is None else ", not both"))
        if self.kappa is not None and not 0 <= self.kappa <= 1:
            raise UserError(f"--kappa must be in [0, 1], not {self.kappa}")
        if self.kappa == 0 and self.dense == "none":
            raise UserError("--kappa 0 --dense none trains nothing; leave one of them out")
        if self.rank is not None and self.T_sparse is not None:
            raise UserError("--T_sparse belongs to SO; leave it out with --rank")
        if self.T_sparse is None and self.kappa is not None:
            object.__setattr__(self, "T_sparse", 5)
        at_least = {"rank": 1, "T_sparse": 1, "shots": 1, "seed": 0, "loss_stop": 0, "max_steps": 1}
        for name, minimum in at_least.items():
            value = getattr(self, name)
            if value is not None and not minimum <= value < math.inf:
                raise UserError(f"--{name} must be at least {minimum}, not {value}")
        if not 0 < self.lr < math.inf:
            raise UserError(f"--lr must be positive, not {self.lr}")
        if self.max_steps > SCHEDULE_STEPS:
            raise UserError(f"--max_steps must be at most {SCHEDULE_STEPS}, where the learning rate's schedule ends")
        if self.seed >= 2**63:
            raise UserError(f"--seed must be below 2**63, not {self.seed}")

    @property
    def method(self) -> str:
        return "SO" if self.rank is None else "LoRA"


@dataclass(frozen=True)
class Result:
    """What a run found. `reached`: whether a mini-batch loss came down to `loss_stop`; `loss` is the last one."""

    steps: int
    reached: bool
    loss: float
    val_acc: float  # per cent of the validation pairs
    seconds: float  # of the training


def main(argv: Sequence[str] | None = None) -> Result:
    """One run from the command line. A mistake of the user ends in one line and exit code 2."""
    with mistakes_in_one_line():
        settings = Settings(**vars(parser().parse_args(argv)))
        result = run(settings)
        name, pairs = display_name(settings.model), 2 * settings.shots
        print(f"{settings.method} - {name} RTE-{pairs}shot: {result.val_acc:.1f}%")
        return result


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """For entry points: the user's mistakes end in one line and exit code 2, an interruption in exit code 130."""
    try:
        yield
    except (UserError, TrainingDiverged) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


class Parser(argparse.ArgumentParser):
    """Reports mistakes as UserError, so that all of them reach the user in one way."""

    def error(self, message: str):
        raise UserError(f"{message}; see --help")


def parser() -> Parser:
    """The command line of one run; what is left out takes the defaults of Settings."""
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--kappa", type=float, help="SO: density of gradient and moments, e.g. 5e-5; 0: dense group alone"
    )
    parser.add_argument("--T_sparse", type=int, help="SO: steps between two draws of the support [5]")
    parser.add_argument("--rank", type=int, help="LoRA: rank, e.g. 8")
    parser.add_argument("--seed", type=int, help="of draw, order, new weights, dropout, supports [42]")
    add_common_flags(parser)
    return parser


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that a run shares with the grids."""
    default = Settings.__dataclass_fields__
    parser.add_argument(
        "--dense",
        choices=("all", "none"),
        help="one-dimensional tensors, pooler and classifier: all are trained by plain Adam, as published; or none, "
        "then SO takes them sparsely like the rest and LoRA leaves them frozen [all]",
    )
    parser.add_argument("--model", help=f"name on the Hub, or a folder [{default['model'].default}]")
    parser.add_argument("--data_dir", help="folder with GLUE's train.tsv and dev.tsv of RTE; without it, the Hub")
    parser.add_argument(
        "--protocol",
        choices=rte.PROTOCOLS,
        help="balanced: as many training pairs of each label; released: the published script's rows, no segment ids "
        "[balanced]",
    )
    parser.add_argument("--shots", type=int, help="training pairs per label, half of all with --protocol released [16]")
    parser.add_argument("--lr", type=float, help="initial learning rate; cosine over 10,000 steps to 1e-6 [2e-5]")
    parser.add_argument("--loss_stop", type=float, help="stop when a mini-batch loss is at or below this [1e-3]")
    parser.add_argument("--max_steps", type=int, help=f"end in any case [{SCHEDULE_STEPS}, the schedule's length]")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; auto takes a GPU if there is one [auto]")


def display_name(model: str) -> str:
    """The name that results carry: BERT-base and BERT-large for the originals, else the folder's or Hub's name."""
    folder = Path(model).expanduser()
    name = os.path.basename(os.path.abspath(folder)) if folder.is_dir() else model.removeprefix("google-bert/")
    return {"bert-base-uncased": "BERT-base", "bert-large-uncased": "BERT-large"}.get(name, name)


def run(settings: Settings) -> Result:
    """Trains and evaluates as `settings` say. UserError for mistakes, TrainingDiverged for a loss that is none."""
    device = choose_device(settings.device)
    data = rte.load(settings.data_dir)
    rows = rte.draw(data.train, settings.shots, settings.seed, settings.protocol)
    make_reproducible(settings.seed)
    model, tokenizer = load_model(settings.model)
    max_tokens = min(rte.MAX_TOKENS, model.config.max_position_embeddings)
    encoding = (tokenizer, settings.protocol == "balanced", device, max_tokens)
    training = rte.Encoded([data.train[row] for row in rows], *encoding)
    validation = rte.Encoded(data.validation, *encoding)
    model.to(device)
    optimizer = prepare(model, settings)
    if settings.method == "SO":
        attach(model, optimizer)  # the same numbers, without dense gradients of the linear layers
    counts = {True: 0, False: 0}
    for group in optimizer.param_groups:
        counts[group.get("dense", True)] += sum(p.numel() for p in group["params"])
    of_which = f", {counts[False]:,} of them at density {settings.kappa:g}" if counts[False] else ""
    print(
        f"{settings.method} on {display_name(settings.model)}, {len(rows)} training pairs, seed {settings.seed}, "
        f"{device}: trains {sum(counts.values()):,} weights{of_which}"
    )
    start = time.perf_counter()
    steps, loss = train(model, optimizer, training, settings)
    seconds = time.perf_counter() - start
    reached = loss <= settings.loss_stop
    if reached:
        print(f"stopped at step {steps}: mini-batch loss {loss:.2e}, --loss_stop {settings.loss_stop:g}")
    else:
        print(
            f"never at --loss_stop {settings.loss_stop:g}: ended by --max_steps {steps} at mini-batch loss {loss:.2e}"
        )
    return Result(steps, reached, loss, accuracy(model, validation), seconds)


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is unknown; use cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported; use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return device


def make_reproducible(seed: int) -> None:
    """Seeds what has no generator of its own (new weights, dropout); deterministic kernels, float32 without TF32."""
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def load_model(name: str) -> tuple[nn.Module, object]:
    """BERT with a classifier of two labels in float32, and its tokenizer, from a folder or from the Hub.

    The classifier, and a pooler where the weights have none, start at random. UserError if anything else is missing.
    """
    transformers = rte.extra("transformers")
    folder = Path(name).expanduser()
    if folder.is_dir():
        transformers.utils.logging.disable_progress_bar()
        if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.txt")):
            raise UserError(f"--model: {folder} has no tokenizer.json or vocab.txt; copy the model's tokenizer there")
    elif folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"--model: there is no folder {name}")
    source = str(folder) if folder.is_dir() else name
    try:
        kind = transformers.AutoConfig.from_pretrained(source).model_type
        if kind != "bert":
            raise UserError(f"--model {name} is a {kind} model; this comparison takes BERT")
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        model, report = transformers.BertForSequenceClassification.from_pretrained(
            source, num_labels=len(rte.LABELS), output_loading_info=True
        )
    except UserError:
        raise
    except Exception as error:  # of several libraries' file, format and network layers, without a common class
        reason = next(iter(str(error).splitlines()), "")
        remedy = "check its files" if folder.is_dir() else "check the name and the network, or name a folder"
        raise UserError(f"--model {name} cannot be loaded ({reason}); {remedy}") from error
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(("classifier.", "bert.pooler.")))
    if missing:
        raise UserError(f"--model {name}: the weights lack {len(missing)} tensors of BERT, such as {missing[0]}")
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(f"--model {name}: its tokenizer has {len(tokenizer)} tokens, BERT {model.config.vocab_size}")
    return model.float(), tokenizer


def dense_group(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained densely beside SO and LoRA: one-dimensional ones, pooler and classifier."""
    return [
        p for name, p in model.named_parameters() if p.dim() == 1 or name.startswith(("bert.pooler.", "classifier."))
    ]


def prepare(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Marks in `model` what is trained, and returns its optimizer. LoRA adds its matrices to the model."""
    dense = dense_group(model) if settings.dense == "all" else []
    if settings.method == "SO":
        is_dense = set(dense)
        sparse = [p for p in model.parameters() if p not in is_dense] if settings.kappa > 0 else []
    else:
        peft = rte.extra("peft")
        config = peft.LoraConfig(r=settings.rank, lora_alpha=LORA_ALPHA, lora_dropout=0.0, target_modules=LORA_TARGETS)
        peft.inject_adapter_in_model(config, model)
        lora = [p for name, p in model.named_parameters() if ".lora_" in name]
    trained = sparse if settings.method == "SO" else lora
    model.requires_grad_(False)
    for p in (*trained, *dense):
        p.requires_grad_(True)
    if settings.method == "LoRA":
        return torch.optim.Adam([*lora, *dense], lr=settings.lr, betas=BETAS)
    groups = [{"params": sparse, "density_ratio": settings.kappa}] if sparse else []
    groups += [{"params": dense, "dense": True}] if dense else []
    return SO(groups, lr=settings.lr, betas=BETAS, T=settings.T_sparse, seed=settings.seed)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, training: rte.Encoded, settings: Settings
) -> tuple[int, float]:
    """Until a mini-batch loss is at or below `loss_stop`, or for `max_steps`; returns steps and last loss."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, SCHEDULE_STEPS, eta_min=min(MINIMUM_LR, settings.lr)
    )
    model.train()
    interval = 0.1 if sys.stderr.isatty() else 30
    bar = tqdm(total=settings.max_steps, desc="training", unit="step", mininterval=interval, maxinterval=2 * interval)
    with bar:
        for step, rows in enumerate(batches(len(training.labels), settings.seed), start=1):
            inputs, labels = training.batch(rows)
            mini_batch_loss = F.cross_entropy(model(**inputs).logits, labels)
            optimizer.zero_grad()
            mini_batch_loss.backward()
            optimizer.step()
            schedule.step()
            loss = mini_batch_loss.item()
            bar.update()
            bar.set_postfix(loss=f"{loss:.2e}", refresh=False)
            if not math.isfinite(loss):
                raise TrainingDiverged(f"the training loss is {loss} at step {step}; check the weights of --model")
            if loss <= settings.loss_stop or step == settings.max_steps:
                return step, loss


def batches(count: int, seed: int) -> Iterator[Tensor]:
    """Rows [at most 8] of one mini-batch after the other, without end; each pass has an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).split(BATCH)


@torch.no_grad()
def accuracy(model: nn.Module, data: rte.Encoded) -> float:
    """Per cent of the pairs whose larger logit is their label's."""
    model.eval()
    correct = 0
    for rows in data.lengths.argsort(stable=True).split(EVAL_BATCH):  # pairs of like length: little padding
        inputs, labels = data.batch(rows)
        correct += int((model(**inputs).logits.argmax(dim=-1) == labels).sum())
    return 100 * correct / len(data.labels)


if __name__ == "__main__":
    main()
