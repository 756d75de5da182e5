"""The keys that every job with a model and a text shares, and how they become objects."""

from typing import TYPE_CHECKING, Any, Literal

from saelab.core.config import Config
from saelab.core.named import Ref
from saelab.models.tokens import TokensConfig

if TYPE_CHECKING:
    from saelab.models.subject import SubjectModel
    from saelab.models.tokens import TokenRows


class ModelJob(Config):
    """Which subject model, and how to load it."""

    model: Ref = "embedded"
    """Subject model: 'embedded', a Hugging Face id, or a local folder."""
    revision: str | None = None
    """Revision of a Hugging Face model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype the model runs in; the store keeps it."""
    device: str = "cpu"
    """Torch device of the model."""

    def load(self) -> "SubjectModel":
        """Load the subject model."""
        from saelab.models.subject import load_model

        return load_model(self.model, dtype=self.dtype, device=self.device, revision=self.revision)


class CorpusJob(ModelJob):
    """A model and the text it reads."""

    text: Ref = "stdlib:train"
    """Text: a file, a folder, .jsonl, .parquet, 'hf:owner/name', 'stdlib:train' or 'stdlib:heldout'."""
    column: str = "text"
    """Column that holds the text in .jsonl, .parquet and Hugging Face datasets."""
    tokens: TokensConfig = TokensConfig()
    """How the text becomes rows of tokens."""

    def rows(self, model: "SubjectModel") -> "TokenRows":
        """Open the text and cut it into rows for ``model``."""
        from saelab.models.text import open_text
        from saelab.models.tokens import TokenRows

        return TokenRows(model.tokenizer, open_text(self.text, column=self.column), self.tokens, model.n_ctx)


def provenance(job: ModelJob, model: "SubjectModel") -> dict[str, Any]:
    """What a result folder records about the model it came from."""
    return {"model": job.model, "model_fingerprint": model.fingerprint, "revision": job.revision, "dtype": job.dtype}
