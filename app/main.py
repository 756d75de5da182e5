"""The feature browser. Started by ``saelab app PATH...``; the folders are the command line's arguments."""

import streamlit as st
from shell import begin

st.set_page_config(page_title="saelab", page_icon=":material/lens_blur:", layout="wide")
page = st.navigation(
    [
        st.Page("views/overview.py", title="Overview", icon=":material/dashboard:", default=True),
        st.Page("views/features.py", title="Features", icon=":material/table_rows:", url_path="features"),
        st.Page("views/feature.py", title="Feature", icon=":material/bar_chart:", url_path="feature"),
    ]
)
begin()
page.run()
