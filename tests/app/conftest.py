"""The app on the small store of ``made``, through Streamlit's own test driver."""

import sys
from pathlib import Path

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from saelab.core.assets import asset
from saelab.core.progress import set_progress

APP = Path(asset("app"))


@pytest.fixture(autouse=True)
def _quiet():
    set_progress(False)
    yield
    set_progress(True)


@pytest.fixture
def open_app(monkeypatch):
    """Return a function that starts the app on some folders; its pages raise nothing."""
    monkeypatch.syspath_prepend(str(APP))
    st.cache_resource.clear()
    st.cache_data.clear()

    def start(*paths, page=None, query=None, pane=None):
        monkeypatch.setattr(sys, "argv", ["main.py", *map(str, paths)])
        app = AppTest.from_file(str(APP / "main.py"), default_timeout=120)
        app.query_params.update(query or {})
        app.run()
        check(app)
        if page is not None:
            app.switch_page(f"views/{page}.py")
            app.query_params.update(query or {})
            if pane is not None:
                app.session_state["pane"] = pane
            app.run()
            check(app)
        return app

    yield start
    for name in ("shell",):
        sys.modules.pop(name, None)


def check(app):
    """Fail with the page's own exception."""
    assert not app.exception, [e.value for e in app.exception]
    return app


def text_of(app):
    """Everything the page says, as one string."""
    kinds = ("title", "subheader", "caption", "markdown", "info", "warning", "error", "code", "metric")
    said = [element.value for kind in kinds for element in getattr(app, kind)]
    return "\n".join(map(str, said)).replace("\\", "")


def html_of(app):
    """All HTML that the page shows, but for its style."""
    bodies = [element.proto.body for element in app.get("html")]
    return "\n".join(body for body in bodies if not body.startswith("<style>"))
