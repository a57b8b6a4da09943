"""Fine-tune BERT with SO or LoRA on few-shot GLUE-RTE: one run. In this folder:

python main.py --kappa 5e-5 --T_sparse 10 --loss_stop 1e-3               # SO
python main.py --rank 8 --loss_stop 1e-3                                 # LoRA
python main.py --kappa 5e-5 --model $MODELS/bert --data_dir $DATA/RTE    # offline: weights and data in folders
"""

import os
import sys
from pathlib import Path

# In front: `import datasets` must find this project's package, not Hugging Face's.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import BERT  # noqa: F401  sets the environment before torch is imported

# isort: split
import argparse
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from BERT import rte
from common import Parser, UserError, counted, one_line_errors, progress
from optimizers import SO, attach
from run_utils import make_reproducible
from settings import Options, choose_device, option
from train import TrainingDiverged

# As published, with SO and LoRA alike.
LR, MINIMUM_LR, SCHEDULE_STEPS = 2e-5, 1e-6, 10_000  # cosine schedule
BETAS = (0.9, 0.999)
BATCH, EVAL_BATCH = 8, 32
LORA_ALPHA = 1
# The linear layers of the encoder's blocks: 6 a block.
LORA_TARGETS = (
    r".*\bencoder\.layer\.\d+\.(attention\.self\.(query|key|value)|(attention\.output|intermediate|output)\.dense)"
)
DENSE = (
    "all, as published: plain Adam trains biases, LayerNorms, pooler and classifier; none: SO trains them sparsely "
    "like the matrices, LoRA leaves them frozen"
)
PROTOCOL = (
    "balanced: equally many training pairs of each label; released: the published script's rows, without segment ids"
)


@dataclass(frozen=True)
class Settings(Options):
    """All settings of a run; each is a flag. Raise UserError for values out of range or in conflict."""

    kappa: float | None = option(
        None, "SO: density, for example 5e-5; 0 trains only the dense group", kind=float, at_least=0, at_most=1
    )
    T_sparse: int | None = option(None, "SO: steps between random draws of entries; one run: 5", kind=int, at_least=1)
    rank: int | None = option(None, "LoRA: rank, for example 8", kind=int, at_least=1)
    dense: str = option("all", DENSE, choices=("all", "none"))
    model: str = option("bert-base-uncased", "a name on the Hub, or a folder")
    data_dir: str | None = option(None, "folder with RTE's train.tsv and dev.tsv; default: from the Hub", kind=str)
    protocol: str = option("balanced", PROTOCOL, choices=rte.PROTOCOLS)
    shots: int = option(16, "training pairs per label; with --protocol released half of all", at_least=1)
    seed: int = option(42, "of draw, order, new weights, dropout and supports", at_least=0, below=2**63)
    lr: float = option(LR, "initial learning rate; cosine over 10,000 steps to 1e-6", above=0)
    loss_stop: float = option(1e-3, "stop when a mini-batch loss is at or below this", at_least=0)
    max_steps: int = option(
        SCHEDULE_STEPS, "most training steps; the schedule has no more", at_least=1, at_most=SCHEDULE_STEPS
    )
    device: str = option("auto", "cpu, cuda or cuda:N; auto takes a GPU if there is one")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.kappa is None) == (self.rank is None):
            raise UserError("give one of --kappa (SO) and --rank (LoRA)" + ("" if self.rank is None else ", not both"))
        if self.kappa == 0 and self.dense == "none":
            raise UserError("--kappa 0 --dense none trains nothing; leave one of them out")
        if self.rank is not None and self.T_sparse is not None:
            raise UserError("--T_sparse belongs to SO; leave it out with --rank")
        if self.T_sparse is None and self.kappa is not None:
            object.__setattr__(self, "T_sparse", 5)

    @property
    def method(self) -> str:
        return "SO" if self.rank is None else "LoRA"


@dataclass(frozen=True)
class Result:
    """The outcome of a run."""

    steps: int
    reached: bool  # a mini-batch loss came down to `loss_stop`
    loss: float  # of the last mini-batch
    val_acc: float  # per cent of the validation pairs
    seconds: float  # of the training


def main(argv: Sequence[str] | None = None) -> Result:
    """Do one run from the command line and return its result."""
    with one_line_errors():
        settings = Settings(**vars(parser(__doc__).parse_args(argv)))
        result = run(settings)
        name, pairs = display_name(settings.model), 2 * settings.shots
        print(f"{settings.method} - {name} RTE-{pairs}shot: {result.val_acc:.1f}%")
        return result


def parser(description: str, lists: Mapping[str, list] | None = None) -> Parser:
    """Return the command line of a run, or of a grid: it has `lists`, flags that take several values, by name with
    their defaults, and no other flags of a method."""
    parser = Parser(description=description, argument_default=argparse.SUPPRESS)
    for field in fields(Settings):
        about, default = field.metadata, field.default
        options = {"type": about["kind"], "choices": about["choices"]}
        if lists and field.name in lists:
            default = " ".join(map(str, lists[field.name]))
            options |= {"nargs": "+", "default": lists[field.name]}
        elif lists and field.name in ("kappa", "T_sparse", "rank"):
            continue
        parser.add_argument(f"--{field.name}", help=about["help"] + (f" [{default}]" if default else ""), **options)
    return parser


def display_name(model: str) -> str:
    """Return the model's name in results: BERT-base, BERT-large, or the name of the folder or on the Hub."""
    folder = Path(model).expanduser()
    name = os.path.basename(os.path.abspath(folder)) if folder.is_dir() else model.removeprefix("google-bert/")
    return {"bert-base-uncased": "BERT-base", "bert-large-uncased": "BERT-large"}.get(name, name)


def run(settings: Settings) -> Result:
    """Train and evaluate. Raise UserError for mistakes and TrainingDiverged for a loss that is not finite."""
    device = choose_device(settings.device)
    data = rte.load(settings.data_dir)
    rows = rte.draw(data.train, settings.shots, settings.seed, settings.protocol)
    make_reproducible(settings.seed)
    print(f"loading {settings.model}", flush=True)
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
        print(f"stopped after --max_steps {steps}; loss {loss:.3g} is still above --loss_stop {settings.loss_stop:g}")
    return Result(steps, reached, loss, accuracy(model, validation), seconds)


def load_model(name: str) -> tuple[nn.Module, object]:
    """Return BERT with a classifier of two labels, in float32, and its tokenizer, from a folder or from the Hub.

    The classifier starts at random, and so does the pooler if the weights have none. Raise UserError if any other
    tensor is missing.
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
    except Exception as error:  # file, format and network errors of several libraries have no common class
        remedy = "check its files" if folder.is_dir() else "check the name and the network, or name a folder"
        raise UserError(f"--model {name} cannot be loaded ({rte.first_line(error)}); {remedy}") from error
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(("classifier.", "bert.pooler.")))
    if missing:
        raise UserError(
            f"--model {name}: the weights lack {counted(len(missing), 'tensor')} of BERT, such as {missing[0]}"
        )
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(f"--model {name}: its tokenizer has {len(tokenizer)} tokens, BERT {model.config.vocab_size}")
    return model.float(), tokenizer


def prepare(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Set which parameters of `model` are trained and return their optimizer. LoRA adds its matrices to the model."""
    dense = []  # what plain Adam trains with both methods: one-dimensional parameters, pooler and classifier
    if settings.dense == "all":
        of_head = ("bert.pooler.", "classifier.")
        dense = [p for name, p in model.named_parameters() if p.dim() == 1 or name.startswith(of_head)]
    if settings.method == "LoRA":
        peft = rte.extra("peft")
        config = peft.LoraConfig(r=settings.rank, lora_alpha=LORA_ALPHA, lora_dropout=0.0, target_modules=LORA_TARGETS)
        peft.inject_adapter_in_model(config, model)
        own = [p for name, p in model.named_parameters() if ".lora_" in name]
    else:
        is_dense = set(dense)
        own = [p for p in model.parameters() if p not in is_dense] if settings.kappa > 0 else []
    model.requires_grad_(False)
    for p in (*own, *dense):
        p.requires_grad_(True)
    if settings.method == "LoRA":
        return torch.optim.Adam([*own, *dense], lr=settings.lr, betas=BETAS)
    groups = [{"params": own, "density_ratio": settings.kappa}] if own else []
    groups += [{"params": dense, "dense": True}] if dense else []
    return SO(groups, lr=settings.lr, betas=BETAS, T=settings.T_sparse, seed=settings.seed)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, training: rte.Encoded, settings: Settings
) -> tuple[int, float]:
    """Train until a mini-batch loss is at or below `loss_stop` or for `max_steps`. Return steps and last loss."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, SCHEDULE_STEPS, eta_min=min(MINIMUM_LR, settings.lr)
    )
    model.train()
    with progress(None, "training", "step", total=settings.max_steps, leave=True) as bar:
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
    """Yield the rows [at most 8] of one mini-batch after another, without end. Each pass is shuffled again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).split(BATCH)


@torch.no_grad()
def accuracy(model: nn.Module, data: rte.Encoded) -> float:
    """Return the percentage of pairs whose larger logit is that of their label."""
    model.eval()
    correct = 0
    for rows in data.lengths.argsort(stable=True).split(EVAL_BATCH):  # similar lengths: little padding
        inputs, labels = data.batch(rows)
        correct += int((model(**inputs).logits.argmax(dim=-1) == labels).sum())
    return 100 * correct / len(data.labels)


if __name__ == "__main__":
    main()
