"""``saelab dashboard``: some features as one HTML file that needs nothing else."""

import json

import click

from saelab.cli.options import json_option


@click.command(
    help="Write the dashboards of features FEATURE... as one self-contained HTML file: no script, no request."
)
@click.argument("feature", nargs=-1, required=True, type=click.IntRange(min=0))
@click.option("--html", "path", metavar="FILE", required=True, help="File to write.")
@click.option(
    "--store", default=".", show_default=True, metavar="DIR", help="Feature store, or a folder that holds just one."
)
@click.option("--contexts", type=click.IntRange(0, 1000), default=20, show_default=True, help="Top contexts of each.")
@click.option(
    "--intervals", type=click.IntRange(0, 100), default=10, show_default=True, help="Parts of the range; 0: none."
)
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
def command(
    feature: tuple[int, ...], path: str, store: str, *, contexts: int, intervals: int, force: bool, as_json: bool
) -> None:
    """Write one HTML file."""
    from pathlib import Path

    from saelab.cli import console
    from saelab.core.artifacts import human_bytes
    from saelab.core.errors import OutputExistsError
    from saelab.features.dashboard import Panes, dashboard
    from saelab.workflows.browse import find_store

    if Path(path).exists() and not force:
        raise OutputExistsError(f"{path} already exists; add --force to replace it")
    made = dashboard(find_store(store), feature, Panes(contexts=contexts, intervals=intervals))
    size = made.save(path).stat().st_size
    if as_json:
        click.echo(json.dumps({"path": path, "features": list(feature), "bytes": size}))
    else:
        console.out.print(f"{path}: {len(set(feature))} features, {human_bytes(size)}", markup=False, soft_wrap=True)


command.params.append(json_option())
