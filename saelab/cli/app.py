"""``saelab app``: the feature browser, on this machine only unless told otherwise."""

import importlib.util
import threading

import click


@click.command(
    help="Open the feature browser on the folders PATH...: runs (saelab demo), feature stores (saelab build) or SAEs."
)
@click.argument("path", nargs=-1, required=True)
@click.option("--port", type=click.IntRange(1, 65535), default=8501, show_default=True, help="Port to serve on.")
@click.option(
    "--host",
    default="localhost",
    show_default=True,
    help="Address to serve on; 0.0.0.0 lets other machines in, who can then read and annotate, with no password.",
)
def command(path: tuple[str, ...], port: int, host: str) -> None:
    """Serve the feature browser until interrupted."""
    from saelab.core.assets import asset
    from saelab.core.errors import SaelabError
    from saelab.workflows.browse import survey

    if importlib.util.find_spec("streamlit") is None:
        raise SaelabError("the feature browser needs a package: pip install streamlit")
    library = survey(path)
    for problem in library.problems:
        click.echo(f"saelab: {problem}", err=True)
    if not library.places and not library.logs and not any(library.results.values()):
        raise SaelabError(
            f"nothing to browse in {', '.join(path)}; give the folder of a run, feature store, SAE or result "
            "('saelab demo' makes one)"
        )
    require_free(host, port)
    shown = "localhost" if host in ("0.0.0.0", "::") else host
    click.echo(f"saelab app: http://{shown}:{port}  (Ctrl-C ends it)", err=True)
    serve(str(asset("app", "main.py")), list(path), port, host)


def require_free(host: str, port: int) -> None:
    """Raise one line when the port is taken or the address is not this machine's."""
    import errno
    import socket

    from saelab.core.errors import SaelabError

    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise SaelabError(f"port {port} is taken; give another --port") from None
        raise SaelabError(f"cannot serve on {host}:{port} ({error.strerror}); give another --host or --port") from None


def settings(port: int, host: str) -> dict[str, object]:
    """Return Streamlit's settings: no statistics, no look-up of outside addresses, no clutter, one palette."""
    return {
        "server.port": port,
        "server.address": host,
        "server.headless": True,
        "server.fileWatcherType": "none",
        "server.showEmailPrompt": False,
        "browser.gatherUsageStats": False,
        "logger.hideWelcomeMessage": True,
        "runner.magicEnabled": False,
        "client.toolbarMode": "minimal",
        "client.showErrorDetails": "none",
        "client.showErrorLinks": False,
        "global.disableWidgetStateDuplicationWarning": True,
        "theme.light.primaryColor": "#0067A0",
        "theme.dark.primaryColor": "#56B4E9",
    }


def serve(script: str, paths: list[str], port: int, host: str) -> None:
    """Run the Streamlit server in this process until it is interrupted."""
    from streamlit.web import bootstrap

    options = settings(port, host)
    threading.Thread(target=warm_up, args=(paths,), daemon=True).start()
    bootstrap.load_config_options(options)
    bootstrap.run(script, False, paths, options)


def warm_up(paths: list[str]) -> None:
    """Import and read, while the server starts and the person reaches for the browser, what the first page needs."""
    from saelab.core import plotting
    from saelab.core.errors import SaelabError
    from saelab.workflows import directions
    from saelab.workflows.browse import load_evaluation_of, open_place, stamp, survey

    plotting.template()
    try:
        for place in survey(paths).places[:1]:
            load_evaluation_of(place)
            if place.store is not None:
                open_place(place)
                if place.sae is not None:
                    directions.decoder_plane(place.sae, stamp(place.sae))
    except SaelabError:
        return  # the page says it
