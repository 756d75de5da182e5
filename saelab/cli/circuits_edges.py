"""Commands of ``saelab circuits`` about heads and edges."""

import json
import math
from typing import Any

import click

from saelab.cli.options import config_command, force_option, json_option, out_option
from saelab.workflows.circuits import CompareJob, FindJob, HeadsJob


def frame_table(title: str, frame: Any) -> Any:
    """A pandas frame as a table of the command line."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in frame.columns:
        numeric = frame[name].dtype.kind in "fiu"
        table.add_column(str(name).replace("_", " "), justify="right" if numeric else "left", no_wrap=True)
    for row in frame.itertuples(index=False):
        table.add_row(*(_short(value) for value in row))
    return table


def _short(value: Any) -> str:
    from saelab.cli.console import format_value

    if isinstance(value, float) and math.isnan(value):
        return "-"
    return f"{value:.3f}" if isinstance(value, float) and abs(value) < 100 else format_value(value)


def _heads(job: HeadsJob, as_json: bool) -> None:
    from saelab import circuits
    from saelab.cli import console

    with console.quiet_if(as_json):
        found = circuits.heads(job)
    frame, pairs = found.to_frame(), found.edge_frame(10)
    if as_json:
        heads, edges = frame.to_dict("records"), pairs.to_dict("records")
        click.echo(json.dumps({"config": job.model_dump(), "seconds": found.seconds, "heads": heads, "edges": edges}))
        return
    console.out.print(
        frame_table(f"{job.task} on {job.model}: {found.n_prompts} prompts, {found.seconds:.1f} s", frame)
    )
    console.out.print(
        f"excess: score ({job.score}) above the mean of relabelled prompts; z: the same in units of their spread",
        style="dim",
    )
    console.out.print(frame_table("pairs of heads", pairs))


def _compare(job: CompareJob, as_json: bool) -> None:
    from saelab import circuits
    from saelab.cli import console

    with console.quiet_if(as_json):
        found = circuits.compare(job)
    if as_json:
        click.echo(json.dumps(finite(found.to_dict())))
        return
    console.out.print(
        frame_table(
            f"{found.task} on {found.model} (accuracy {found.accuracy:.0%})", found.to_frame().rename(columns=_COLUMNS)
        )
    )
    setting = found.setting
    console.out.print(
        f"metric {setting.metric}, ablation {setting.ablation}, positions {setting.positions}; {found.n_train} "
        f"prompts, judged on {found.n_heldout} held-out ones; faithfulness at {found.fraction:.0%} of edges",
        style="dim",
    )
    console.out.print(
        f"truth: {found.truth} ({found.n_true_edges} of {found.n_edges} edges, {found.n_true_nodes} heads and MLPs)",
        style="dim",
        soft_wrap=True,
    )


def _find(job: FindJob, out: str | None, force: bool, as_json: bool) -> None:
    from saelab import circuits
    from saelab.cli import console

    with console.quiet_if(as_json):
        circuit = circuits.find(job, out=out, force=force)
    if as_json:
        click.echo(json.dumps(finite(circuit.to_dict())))
        return
    setting = circuit.setting
    about = {
        "edges": f"{circuit.n_edges} of {circuit.graph.n_edges} ({circuit.share:.1%})",
        "heads": " ".join(circuit.heads) or "none",
        "MLPs": " ".join(circuit.mlps) or "none",
        setting.metric: f"{circuit.model_score:.3f} model, {circuit.empty_score:.3f} with every edge removed",
    }
    console.out.print(f"{circuit.task} on {circuit.model}: circuit by {circuit.method}", style="italic", markup=False)
    for name, text in about.items():
        console.out.print(f"{name:<12}{text}", markup=False, soft_wrap=True)
    console.out.print(frame_table(f"faithfulness on {circuit.n_heldout} held-out prompts", circuit.judged_frame()))
    console.out.print(
        "1: the whole model, 0: every edge removed. Random paths: as many edges, on paths from the embeddings to the "
        "logits; random heads and MLPs: as many, with all edges among them.",
        style="dim",
    )
    console.out.print(frame_table("edges", circuit.to_frame().head(20)))
    if out is not None:
        console.say(f"{out}: circuit.json, report.html")


_COLUMNS = {
    "edge_auc": "AUC edge",
    "edge_f1": "F1 edge",
    "node_auc": "AUC node",
    "node_f1": "F1 node",
    "faithfulness": "faith",
    "cpr": "CPR",
    "cmd": "CMD",
}


def finite(data: Any) -> Any:
    """The same with None for NaN, which JSON has not."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and math.isnan(data) else data


heads_command = config_command("heads", HeadsJob, _heads, extra=[json_option()], help_text="Score heads by SAE codes.")
compare_command = config_command(
    "compare", CompareJob, _compare, extra=[json_option()], help_text="Run all circuit methods on one task and model."
)
find_command = config_command(
    "find",
    FindJob,
    _find,
    extra=[
        click.Option(["--out"], metavar="DIR", help="Write the circuit and its report to this folder."),
        force_option(),
        json_option(),
    ],
    help_text="Find the smallest circuit that is faithful, and judge it on held-out prompts.",
)


@click.command("tasks", help="List the tasks and the models whose circuits are known.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def tasks_command(as_json: bool) -> None:
    """List tasks."""
    from saelab.analysis.circuits.tasks import load_task, task_names
    from saelab.analysis.circuits.truth import truth_names, truth_spec
    from saelab.cli import console

    tasks = [load_task(name) for name in task_names()]
    if as_json:
        known = {name: truth_spec(name).model_dump() for name in truth_names()}
        click.echo(json.dumps({"tasks": [task.model_dump() for task in tasks], "truth": known}))
        return
    for task in tasks:
        known_for = f" Known circuit: {truth_spec(task.truth).model}." if task.truth else ""
        console.out.print(f"[cyan]{task.name:<13}[/cyan] {' '.join(task.about.split())}{known_for}", soft_wrap=True)


@click.command("models", help="Write the models whose circuits are known to OUT/NAME, as folders that --model takes.")
def models_command(out: str) -> None:
    """Write the hand-set models."""
    from pathlib import Path

    from saelab.analysis.circuits.known import KNOWN, write_known
    from saelab.cli import console

    for name in KNOWN:
        console.say(f"{write_known(name, Path(out) / name)}")


models_command.params.append(out_option("Folder for the model folders."))
