"""What the codes of a codebook model do: find those that stand for common next tokens, set them, see what follows.

    saelab codebook configs/codebook.yaml --out runs/codebook
    python benchmarks/codebook.py runs/codebook --docs docs/architectures.md

Codes are found on rows of the training text and set at the last position of rows of the held-out text, cut short; see
saelab.training.code_effects. The table's first line is over all tokens, the others are the tokens that gain most. The
gain of random codes of the same head at the same place is the control; *larger* counts tokens whose own code gains more
than that.
"""

import argparse
import datetime
import statistics
from pathlib import Path

from jsonl import markdown, put_section

from saelab.core.artifacts import read_manifest
from saelab.features.render import visible
from saelab.training.code_effects import CodeEffect, CodeEffects, code_effects
from saelab.training.codebook_model import KIND, load_codebook_model
from saelab.workflows.codebook import CodebookJob


def measure(args: argparse.Namespace) -> tuple[CodeEffects, dict[int, str]]:
    """Return the effects, and the tokens' texts by id."""
    model = load_codebook_model(args.folder)
    found_on, set_in = (
        next(iter(CodebookJob(text=text).rows(model.subject).batches(rows)))
        for text, rows in (("stdlib:train", args.find), ("stdlib:heldout", args.rows))
    )
    rows = set_in.tokens[set_in.keep[:, 1 : args.length].all(1), : args.length]
    sizes = {"n_tokens": args.tokens, "n_random": args.random}
    effects = code_effects(model, (found_on.tokens, found_on.keep), rows, **sizes)
    return effects, {e.token: visible(model.subject.tokenizer.decode([e.token])) for e in effects.effects}


def line(name: str, effects: list[CodeEffect]) -> list[str]:
    """Return a row of the table: means over some tokens."""

    def mean(field: str) -> float:
        return statistics.fmean(value for e in effects if (value := getattr(e, field)) == value)

    larger = sum(e.gain > e.control_gain for e in effects)
    where = "" if len(effects) > 1 else f"{effects[0].site.split('.')[1]}.{effects[0].group} / {effects[0].code}"
    return [
        *(name, where, f"{mean('precision'):.2f}", f"{mean('recall'):.2f}", f"{mean('before'):.2f}"),
        *(f"{mean('gain'):+.2f}", f"{mean('control_gain'):+.2f}", f"{larger} of {len(effects)}"),
    ]


def table(effects: CodeEffects, names: dict[int, str], shown: int) -> str:
    """Return the Markdown table."""
    head = ["next token", "head / code", "precision", "recall", "log p", "code set", "random code set", "larger"]
    best = sorted(effects.effects, key=lambda e: e.control_gain - e.gain)[:shown]
    quoted = [f"`{names[e.token]}`".replace("|", "\\|") for e in best]
    rows = [line(f"all {len(effects.effects)}", effects.effects)]
    return markdown(head, [*rows, *(line(name, [e]) for name, e in zip(quoted, best, strict=True))])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what saelab codebook wrote")
    parser.add_argument("--find", type=int, default=128, help="rows of text to find codes on")
    parser.add_argument("--rows", type=int, default=32, help="rows of text to set them in")
    parser.add_argument("--length", type=int, default=48, help="tokens of these rows")
    parser.add_argument("--tokens", type=int, default=20, help="the commonest next tokens of the text")
    parser.add_argument("--random", type=int, default=3, help="random codes beside each")
    parser.add_argument("--shown", type=int, default=5, help="tokens with a line of their own")
    parser.add_argument("--docs", type=Path, help="put the table into this page")
    args = parser.parse_args()
    effects, names = measure(args)
    about = read_manifest(args.folder, KIND)
    metrics, steps = about["metrics"], about["training"]["steps"]
    text = (
        f"{table(effects, names, args.shown)}\n\n{steps:,} steps of training; loss {metrics['loss']:.3f} nats, "
        f"{metrics['loss_before']:.3f} without\ncodebooks before it. Nats of log probability, means over "
        f"{effects.rows} rows of unseen text, {datetime.datetime.now(datetime.UTC).date()}."
    )
    print(text)
    if args.docs:
        put_section(args.docs, "codes", text)


if __name__ == "__main__":
    main()
