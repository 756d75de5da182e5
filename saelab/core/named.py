"""Names that may carry what they name: a job holds a model's name, and, in Python, perhaps the open model itself.

Jobs are plain data (YAML, the command line, ``config.yaml`` beside a result), so what they work on has a text for a
name: a folder, a hub id. In a notebook the model is open already. ``Named`` is that text with the object beside it;
whatever opens a name (``load_model``, ``load_sae``, ``open_text``) gives the object back instead of opening it again.
"""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import WrapValidator


class Named(str):
    """A name and the object it stands for; written to a file, it is the name."""

    thing: Any

    def __new__(cls, name: str, thing: Any) -> "Named":
        """Name ``thing``."""
        made = super().__new__(cls, name)
        made.thing = thing
        return made

    def __deepcopy__(self, memo: Any) -> "Named":
        return self

    def __copy__(self) -> "Named":
        return self


def opened(name: Any) -> Any:
    """Return the object that a name carries; the name itself when it is just a name."""
    return name.thing if isinstance(name, Named) else name


def _keep(value: Any, handler: Callable[[Any], Any]) -> Any:
    """Pydantic would make a plain text of it."""
    return value if isinstance(value, Named) else handler(value)


Ref = Annotated[str, WrapValidator(_keep)]
"""Type of a job's key that names something which may be open already."""
