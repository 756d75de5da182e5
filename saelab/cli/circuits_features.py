"""Commands of ``saelab circuits`` about SAE features and transcoders."""

import json

import click

from saelab.cli.circuits_edges import finite, frame_table
from saelab.cli.options import config_command, force_option, json_option
from saelab.workflows.circuits_attention import PrefixesJob, RolesJob, run_prefixes, run_roles
from saelab.workflows.circuits_features import (
    AttentionJob,
    FeaturesJob,
    GraphJob,
)


def _features(job: FeaturesJob, out: str | None, force: bool, as_json: bool) -> None:
    from saelab import circuits
    from saelab.cli import console

    with console.quiet_if(as_json):
        found = circuits.features(job, out=out, force=force)
    if as_json:
        click.echo(json.dumps(finite(found.to_dict())))
        return
    nodes = found.to_frame()[["node", "effect", "exact"]]
    title = f"{found.task} on {found.model}: {len(found.nodes)} nodes of {found.n_candidates}, {len(found.edges)} edges"
    console.out.print(frame_table(title, nodes.head(25)))
    console.out.print(
        f"effect: predicted {found.metric} with the node replaced - clean ({found.method}); exact: measured",
        style="dim",
    )
    console.out.print(frame_table(f"judged on {found.n_heldout} held-out prompts", found.curve_frame()))
    if out is not None:
        console.say(f"{out}: circuit.json, report.html")


def _attention(job: AttentionJob, as_json: bool) -> None:
    from saelab import circuits
    from saelab.cli import console

    with console.quiet_if(as_json):
        found = circuits.attention(job)
    if as_json:
        click.echo(json.dumps(finite(found.to_dict())))
        return
    token = found.tokens[found.position]
    title = f"feature {found.feature} of {found.site} at {found.position} {token!r}"
    console.out.print(f"{title}: pre-activation {found.pre_activation:.4g}", markup=False)
    console.out.print(frame_table("heads (weights: share of the write; activation: term here)", found.head_frame()))
    sources = found.to_frame()
    sources["token"] = [repr(text) for text in sources["token"]]
    console.out.print(frame_table("heads and source positions", sources))
    for line in found.tree_lines:
        console.out.print(line, markup=False, soft_wrap=True)


def _graph(job: GraphJob, out: str | None, force: bool, as_json: bool) -> None:
    from saelab import circuits
    from saelab.analysis.circuits.attribution.export import graph_json
    from saelab.cli import console

    with console.quiet_if(as_json):
        graph = circuits.graph(job, out=out, force=force)
    if as_json:
        click.echo(json.dumps(finite(graph_json(graph, "graph"))))
        return
    kept = int(graph.pruned.nodes.sum())
    title = f"{job.prompt!r}: {kept} of {len(graph.nodes)} nodes, {int(graph.pruned.edges.sum())} edges"
    console.out.print(frame_table(title, graph.to_frame().head(25)))
    console.out.print(
        f"replacement {graph.replacement:.3f}, completeness {graph.completeness:.3f}; attention patterns are held",
        style="dim",
    )
    if out is not None:
        console.say(f"{out}: graph.json, report.html")


def _roles(job: RolesJob, as_json: bool) -> None:
    from saelab.cli import console

    with console.quiet_if(as_json):
        frame = run_roles(job)
    if as_json:
        click.echo(json.dumps(finite(frame.to_dict("records"))))
        return
    frame["features"] = [" ".join(str(i) for i in row[:5]) for row in frame["features"]]
    frame["shares"] = [f"{max(row, default=0):.2f} to {min(row, default=0):.2f}" for row in frame["shares"]]
    frame["tokens"] = [" ".join(repr(token) for token in row[:8]) for row in frame["tokens"]]
    console.out.print(frame_table(f"roles of heads: the {job.n} features that each writes most of", frame))
    console.out.print("similarity: mean overlap of two features' top tokens; 1 one role, 0 many", style="dim")


def _prefixes(job: PrefixesJob, as_json: bool) -> None:
    from saelab.cli import console

    with console.quiet_if(as_json):
        frame = run_prefixes(job)
    if as_json:
        click.echo(json.dumps(finite(frame.to_dict("records"))))
        return
    title = f"induction of {job.model} by the length of the repeated prefix"
    console.out.print(frame_table(title, frame))
    console.out.print("attention to the token after the first copy; kind: none when all are under 0.3", style="dim")


_OUT = "Write the result and its report to this folder."

features_command = config_command(
    "features",
    FeaturesJob,
    _features,
    extra=[click.Option(["--out"], metavar="DIR", help=_OUT), force_option(), json_option()],
    help_text="Find the circuit of SAE features of a task, and judge it on held-out prompts.",
)
attention_command = config_command(
    "attention",
    AttentionJob,
    _attention,
    positional="sae",
    extra=[json_option()],
    help_text="Explain one feature of the attention SAE in folder SAE on a prompt: heads, source positions, tree.",
)
roles_command = config_command(
    "roles",
    RolesJob,
    _roles,
    positional="sae",
    extra=[json_option()],
    help_text="For each head, the features of an attention SAE that it writes most of, and how alike they are.",
)
prefixes_command = config_command(
    "prefixes",
    PrefixesJob,
    _prefixes,
    extra=[json_option()],
    help_text="Find induction heads, and whether they need a short or a long repeated prefix.",
)
graph_command = config_command(
    "graph",
    GraphJob,
    _graph,
    extra=[click.Option(["--out"], metavar="DIR", help=_OUT), force_option(), json_option()],
    help_text="Attribution graph of a prompt, with one transcoder for each MLP.",
)
