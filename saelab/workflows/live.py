"""The live side of the browser: a model and its SAE, loaded once, answering for texts that people type."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saelab.core.errors import ConfigError
from saelab.features.html import legend_html, shown, tokens_html
from saelab.features.store import FeatureStore
from saelab.features.vocabulary import token_bytes

if TYPE_CHECKING:
    import pandas as pd

    from saelab.analysis.dark_matter.prompt import PromptError
    from saelab.analysis.prompt import Reading
    from saelab.analysis.steering import Decoding, Edit
    from saelab.core.regression import LinearMap
    from saelab.features.protocols import Dictionary
    from saelab.features.query import Context


class Live:
    """A model and an SAE. Calls from several threads wait for each other: a steered model is steered for one caller."""

    def __init__(self, model: Any, sae: "Dictionary", site: str, bos: bool = True) -> None:
        self.model, self.sae, self.site, self.bos = model, sae, site, bos
        self._pieces = token_bytes(model)
        self._lock = threading.RLock()

    def pieces(self, ids: Sequence[int]) -> list[bytes]:
        """Bytes of some tokens."""
        return [self._pieces[i] for i in ids]

    def read(self, text: str) -> "Reading":
        """Run a text through the model and the SAE. Raises :class:`TextError`."""
        from saelab.analysis.prompt import kept, read_prompt, tokenise

        with self._lock:
            tokens = tokenise(self.model, text, self.bos)
            return read_prompt(self.model, self.sae, self.site, tokens, kept(self.model, tokens))

    def one_token(self, text: str) -> int:
        """Return the token that a text is. Raises :class:`ConfigError` naming the tokens when it is several."""
        ids = list(self.model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []
        if len(ids) != 1:
            parts = ", ".join(self.token_text(i) for i in ids[:8])
            raise ConfigError(
                f"a direction needs exactly one token, the text is {len(ids)}{': ' + parts if parts else ''}; "
                "mind the space before a word"
            )
        return int(ids[0])

    def token_vector(self, token: int, kind: str) -> np.ndarray:
        """Return the direction of a token in the residual stream: ``unembedding`` reads it, ``embedding`` writes it.

        Raises :class:`ConfigError` for a site that is not in the residual stream.
        """
        from saelab.features.weights import unembedding

        if kind not in ("unembedding", "embedding"):
            raise ConfigError(f"the kind of direction is '{kind}', expected 'unembedding' or 'embedding'")
        d_out = int(self.sae.W_dec.shape[1])
        with self._lock:
            to_logits = unembedding(self.model, self.site, d_out)
            if to_logits is None:
                raise ConfigError(f"{self.site} is not in the residual stream; tokens have no direction there")
            vector = to_logits[:, token] if kind == "unembedding" else self.model.bridge.W_E[token].detach().float()
        result: np.ndarray = vector.cpu().numpy()
        return result

    def texts(self, reading: "Reading") -> list[str]:
        """Return the tokens of a prompt as they are shown."""
        return [how.text or how.rest for how in shown(self.pieces(reading.tokens.tolist()))]

    def features(
        self, reading: "Reading", store: FeatureStore | None, position: int | None, by: str, n: int = 50
    ) -> "pd.DataFrame":
        """Return the features of a prompt, or of one of its tokens, strongest first by ``value`` or ``surprise``.

        For the whole prompt a feature appears once, at the token where it is strongest by that measure. Columns:
        ``feature``, ``position``, ``value`` and, with a store, ``relative``, ``density``, ``surprise``.
        """
        columns = {} if store is None else {"density": store.column("density"), "maximum": store.column("max")}
        frame = reading.to_frame(**columns, n_kept=1 if store is None else store.n_kept)
        if by not in frame:
            raise ConfigError(f"cannot sort by '{by}'; give one of value, surprise (which needs a feature store)")
        if position is not None:
            frame = frame[frame["position"] == position]
        frame = frame.sort_values([by, "feature"], ascending=[False, True], kind="stable")
        if position is None:
            frame = frame.drop_duplicates("feature")
        return frame.head(n).reset_index(drop=True)

    def compare(self, first: "Reading", second: "Reading", store: FeatureStore | None, n: int = 50) -> "pd.DataFrame":
        """Return the features whose largest activations in two prompts differ most, the largest difference first.

        Columns: ``feature``, ``first`` and ``second`` (largest activation in each), ``difference`` (second - first)
        and, with a store, ``relative``: difference over the feature's maximum there; its size gives the order.
        """
        import pandas as pd

        peaks = np.zeros((2, int(self.sae.d_sae)), np.float32)
        for peak, reading in zip(peaks, (first, second), strict=True):
            np.maximum.at(peak, reading.code.indices.numpy(), reading.code.values.numpy())
        active = np.flatnonzero(peaks.max(0) > 0)
        here, there = peaks[0, active], peaks[1, active]
        frame = pd.DataFrame({"feature": active, "first": here, "second": there, "difference": there - here})
        size = frame["difference"].abs()
        if store is not None:
            most = np.asarray(store.column("max"))[active]
            # A feature never seen in the store has nothing to be measured by but itself.
            frame["relative"] = frame["difference"] / np.where(most > 0, most, np.maximum(here, there))
            size = frame["relative"].abs()
        order = np.lexsort((frame["feature"], -size))
        return frame.iloc[order].head(n).reset_index(drop=True)

    def loss_effects(self, reading: "Reading", features: Sequence[int]) -> np.ndarray:
        """Rise of each token's loss (nats) when one feature is taken out: (features, tokens), exact."""
        from saelab.analysis.prompt import ablation_effects

        with self._lock:
            return ablation_effects(self.model, self.sae, self.site, reading, features)

    def context_effects(self, store: FeatureStore, contexts: Sequence["Context"]) -> list[np.ndarray]:
        """Rise of the loss (nats) of each token of each context when its feature is taken out of the row up to there.

        The model reads each row of text from its beginning, so what the context does not show counts too; nan at the
        first token of a row, which nothing predicts.
        """
        import torch

        from saelab.analysis.prompt import ablation_effects, kept, read_prompt

        effects = []
        with self._lock:
            for context in contexts:
                first = context.start + context.peak - context.position
                ids = store.token_ids(first, context.start + len(context.token_ids))
                tokens = torch.from_numpy(ids.astype(np.int64))
                reading = read_prompt(self.model, self.sae, self.site, tokens, kept(self.model, tokens))
                (effect,) = ablation_effects(self.model, self.sae, self.site, reading, [context.feature])
                effects.append(effect[context.start - first :])
        return effects

    def logit_weights(self, feature: int) -> np.ndarray | None:
        """What a feature's direction adds to the logit of every token."""
        from saelab.analysis.prompt import logit_weights

        with self._lock:
            return logit_weights(self.model, self.sae, self.site, feature)

    def feature_html(self, reading: "Reading", feature: int, maximum: float | None = None) -> str:
        """Return the prompt in the colours of one feature, with its scale."""
        values = reading.feature(feature)
        top = maximum or float(values.max(initial=0.0)) or 1.0
        return legend_html(top, f"activation of feature {feature}") + self._html(reading, values, top)

    def signed_html(self, reading: "Reading", values: np.ndarray, label: str) -> str:
        """Return the prompt in two colours, for values above and below 0, with their scale."""
        finite = np.nan_to_num(values)
        top = float(np.abs(finite).max(initial=0.0)) or 1.0
        return legend_html(top, label, signed=True) + self._html(reading, finite, top)

    def unexplained_html(self, reading: "Reading") -> str:
        """Return the prompt coloured by the share of each activation that the SAE leaves unexplained."""
        values = np.nan_to_num(reading.unexplained)
        return legend_html(1.0, "share of the activation's square norm not reconstructed") + self._html(
            reading, values, 1.0
        )

    def error_of(self, text: str, linear: "LinearMap") -> "PromptError":
        """Split the SAE's error at each token of a text by a linear map of a dark-matter result."""
        from saelab.analysis.dark_matter.prompt import error_of_prompt

        with self._lock:
            return error_of_prompt(self.model, self.sae, text, site=self.site, linear=linear, bos=self.bos)

    def values_html(self, ids: Sequence[int], values: np.ndarray, maximum: float, label: str) -> str:
        """Return some tokens in the colours of a number each, with their scale; nan has no colour."""
        hover = [f"position {k}" for k in range(len(ids))]
        body = tokens_html(self.pieces(ids), np.nan_to_num(values), maximum, hover=hover)
        return legend_html(maximum, label) + f'<div class="sl"><div class="x">{body}</div></div>'

    def _html(self, reading: "Reading", values: np.ndarray, maximum: float) -> str:
        pieces = self.pieces(reading.tokens.tolist())
        hover = [
            f"position {k}" + ("" if np.isnan(loss) else f"\nloss {loss:.3f} nats")
            for k, loss in enumerate(reading.loss.tolist())
        ]
        body = tokens_html(pieces, values, maximum, hover=hover)
        return f'<div class="sl"><div class="x">{body}</div></div>'

    def steer(self, text: str, edits: Sequence["Edit"], positions: str, decoding: "Decoding") -> "Steered":
        """Let the model go on from a text, as it is and steered, with the same seed."""
        from saelab.analysis.prompt import kept, tokenise
        from saelab.analysis.steering import Steering, generate, identities, next_token_effect

        with self._lock:
            tokens = tokenise(self.model, text, self.bos)
            steering = Steering(self.sae, self.site, tuple(edits), positions)
            # The prompt's own next token is what is compared: of "generated" positions there are none yet.
            at = "all" if positions == "generated" else positions
            now = Steering(self.sae, self.site, tuple(edits), at)
            default = generate(self.model, tokens, decoding)
            steered = generate(self.model, tokens, decoding, steering)
            effect = next_token_effect(self.model, tokens, kept(self.model, tokens), now)
            checks = identities(self.model, self.sae, self.site, tokens, edits[0].feature) if edits else {}
        same = next(
            (
                k
                for k, pair in enumerate(zip(default.tokens.tolist(), steered.tokens.tolist(), strict=False))
                if pair[0] != pair[1]
            ),
            min(len(default.tokens), len(steered.tokens)),
        )
        return Steered(
            default=self._text(default.tokens.tolist(), default.n_prompt, same),
            steered=self._text(steered.tokens.tolist(), steered.n_prompt, same),
            identical=default.tokens.tolist() == steered.tokens.tolist(),
            effect=effect,
            effect_texts=[self.token_text(i) for i in effect["token"].head(30)],
            checks=checks,
        )

    def token_text(self, token: int) -> str:
        """Return one token as it is shown, in quotation marks."""
        (how,) = shown(self.pieces([int(token)]))
        return f"“{how.text or how.rest}”"

    def _text(self, ids: list[int], n_prompt: int, same: int) -> str:
        """Return a text as HTML: prompt plain, what was written marked from where the two texts part."""
        values = np.array([0.0 if k < max(n_prompt, same) else 1.0 for k in range(len(ids))], np.float32)
        hover = ["prompt" if k < n_prompt else "written" for k in range(len(ids))]
        body = tokens_html(self.pieces(ids), values, 3.0, hover=hover)
        return f'<div class="sl"><div class="x">{body}</div></div>'


@dataclass(frozen=True, eq=False)
class Steered:
    """What steering did."""

    default: str
    """The model's own text as HTML; tokens after the two texts part are marked."""
    steered: str
    """The steered text as HTML, likewise."""
    identical: bool
    """Whether both texts are the same."""
    effect: "pd.DataFrame"
    """Change of the next token's probabilities, see :func:`saelab.analysis.steering.next_token_effect`."""
    effect_texts: list[str]
    """Texts of its first tokens."""
    checks: dict[str, float]
    """Largest change made by edits that must change nothing, see :func:`saelab.analysis.steering.identities`."""


def open_live(sae: Path, device: str = "cpu") -> Live:
    """Load an SAE and the model it was trained on. Raises :class:`ModelError`, :class:`ConfigError` and the like."""
    from saelab.models.subject import load_model
    from saelab.sae.folder import load_meta, load_sae

    recorded = load_meta(sae).get("provenance", {})
    for key in ("model", "site"):
        if not recorded.get(key):
            raise ConfigError(f"{sae} does not record its {key}, so the browser cannot run it; train with saelab train")
    dictionary = load_sae(sae, device=device)
    model = load_model(
        str(recorded["model"]), recorded.get("dtype", "float32"), device, revision=recorded.get("revision")
    )
    if recorded.get("model_fingerprint", model.fingerprint) != model.fingerprint:
        raise ConfigError(
            f"{sae} was trained on {recorded['model']} with fingerprint {recorded['model_fingerprint']}, but that "
            f"model now has {model.fingerprint}; train the SAE again on this model"
        )
    bos = recorded.get("tokens", {}).get("bos", "auto") != "never"
    return Live(model, dictionary, str(recorded["site"]), bos)
