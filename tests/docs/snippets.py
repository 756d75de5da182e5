"""The code in the documentation: found, parsed, and run at smaller sizes.

A block counts as code when it is fenced as bash, sh or python, or indented by four spaces outside lists. A comment
``<!-- not run: reason -->`` before a block keeps it from being run (it needs a peer, a GPU, the network or hours, or is
a synopsis); its commands are parsed by the program all the same, unless the reason is that it is a synopsis.

Commands run in this process, in the order of their page, with the sizes of :data:`SMALLER` after their own options (the
last one counts), so that a page that trains for minutes is checked in seconds.
"""

import ast
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^(\s*)```(\w*)")
NOT_RUN = re.compile(r"^\s*<!-- not run: (.+?) -->\s*$")
LIST = re.compile(r"^\s*(?:[*+-]|\d+\.) ")
SHELL = ("saelab", "python", "python3.11", "make", "pip", "benchmarks/peers/setup.sh", "torchrun", "cd", "head")
OTHER = ("text", "yaml", "json", "mermaid", "toml")

SMALLER = {
    "demo": "--harvest_tokens 30000 --train_tokens 60000 --eval_tokens 3000 --build_tokens 12000 --force",
    "harvest": "--harvest.max_tokens 12000",
    "train": "--training.tokens 24000 --training.batch_size 512 --training.init_tokens 4096",
    "eval": "--max_tokens 2000",
    "build": "--max_tokens 4000",
    "compare": "--max_tokens 3000 --targets 8",
    "dark-matter": "--max_tokens 6000 --skip_positions 4 --downstream_tokens 600 --pursuit_tokens 300 "
    "--synthetic_tokens 600 --error_saes.tokens 4000",
    "lazy-neurons": "--max_tokens 1000 --curve_tokens 300",
    "explain run": "--max_features 4 --control_features 4",
    "circuits find": "--n 6 --n_heldout 6 --n_random 2",
    "circuits features": "--n 4 --n_heldout 4 --n_exact 1 --steps 2",
    "codebook": "--training.steps 12 --training.rows 2",
    "train configs/contrastive.yaml": "--pairs.max_pairs 300 --training.tokens 3000 --training.batch_size 256",
    "train configs/end-to-end.yaml": "--training.tokens 3000 --training.batch_size 256 --training.init_tokens 512",
    "sparsity-study": "--harvest_tokens 4000 --train_tokens 8000 --d_sae 64",
}
"""Options put after a command's own when it is run here; what names a recipe counts before what does not."""

PRELUDES = {
    "main-job.md": "import torch\nx = torch.randn(8, 192)\n",
    "compare.md": """
from saelab.cli.main import _run
from tests.docs.snippets import SMALLER

grid = ["--grid", "{training.seed: [0, 1]}", "--sae.d_sae", "128", "--out", "sae"]
line = "--quiet train configs/demo-topk.yaml --store saelab-demo/store"
assert _run([*line.split(), *grid, *SMALLER["train"].split()]) == 0
""",
    "dark-matter.md": """
from saelab.cli.main import _run
from tests.docs.snippets import SMALLER

grid = ["--grid", "{sae.d_sae: [32, 64, 128, 256]}", "--sae.k", "8", "--out", "ladder"]
line = "--quiet train configs/ladder.yaml --store saelab-demo/store"
assert _run([*line.split(), *grid, *SMALLER["train"].split()]) == 0
line = "--quiet dark-matter ladder/d_sae=128 --store saelab-demo/store --ladder ladder --out dm --model_parts false"
assert _run([*line.split(), *SMALLER["dark-matter"].split()]) == 0
""",
}
"""What a page's Python takes for granted."""


@dataclass(frozen=True)
class Snippet:
    """One block of code."""

    page: str
    line: int
    language: str
    text: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """Return README.md and every page in docs/, relative to the repository."""
    return ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]


def snippets(page: str) -> list[Snippet]:
    """Return the code of a page, in order."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    found, reason, k, in_list = [], None, 0, False
    while k < len(lines):
        fence, said = FENCE.match(lines[k]), NOT_RUN.match(lines[k])
        if said:
            reason = said.group(1)
        elif fence:
            stop = next(j for j in range(k + 1, len(lines)) if lines[j].strip() == "```")
            margin, language = len(fence.group(1)), fence.group(2)
            assert language in (*OTHER, "bash", "sh", "python"), f"{page}:{k + 1} is in {language or 'no language'}"
            if language not in OTHER:
                text = "\n".join(line[margin:] for line in lines[k + 1 : stop])
                found.append(Snippet(page, k + 1, "python" if language == "python" else "bash", text, reason))
            reason, k = None, stop
        elif lines[k].startswith("    ") and not in_list and not lines[k - 1].strip():
            stop = k
            while stop < len(lines) and (lines[stop].startswith("    ") or not lines[stop].strip()):
                stop += 1
            text = "\n".join(line[4:] for line in lines[k:stop]).strip()
            if language := _language(text):
                found.append(Snippet(page, k + 1, language, text, reason))
            reason, k = None, stop - 1
        elif lines[k].strip():
            reason = None
            in_list = bool(LIST.match(lines[k])) or (in_list and lines[k].startswith(" "))
        k += 1
    return [s if s.reason or "[--" not in s.text else replace(s, reason="synopsis") for s in found]


def _language(text: str) -> str | None:
    first = next((word for word in text.split() if "=" not in word), "")
    if first in SHELL or first.startswith("."):
        return "bash"
    try:
        ast.parse(text)
    except SyntaxError:
        return None
    return "python" if "import " in text or "(" in text else None


def commands(text: str) -> list[str]:
    """Return the command lines of a block, continued lines joined, comments left out."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.strip().startswith("#")]


def saelab_lines(snippet: Snippet) -> list[list[str]]:
    """Return the arguments of every ``saelab`` in a block, also of those in loops and after variables."""
    found: list[list[str]] = []
    for line in commands(_expanded(snippet)):
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split, words = True, []
        for word in [*lexer, ";"]:
            if word not in (";", "&&", "|", "||"):
                words.append(word)
                continue
            while words and (words[0] in ("do", "nohup") or re.match(r"^\w+=", words[0])):
                words = words[1:]
            if words[:1] == ["saelab"]:
                found.append(words[1:])
            words = []
    return found


def _expanded(snippet: Snippet) -> str:
    """Put in the shell variables that the page sets."""
    text, page = snippet.text, (ROOT / snippet.page).read_text(encoding="utf-8")
    for name, value in re.findall(r'^(\w+)="(.*)"$', page, flags=re.M):
        text = text.replace(f"${name}", value)
    return text


def parse(arguments: list[str]) -> list[str]:
    """Let the program parse a command without running it; return the command's words. Raises click.UsageError."""
    import click

    from saelab.cli.main import main

    command: click.Command = main
    context, path, rest = None, [], list(arguments)
    while isinstance(command, click.Group):
        context = command.make_context(command.name, rest, parent=context)
        name, inner, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        assert inner is not None
        path.append(name)
        command = inner
    if "--help" not in rest and "-h" not in rest:
        command.make_context(path[-1], rest, parent=context)
    return path


def run(snippet: Snippet, namespace: dict) -> None:
    """Run a block in the current folder; Python shares the page's namespace."""
    if snippet.language == "python":
        exec(compile(snippet.text, str(snippet), "exec"), namespace)
        return None
    if re.search(r"^(?:for|while|if) ", snippet.text, flags=re.M):
        return _bash(snippet.text, snippet)
    for line in commands(snippet.text):
        words = shlex.split(line, comments=True)
        if words[:1] == ["saelab"]:
            _saelab(words[1:], snippet)
        else:
            _bash(line, snippet)
    return None


def _bash(text: str, snippet: Snippet) -> None:
    """Run a script in a shell, its own saelab on the path; sizes are as they stand."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-ec", text], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, f"{snippet}: {text}\n{done.stdout}{done.stderr}"


def _saelab(arguments: list[str], snippet: Snippet) -> None:
    from saelab.cli.main import _run

    path = " ".join(parse(arguments))
    smaller = SMALLER.get(" ".join(arguments[:2]), SMALLER.get(path, ""))
    code = _run(["--quiet", *arguments, *smaller.split()])
    sys.stdout.flush()
    assert code == 0, f"{snippet}: saelab {shlex.join(arguments)} ended with {code}"
