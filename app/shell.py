"""What every page shares: the folders given, the chosen SAE, the live model, navigation, and how texts are shown.

Caches hold what is only read: lists of folders, open stores, the model. What a person chooses is in the session.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from saelab.core.errors import SaelabError
from saelab.features.html import CSS
from saelab.workflows.browse import Library, Opened, Place, open_place, stamp, survey
from saelab.workflows.live import Live, open_live

FEATURE_PAGE, STEER_PAGE = "views/feature.py", "views/steer.py"
STYLE = """
[data-testid="stMainBlockContainer"]{padding:2.4rem clamp(1rem,3vw,3rem) 3rem;max-width:1560px}
[data-testid="stMetricValue"]{font-size:1.35rem;font-variant-numeric:tabular-nums}
[data-testid="stMetricLabel"]{opacity:.75}
[data-testid="stHtml"]:has(.sl){overflow:visible}
h1{font-size:1.7rem!important;padding-bottom:.5rem!important}
h3{font-size:1.05rem!important;padding-bottom:.35rem!important}
"""


def plain(text: object) -> str:
    """Escape a text for places that read Markdown (messages, labels, captions)."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", str(text).replace("\n", " "))


def html(body: str) -> None:
    """Show HTML made by saelab.features.html or saelab.workflows.live, in which everything is escaped."""
    st.html(body)


@contextmanager
def guarded() -> Iterator[None]:
    """Show an error that a person can mend as one line, and end the page there."""
    try:
        yield
    except SaelabError as error:
        st.error(plain(error), icon=":material/error:")
        st.stop()


@st.cache_resource(ttl=10, show_spinner=False)
def _library(paths: tuple[str, ...]) -> Library:
    return survey(paths)


@st.cache_resource(max_entries=8, show_spinner="Opening the feature store …")
def _opened(place: Place, changed: int) -> Opened:
    return open_place(place)


@st.cache_resource(max_entries=1, show_spinner="Loading the model; this happens once …")
def _live(sae: Path, changed: int) -> Live:
    return open_live(sae)


def library() -> Library:
    """Return everything found below the folders on the command line."""
    with guarded():
        return _library(tuple(sys.argv[1:]))


def begin() -> None:
    """Style the page and let the person choose the SAE, in the side bar; the link's ``store`` is the first choice."""
    st.html(f"<style>{STYLE}{CSS}</style>")
    places = {place.key: place for place in library().places}
    if not places:
        return
    wanted = st.query_params.get("store")
    if wanted in places and wanted != st.session_state.get("linked"):
        st.session_state.linked = st.session_state.place = wanted
    if st.session_state.get("place") not in places:
        st.session_state.place = next(iter(places))
    with st.sidebar:
        if len(places) > 1:
            # A widget's own state is lost on pages that do not show it; "place" is kept apart from it.
            keys = list(places)
            chosen = st.selectbox(
                "SAE", keys, index=keys.index(st.session_state.place), help="Found in the folders given."
            )
            if chosen != st.session_state.place:
                for name in ("feature", "walk", "reading", "second", "steered"):
                    st.session_state.pop(name, None)
            st.session_state.place = chosen
        else:
            st.caption(plain(st.session_state.place))


def end() -> None:
    """Give back the parts of the stores that the page has read."""
    for used in st.session_state.pop("used", {}).values():
        used.store.release()


def _open(chosen: Place) -> Opened:
    found: Opened = _opened(chosen, stamp(chosen.store))
    st.session_state.setdefault("used", {})[chosen.key] = found
    return found


def place() -> Place:
    """Return the chosen SAE; when nothing was found, say so and end the page."""
    found = library()
    by_key = {p.key: p for p in found.places}
    if not by_key:
        for problem in found.problems:
            st.error(plain(problem), icon=":material/error:")
        st.info("No SAE in the folders given. This makes a run to look at:")
        st.code("saelab demo --out saelab-demo\nsaelab app saelab-demo", language="bash")
        st.stop()
    return by_key[st.session_state.get("place", next(iter(by_key)))]


def opened() -> Opened:
    """Return the chosen SAE's feature store; when it has none, name the command that makes it and end the page."""
    chosen = place()
    if chosen.store is None:
        for problem in library().problems:
            st.error(plain(problem), icon=":material/error:")
        st.info("This SAE has no feature store yet. This builds it:")
        st.code(f"saelab build {chosen.sae} --out {chosen.sae}-features", language="bash")
        st.stop()
    with guarded():
        return _open(chosen)


def opened_at(chosen: Place) -> Opened:
    """Return the feature store of any place."""
    with guarded():
        return _open(chosen)


def live() -> Live:
    """Return the model and the SAE, loading them when nobody has yet."""
    chosen = place()
    if chosen.sae is None:
        st.info(
            "The SAE of this feature store was not found, so the model cannot be run. Give its folder too, "
            "or the folder of the run that holds both:"
        )
        st.code(f"saelab app {chosen.store} PATH/TO/SAE", language="bash")
        st.stop()
    with guarded():
        return _live(chosen.sae, stamp(chosen.sae))


def open_feature(feature: int, key: str | None = None) -> None:
    """Go to the page of a feature, of the chosen SAE or of another place."""
    st.session_state.feature = int(feature)
    st.switch_page(FEATURE_PAGE, query_params={"feature": str(int(feature)), "store": key or place().key})


def results(kind: str) -> tuple[Path, ...]:
    """Return the saved results of a kind, the newest first."""
    return library().results.get(kind, ())


def choose_result(found: tuple[Path, ...], key: str) -> Path:
    """Let the person choose one of several saved results."""
    if len(found) == 1:
        return found[0]
    return st.selectbox("Result", found, format_func=lambda path: "/".join(path.parts[-2:]), key=key)


def live_of(sae: Path) -> Live:
    """Return the model and the SAE of a folder, loading them when nobody has yet."""
    with guarded():
        return _live(sae, stamp(sae))


def metrics(values: Mapping[str, tuple[str, str | None]]) -> None:
    """Show numbers in a row that wraps on narrow screens: title to (text, meaning)."""
    with st.container(horizontal=True, gap="xsmall"):
        for title, (text, meaning) in values.items():
            width = max(105, 40 + 7 * len(title))  # a longer title would be cut
            st.metric(title, text, help=None if meaning is None else plain(meaning), width=width)


def feature_table(frame: pd.DataFrame, key: str, **options: Any) -> None:
    """Show a table that has a column ``feature``; clicking a cell opens the feature of its row."""
    event = st.dataframe(
        frame, key=key, hide_index=True, on_select="rerun", selection_mode="single-cell", width="stretch", **options
    )
    cells = event["selection"]["cells"]
    if cells:
        open_feature(int(frame["feature"].iloc[cells[0][0]]))


def chart(figure: Any, key: str, *, clickable: bool = False, where: DeltaGenerator | None = None) -> None:
    """Show a figure; with ``clickable``, clicking a point opens the feature it stands for."""
    config = {"displaylogo": False, "displayModeBar": False, "scrollZoom": False}
    target = st if where is None else where
    if not clickable:
        target.plotly_chart(figure, key=key, width="stretch", config=config)
        return
    points = chart_points(figure, key, where=target)
    if points:
        open_feature(int(points[0][0] if isinstance(points[0], list | tuple) else points[0]))


def chart_points(figure: Any, key: str, *, where: Any = st) -> list[Any]:
    """Show a figure whose points can be clicked; return the custom data of those that were."""
    config = {"displaylogo": False, "displayModeBar": False, "scrollZoom": False}
    event = where.plotly_chart(
        figure, key=key, width="stretch", config=config, on_select="rerun", selection_mode="points"
    )
    return [point["customdata"] for point in event["selection"]["points"] if point.get("customdata") is not None]
