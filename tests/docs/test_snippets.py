"""Every snippet of README and docs/ runs, or says why not; what does not run is parsed."""

import ast
import shutil

import click
import pytest

from saelab.core.progress import set_progress
from tests.docs.snippets import PRELUDES, ROOT, SMALLER, pages, parse, run, saelab_lines, snippets

RUNNABLE = [page for page in pages() if any(s.reason is None for s in snippets(page))]


@pytest.mark.parametrize("page", pages())
def test_every_command_is_one_of_the_program(page):
    for snippet in snippets(page):
        if snippet.language == "bash" and not (snippet.reason or "").startswith("synopsis"):
            for arguments in saelab_lines(snippet):
                try:
                    parse(arguments)
                except click.UsageError as error:
                    pytest.fail(f"{snippet}: saelab {' '.join(arguments)}: {error.format_message()}")


@pytest.mark.parametrize("page", pages())
def test_every_python_block_is_python(page):
    for snippet in snippets(page):
        if snippet.language == "python":
            ast.parse(snippet.text, str(snippet))


def test_what_is_not_run_says_why(capsys):
    left_out = [s for page in pages() for s in snippets(page) if s.reason is not None]
    ran = [s for page in pages() for s in snippets(page) if s.reason is None]
    with capsys.disabled():
        print()
        for snippet in left_out:
            print(f"not run: {snippet}: {snippet.reason}")
        print(f"{len(ran)} blocks are run, {len(left_out)} are not")
    assert ran
    assert all(len(snippet.reason) > 5 for snippet in left_out)


@pytest.fixture(scope="session")
def small_demo(tmp_path_factory):
    """``saelab demo`` at smaller sizes, made once."""
    from saelab.cli.main import _run

    folder = tmp_path_factory.mktemp("docs") / "saelab-demo"
    set_progress(False)
    assert _run(["--quiet", "demo", *SMALLER["demo"].split(), "--out", str(folder)]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", RUNNABLE)
def test_snippets_run(page, small_demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_demo, tmp_path / "saelab-demo")
    namespace = {"__name__": "__main__"}
    name = page.removeprefix("docs/")
    exec(PRELUDES.get(name, ""), namespace)
    for snippet in snippets(page):
        if snippet.reason is None:
            run(snippet, namespace)
    assert ROOT not in tmp_path.parents
