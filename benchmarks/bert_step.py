"""Time one training step of BERT with SO: dense weight gradients beside gradients sampled at the support (`attach`).

    python -m benchmarks.bert_step                                            # BERT-base
    python -m benchmarks.bert_step --layers 6 --width 384 --kappa 1e-3        # the size of MiniLM-L6

Weights and tokens are random: their values do not matter for the cost. Both sides are SO as in BERT/main.py, with the
same supports and the same dropout. Their steps alternate in one process.
"""

from argparse import Namespace
from collections.abc import Sequence
from statistics import median

import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.timing import alternately
from BERT import main as bert
from common import Parser, one_line_errors
from optimizers import attach
from run_utils import make_reproducible


class Side:
    """SO on its own copy of the model, with sampled or with dense gradients."""

    def __init__(self, args: Namespace, is_sampled: bool):
        torch.manual_seed(0)
        width = {"hidden_size": args.width, "intermediate_size": 4 * args.width}
        config = BertConfig(**width, num_hidden_layers=args.layers, num_attention_heads=args.heads)
        self.model = BertForSequenceClassification(config).to(args.device)
        self.optimizer = bert.prepare(self.model, bert.Settings(kappa=args.kappa, T_sparse=10))
        if is_sampled:
            attach(self.model, self.optimizer)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(1000, config.vocab_size, (bert.BATCH, args.tokens), generator=generator)
        self.inputs = {"input_ids": ids.to(args.device), "attention_mask": torch.ones_like(ids).to(args.device)}
        self.before = self.weights()
        self.labels = (torch.arange(bert.BATCH) % 2).to(args.device)

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten().double() for p in self.model.parameters()])

    def step(self) -> float:
        """Do one training step and return its loss."""
        torch.manual_seed(2)  # dropout
        loss = F.cross_entropy(self.model(**self.inputs).logits, self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def main(argv: Sequence[str] | None = None) -> None:
    """Time both sides and print medians, last losses and how far the weights differ."""
    parser = Parser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each of the 8 pairs")
    parser.add_argument("--kappa", type=float, default=1e-4)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each side")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    make_reproducible(0)
    sides = {"dense": Side(args, False), "sampled": Side(args, True)}
    seconds, losses = alternately({name: side.step for name, side in sides.items()}, args.steps, args.device)
    for name, times in seconds.items():
        print(f"{name:8} median {median(times):.3f} s   last loss {losses[name][-1]:.6f}")
    trained = sides["dense"].weights() - sides["dense"].before
    difference = sides["sampled"].weights() - sides["dense"].weights()
    print(f"weights differ by {difference.norm() / trained.norm():.1e} of what was trained")
    print(f"ratio of medians {median(seconds['dense']) / median(seconds['sampled']):.2f} x")


if __name__ == "__main__":
    with one_line_errors():
        main()
