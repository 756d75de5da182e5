"""``saelab show``: what is in a folder."""

import json
from typing import Any

import click

from saelab.cli.options import json_option


@click.command(help="Describe the folder PATH that saelab wrote; with --feature, the top contexts of one feature.")
@click.argument("path")
@click.option("--feature", type=int, multiple=True, help="Feature of a feature store to show; may be repeated.")
@click.option("--contexts", type=click.IntRange(1, 1000), default=8, show_default=True, help="Contexts per feature.")
def command(path: str, feature: tuple[int, ...], contexts: int, as_json: bool) -> None:
    """Describe a folder."""
    from saelab.cli import console
    from saelab.workflows.show import describe, feature_cards

    if feature:
        for card in feature_cards(path, feature, contexts):
            if as_json:
                click.echo(json.dumps(card.to_dict()))
            else:
                console.print_feature(card)
        return
    description = describe(path)
    if as_json:
        click.echo(json.dumps(description))
        return
    flat: dict[str, Any] = {k: v for k, v in description.items() if not isinstance(v, dict | list)}
    console.out.print(console.key_value_table(path, flat))
    for key, value in description.items():
        if isinstance(value, dict):
            console.out.print(console.key_value_table(key, value))
        elif isinstance(value, list):
            console.out.print(console.key_value_table(key, {str(i): v for i, v in enumerate(value)}))


command.params.append(json_option())
