"""The feature browser. Started by ``saelab app PATH...``; the folders are the command line's arguments."""

from pathlib import Path

import streamlit as st
from shell import begin, end

HERE = Path(__file__).parent
# Pictures are files: an emoji or an icon's name as the page's icon would be fetched from outside.
st.set_page_config(page_title="saelab", page_icon=str(HERE / "icon.svg"), layout="wide")
st.logo(str(HERE / "logo.svg"), icon_image=str(HERE / "icon.svg"))
page = st.navigation(
    [
        st.Page("views/overview.py", title="Overview", icon=":material/dashboard:", default=True),
        st.Page("views/features.py", title="Features", icon=":material/table_rows:", url_path="features"),
        st.Page("views/feature.py", title="Feature", icon=":material/bar_chart:", url_path="feature"),
        st.Page("views/prompt.py", title="Prompt", icon=":material/text_fields:", url_path="prompt"),
        st.Page("views/steer.py", title="Steer", icon=":material/tune:", url_path="steer"),
        st.Page("views/error.py", title="Error", icon=":material/blur_on:", url_path="error"),
        st.Page("views/circuits.py", title="Circuits", icon=":material/account_tree:", url_path="circuits"),
        st.Page("views/compare.py", title="Compare", icon=":material/compare_arrows:", url_path="compare"),
        st.Page("views/train.py", title="Train", icon=":material/show_chart:", url_path="train"),
    ]
)
begin()
try:
    page.run()
finally:
    end()
