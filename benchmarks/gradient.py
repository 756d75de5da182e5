"""Gradient SAEs: what the gradient's vote buys, how much of it is the label, and what the features do when steered.

    python benchmarks/gradient.py --work DIR [--results FILE]          (DIR as of quality.py, whose stores it shares)
    python benchmarks/gradient.py --table

Trains g-SAEs with several beta on the embedded model (beta = 0 is TopK, bit for bit) with 3 seeds, and splices them
into held-out text. The choice of features by gradient is made in four ways:

    magnitude       no gradient: what the SAE does at inference
    labels          the gradient of the loss on the true next tokens, which the model is then scored on: a leak
    sampled         the gradient of the loss on next tokens drawn from the model itself: no label is seen
    other tokens    gradients of other tokens, shuffled: a control, no information at all

Steering: features that fire on the held-out text are drawn at random; at the last position of held-out contexts their
unit decoder row, at a set share of the activations' spread, is added, and the change of the next-token distribution is
measured. Controls: random directions, and differences of activations of random tokens.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from jsonl import add_table_options, append_row, markdown, mean_spread, printed, read_rows
from quality_measure import ROWS_PER_BATCH, HeldOut, measure
from quality_plan import BATCH, SEEDS
from quality_subjects import SUBJECTS, Opened, open_subject

from saelab.analysis.reconstruction import Reconstruction
from saelab.core.batch import Batch
from saelab.core.config import parse_config
from saelab.core.progress import set_progress
from saelab.sae import load_sae
from saelab.sae.gradient import GradientSAE
from saelab.training import FitConfig, fit

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gradient.jsonl"
KS, BETAS = (8, 32), (0.0, 1.0, 3.0, 10.0)
CE_ROWS = 64
CONTEXT, CONTEXTS, FEATURES, STRENGTH = 64, 32, 256, 0.5
CHOICES = ("magnitude", "labels", "sampled", "other tokens")


class Bench:
    """The embedded model, held-out activations, and gradients of drawn labels."""

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        self.heldout = HeldOut(opened.model, opened.heldout, opened.heldout_rows, opened.subject.site, CE_ROWS)
        self.x = self.heldout.x[self.heldout.in_ce]
        assert self.heldout.gradient is not None
        true = self.heldout.gradient[self.heldout.in_ce]
        mixed = true[torch.randperm(len(true), generator=torch.Generator().manual_seed(0))]
        self.gradients = {"labels": true, "sampled": self.sampled(), "other tokens": mixed}
        self.spread = float((self.x - self.x.mean(0)).square().sum(1).mean().sqrt())
        g = torch.Generator().manual_seed(0)
        self.contexts = self.heldout.tokens[torch.randperm(self.heldout.ce_rows, generator=g)[:CONTEXTS], :CONTEXT]
        with torch.no_grad():
            self.clean = self.opened.model.logits(self.contexts)[:, -1].float()

    def sampled(self) -> Float[Tensor, "n d"]:
        """Return the gradient of the summed loss on next tokens that the model itself draws."""
        heldout, model = self.heldout, self.opened.model
        generator = torch.Generator().manual_seed(0)
        out = torch.zeros_like(self.x)
        row, position = heldout.row[heldout.in_ce], heldout.position[heldout.in_ce]
        for start in range(0, heldout.ce_rows, ROWS_PER_BATCH):
            held: list[Tensor] = []

            def hold(x: Tensor, held: list[Tensor] = held) -> Tensor:
                held.append(x.detach().requires_grad_())
                return held[0]

            end = min(start + ROWS_PER_BATCH, heldout.ce_rows)
            logits = model.logits(heldout.tokens[start:end], replace={heldout.site: hold}, grad=True)[:, :-1]
            scored = heldout.keep[start:end, 1:]
            logits = logits[scored].float()
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(1)
            loss = nn.functional.cross_entropy(logits, drawn, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, held[0])
            mine = (row >= start) & (row < end)
            out[mine] = gradient[row[mine] - start, position[mine]]
        return out

    @torch.no_grad()
    def splice(self, sae: GradientSAE, choice: str) -> dict[str, float]:
        """Return CE recovered and FVU over the first held-out rows with features chosen in one of the four ways."""
        if choice == "magnitude":
            code = sae.encode(self.x)
        else:
            code = sae.encode_batch(Batch(self.x, gradient=self.gradients[choice]), "grad")
        x_hat = sae.decode(code)
        rebuilt = Reconstruction(self.x.mean(0))
        rebuilt.update(self.x, x_hat)
        ce = self.heldout.cross_entropy(x_hat)
        return {"ce": ce, "ce_recovered": self.heldout.recovered(ce), "fvu": rebuilt.result().fvu}

    @torch.no_grad()
    def steer(self, directions: Float[Tensor, "n d"]) -> dict[str, float]:
        """Return the mean change of the next-token distribution per direction, each in one context in turn."""
        unit = directions / directions.norm(dim=1, keepdim=True)
        change = unit * (STRENGTH * self.spread)
        kl = logits_moved = 0.0
        for start in range(0, len(change), CONTEXTS):
            part = change[start : start + CONTEXTS]

            def add(x: Tensor, part: Tensor = part) -> Tensor:
                x = x.clone()
                x[:, -1] += part
                return x

            n = len(part)
            site = self.heldout.site
            logits = self.opened.model.logits(self.contexts[:n], replace={site: add})[:, -1].float()
            before, after = self.clean[:n].log_softmax(-1), logits.log_softmax(-1)
            kl += float((before.exp() * (before - after)).sum())
            moved = logits - self.clean[:n]
            logits_moved += float((moved - moved.mean(1, keepdim=True)).norm(dim=1).sum())
        return {"steer_kl": kl / len(change), "steer_logits": logits_moved / len(change)}

    def alive(self, sae: GradientSAE, seed: int) -> Float[Tensor, "n d"]:
        """Return decoder rows of features drawn from those that fire on the spliced text."""
        code = sae.encode(self.x)
        fired = torch.bincount(code.indices[code.values > 0], minlength=sae.d_sae).nonzero().squeeze(1)
        drawn = torch.randint(len(fired), (FEATURES,), generator=torch.Generator().manual_seed(seed))
        return sae.W_dec.detach()[fired[drawn]]


def train(opened: Opened, k: int, seed: int, lr: float, folder: Path) -> dict[float, GradientSAE]:
    """Train one g-SAE for each beta, on one pass."""
    subject = opened.subject
    runs = []
    for beta in BETAS:
        sae = {"architecture": "gradient", "d_in": opened.train.d_in(subject.site), "d_sae": subject.d_sae}
        training = {"tokens": subject.tokens, "batch_size": BATCH, "lr": lr, "seed": seed, "device": "cpu"}
        config = {"name": f"beta{beta:g}", "sae": {**sae, "k": k, "beta": beta}, "training": training}
        runs.append(parse_config(FitConfig, config))
    fitted = fit(runs, opened.train.stream(subject.site, BATCH, seed, gradient=True), folder)
    found = {}
    for beta, result in zip(BETAS, fitted, strict=True):
        loaded = load_sae(result.path)
        assert isinstance(loaded, GradientSAE)
        found[beta] = loaded
    return found


def with_beta(sae: GradientSAE, beta: float) -> GradientSAE:
    """Return the same dictionary with another beta."""
    other = GradientSAE(sae.config.model_copy(update={"beta": beta}), seed=None)
    other.load_tensors(sae.tensors())
    return other


def run(args: argparse.Namespace) -> None:
    """Train and measure what is not in the results yet."""
    bench = Bench(open_subject(SUBJECTS["embedded"], None, args.work / "embedded"))
    done = {(r["kind"], r.get("k"), r.get("seed")) for r in read_rows(args.results)}
    row: dict[str, Any]
    for seed in SEEDS:
        if ("steer", None, seed) not in done:
            g = torch.Generator().manual_seed(seed)
            random = torch.randn(FEATURES, bench.x.shape[1], generator=g)
            pairs = torch.randint(len(bench.x), (2, FEATURES), generator=g)
            differences = bench.x[pairs[0]] - bench.x[pairs[1]]
            for name, directions in (("random", random), ("token differences", differences)):
                row = {"kind": "steer", "name": name, "k": None, "seed": seed}
                append_row(args.results, {**row, **bench.steer(directions)})
        for k in KS:
            if ("sae", k, seed) in done:
                continue
            with tempfile.TemporaryDirectory() as folder:
                saes = train(bench.opened, k, seed, args.lr, Path(folder) / "fit")
            for beta, sae in saes.items():
                row = {"kind": "sae", "k": k, "seed": seed, "beta": beta, "tokens": bench.opened.subject.tokens}
                usage = measure(sae, bench.heldout, ce=False)
                row |= {"dead": usage["dead"], "underused": usage["underused"], "lr": args.lr}
                row |= bench.steer(bench.alive(sae, seed))
                for choice in CHOICES if beta else CHOICES[:1]:
                    row |= {f"{name} {choice}": value for name, value in bench.splice(sae, choice).items()}
                append_row(args.results, row)
                print({key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()}, flush=True)
            for beta in BETAS[1:]:  # TopK's dictionary, and the gradient only when it is used
                row = {"kind": "topk by gradient", "k": k, "seed": seed, "beta": beta}
                for choice in CHOICES[1:]:
                    found = bench.splice(with_beta(saes[0.0], beta), choice)
                    row |= {f"{name} {choice}": value for name, value in found.items()}
                append_row(args.results, row)


def tables(rows: list[dict[str, Any]]) -> str:
    """Return Markdown tables."""

    def cell(found: list[dict[str, Any]], key: str, digits: int = 3, percent: bool = False) -> str:
        return mean_spread([row[key] for row in found if key in row], digits, percent)

    lines, steer = [], []
    for k in KS:
        for kind, trained in (("sae", "as trained"), ("topk by gradient", "TopK's dictionary")):
            for beta in BETAS:
                found = [r for r in rows if r["kind"] == kind and r["k"] == k and r["beta"] == beta]
                if found:
                    ce = [cell(found, f"ce_recovered {choice}") for choice in CHOICES]
                    name = "TopK" if beta == 0 else f"beta {beta:g}, {trained}"
                    extra = [cell(found, "fvu magnitude"), cell(found, "dead", 1, True)]
                    lines.append([f"k {k}, {name}", *ce, *extra])
                if found and kind == "sae":
                    steer.append([f"k {k}, {name}", cell(found, "steer_kl", 4), cell(found, "steer_logits", 2)])
    for name in ("random", "token differences"):
        found = [r for r in rows if r["kind"] == "steer" and r["name"] == name]
        if found:
            steer.append([f"control: {name}", cell(found, "steer_kl", 4), cell(found, "steer_logits", 2)])
    first = markdown(["CE recovered, by choice", *CHOICES, "FVU (magnitude)", "dead %"], lines)
    return f"{first}\n\n{markdown(['steered by', 'KL (nats)', 'change of logits (norm)'], steer)}"


def main() -> None:
    """Run the benchmark, or print what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for stores, as of quality.py")
    add_table_options(parser, RESULTS)
    parser.add_argument("--lr", type=float, default=8e-3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if printed(args, "gradient", tables):
        return
    if args.work is None:
        parser.error("give --work, a folder for stores")
    torch.set_num_threads(args.threads)
    set_progress(False)
    run(args)


if __name__ == "__main__":
    main()
