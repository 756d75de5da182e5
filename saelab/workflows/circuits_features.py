"""Feature circuits, attention features and attribution graphs: SAE folders and a task or prompt in, a result out."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from saelab.core.config import Config
from saelab.core.errors import ConfigError
from saelab.core.named import Ref
from saelab.workflows.circuits import open_model

if TYPE_CHECKING:
    from saelab.analysis.circuits.attribution.graph import AttributionGraph
    from saelab.analysis.circuits.explained import AttentionExplanation
    from saelab.analysis.circuits.features.circuit import FeatureCircuit


class FeaturesJob(Config):
    """What ``saelab circuits features`` needs."""

    saes: list[Ref] = Field(min_length=1)
    """SAE folders, one for each site; each knows its site and model."""
    task: str = Field()
    """Task of data/tasks, a YAML file of that form, or a prompt file."""
    model: Ref | None = None
    """Model, if not the one recorded in the SAEs."""
    device: str = "cpu"
    """Torch device."""
    n: int = Field(default=32, ge=2)
    """Prompt pairs to find the circuit on."""
    n_heldout: int = Field(default=32, ge=2)
    """Unseen prompt pairs to judge it on."""
    metric: Literal["logit_diff", "logit_margin", "prob_diff", "nll"] | None = None
    """Metric; null: the task's own."""
    patch: Literal["corrupted", "zero"] = "corrupted"
    """What a node is replaced by: its value on the corrupted prompt, or 0."""
    method: Literal["atp", "ig"] = "ig"
    """Effects by the gradient at the clean run, or averaged on the way to the other values."""
    steps: int = Field(default=10, gt=0)
    """Midpoints of ig."""
    aggregation: Literal["sum", "none"] = "sum"
    """Positions summed, or apart (prompts must then have one length)."""
    errors: Literal["circuit", "keep", "remove"] = "circuit"
    """SAE errors: nodes like any, always kept, or never."""
    threshold: float = Field(default=0.05, gt=0)
    """Nodes shown: at least this share of the largest effect."""
    edge_threshold: float = Field(default=0.01, ge=0)
    """Edges shown: at least this share of the largest effect."""
    n_exact: int = Field(default=20, ge=0)
    """Largest nodes whose effect is also measured by running the model."""
    features: list[str] = Field(default_factory=list)
    """Feature stores of the SAEs, for the tokens that features speak for."""
    seed: int = 0
    """Of the prompts and the random circuits."""


class AttentionJob(Config):
    """What ``saelab circuits attention`` needs."""

    sae: Ref = Field()
    """SAE folder at a site blocks.N.attn.hook_z."""
    feature: int = Field(ge=0)
    """The feature."""
    prompt: str = Field(min_length=1)
    """Text that it fires on."""
    position: int | None = None
    """Token to explain; null: where the feature's pre-activation is largest."""
    others: list[Ref] = Field(default_factory=list)
    """Further attention SAEs and transcoders, for the tree below."""
    depth: int = Field(default=2, ge=1)
    """Levels of attention features in the tree."""
    model: Ref | None = None
    """Model, if not the one recorded in the SAE."""


class GraphJob(Config):
    """What ``saelab circuits graph`` needs."""

    transcoders: list[Ref] = Field(min_length=1)
    """Transcoder folders, one for each layer's MLP."""
    prompt: str = Field(min_length=1)
    """Text whose next token is explained."""
    model: Ref | None = None
    """Model, if not the one recorded in the transcoders."""
    device: str = "cpu"
    """Torch device."""
    logit_share: float = Field(default=0.95, gt=0, le=1)
    """Fewest logits that hold this much probability are explained."""
    most_logits: int = Field(default=10, ge=1)
    """But no more than these."""
    most_features: int = Field(default=4000, ge=0)
    """Features whose inputs are traced, by influence."""
    node_threshold: float = Field(default=0.8, gt=0, le=1)
    """Share of the influence that the kept nodes hold."""
    edge_threshold: float = Field(default=0.98, gt=0, le=1)
    """Share of the influence that the kept edges hold."""
    features: list[str] = Field(default_factory=list)
    """Feature stores of the transcoders, for the tokens that features speak for."""


def open_saes(folders: list[str], model: str | None, device: str) -> tuple[Any, list[tuple[Any, Mapping[str, Any]]]]:
    """Load SAEs and the one model that they were trained on: (model, [(sae, provenance)])."""
    from saelab.sae.folder import load_meta, load_sae

    loaded = [(load_sae(path, device=device), load_meta(path).get("provenance", {})) for path in folders]
    names = {str(p["model"]) for _, p in loaded if "model" in p}
    if model is None and len(names) != 1:
        known = ", ".join(sorted(names)) or "no model"
        raise ConfigError(f"the SAEs record {known}, expected one and the same model; give --model")
    opened = open_model(model or names.pop(), device)
    for path, (_, provenance) in zip(folders, loaded, strict=True):
        recorded = provenance.get("model_fingerprint", opened.fingerprint)
        if recorded != opened.fingerprint:
            raise ConfigError(
                f"{path} was trained on a model with fingerprint {recorded}, {opened.name} has {opened.fingerprint}"
            )
        if "site" not in provenance:
            raise ConfigError(f"{path} does not record its site; train it with saelab, or import it with --site")
    return opened, loaded


def run_features(job: FeaturesJob, out: str | Path | None = None, *, force: bool = False) -> "FeatureCircuit":
    """Find a feature circuit; with ``out`` also written as a folder of kind ``circuit``."""
    from saelab.analysis.circuits.features.circuit import find_feature_circuit
    from saelab.analysis.circuits.features.effects import FeatureRunner
    from saelab.analysis.circuits.nodes import SiteDictionary, in_order
    from saelab.analysis.circuits.tasks import load_task, task_batch
    from saelab.core.artifacts import check_output

    if out is not None:
        check_output(out, force=force)
    model, loaded = open_saes(job.saes, job.model, job.device)
    dictionaries = in_order(
        model, [SiteDictionary(p["site"], sae.requires_grad_(False), model.width(p["site"])) for sae, p in loaded]
    )
    is_file = Path(job.task).suffix in (".csv", ".json", ".jsonl")
    metric = job.metric or ("logit_diff" if is_file else load_task(job.task).metric)
    batches = (
        task_batch(job.task, model, job.n, job.seed, "train"),
        task_batch(job.task, model, job.n_heldout, job.seed, "heldout"),
    )
    runners = [FeatureRunner(model, dictionaries, batch, metric, job.patch) for batch in batches]
    circuit = find_feature_circuit(
        runners[0],
        runners[1],
        method=job.method,
        steps=job.steps,
        aggregation=job.aggregation,
        errors=job.errors,
        threshold=job.threshold,
        edge_threshold=job.edge_threshold,
        n_exact=job.n_exact,
        seed=job.seed,
    )
    if out is not None:
        save_feature_circuit(circuit, out, top_tokens(job.features), force=force)
    return circuit


def save_feature_circuit(
    circuit: Any, folder: str | Path, tokens: Mapping[str, list[str]], *, force: bool = False
) -> Path:
    """Write ``circuit.json``, ``report.html`` and a manifest of kind ``circuit`` (content ``features``)."""
    from saelab.analysis.circuits.features.figure import feature_figure, feature_report
    from saelab.analysis.circuits.figure import write_pages
    from saelab.core.artifacts import prepare_output, write_json, write_manifest

    def describe(site: str, index: int) -> str:
        names = tokens.get(site, [])
        return names[index] if index < len(names) else ""

    folder = prepare_output(folder, force=force)
    data = circuit.to_dict()
    if tokens:
        data["nodes"] = [
            {**shown, "tokens": "" if n.address.index == "error" else describe(n.address.site, n.address.index)}
            for shown, n in zip(data["nodes"], circuit.nodes, strict=True)
        ]
    write_json(folder / "circuit.json", data)
    about = describe if tokens else None
    write_pages(folder, feature_report(circuit, about), feature_figure(circuit, about)[0])
    keys = ("model", "task", "sites", "method", "metric", "patch", "errors", "threshold", "n_prompts", "n_heldout")
    write_manifest(folder, "circuit", {"content": "features", **{key: data[key] for key in keys}})
    return folder


def top_tokens(stores: list[str], n: int = 3) -> dict[str, list[str]]:
    """For each site with a feature store, what the features' strongest contexts peak on, as text."""
    from saelab.features.query import top_contexts
    from saelab.features.store import open_features

    found: dict[str, list[str]] = {}
    for path in stores:
        store = open_features(path)
        texts = []
        for feature in range(store.n_features):
            contexts = top_contexts(store, feature, n)
            peaks = dict.fromkeys(context.tokens[context.peak] for context in contexts)
            texts.append(" ".join(repr(peak) for peak in peaks))
        found[str(store.manifest.get("site", ""))] = texts
    return found


def run_attention(job: AttentionJob) -> "AttentionExplanation":
    """Explain a feature of an attention SAE at one token: heads, source positions, tree."""
    import torch

    from saelab.analysis.circuits.attention import (
        attention_layer,
        constant,
        head_activation,
        head_weights,
        layer_states,
        source_attribution,
        top_sources,
    )
    from saelab.analysis.circuits.explained import AttentionExplanation
    from saelab.analysis.circuits.tree import TreeBuilder
    from saelab.analysis.prompt import tokenise
    from saelab.models.components import Components

    model, loaded = open_saes([job.sae, *job.others], job.model, "cpu")
    sae, provenance = loaded[0]
    layer = attention_layer(provenance["site"])
    if job.feature >= sae.d_sae:
        raise ConfigError(f"feature is {job.feature}, the SAE has {sae.d_sae} (0 to {sae.d_sae - 1})")
    parts, tokens = Components(model), tokenise(model, job.prompt)[None]
    attention = {attention_layer(p["site"]): s for s, p in loaded if s.config.architecture != "transcoder"}
    transcoders = {mlp_layer(p): transcoder_site(s, p) for s, p in loaded if s.config.architecture == "transcoder"}
    with torch.no_grad():
        state = layer_states(parts, tokens)[layer]
        terms = source_attribution(state, sae, job.feature)
        pre = terms.sum((0, 3))[0] + constant(sae, job.feature)
        position = int(pre.argmax()) if job.position is None else job.position
        if not 0 <= position < tokens.shape[1]:
            raise ConfigError(f"position is {position}, the prompt has {tokens.shape[1]} tokens")
        by_head = head_activation(state, sae, job.feature, parts.n_heads)[0, position]
        tree = TreeBuilder(parts, tokens, attention, transcoders).latent(layer, position, job.feature, job.depth)
    texts = [model.tokenizer.decode([t]) for t in tokens[0].tolist()]
    sources = top_sources(terms, 0, position).head(12)
    shares = head_weights(sae, parts.n_heads)[job.feature].tolist()
    return AttentionExplanation(
        feature=job.feature,
        site=str(provenance["site"]),
        tokens=tuple(texts),
        position=position,
        pre_activation=float(pre[position]),
        heads=tuple(
            {"head": f"{layer}.{h}", "weights": shares[h], "activation": float(by_head[h])}
            for h in range(parts.n_heads)
        ),
        sources=tuple(
            {
                "head": f"{layer}.{int(r.head)}",
                "source": int(r.source),
                "token": texts[int(r.source)],
                "term": float(r.term),
            }
            for r in sources.itertuples()
        ),
        tree=tree.to_dict(),
        tree_lines=tuple(tree.lines()),
    )


def mlp_layer(provenance: Mapping[str, Any]) -> int:
    """Layer of a transcoder's MLP, by the site it reads; :class:`ConfigError` when that is no MLP's input."""
    import re

    site = str(provenance.get("site", ""))
    found = re.match(r"blocks\.(\d+)\.(ln2\.hook_out|ln2\.hook_normalized|hook_resid_mid)$", site)
    if found is None:
        raise ConfigError(
            f"a transcoder reads {site or 'an unknown site'}; expected an MLP's input, blocks.N.ln2.hook_out (or "
            "ln2.hook_normalized, hook_resid_mid), and blocks.N.hook_mlp_out as its target"
        )
    return int(found[1])


def transcoder_site(transcoder: Any, provenance: Mapping[str, Any]) -> Any:
    """A transcoder with what it reads, by its recorded site."""
    from saelab.analysis.circuits.attribution.frozen import TranscoderSite

    end = str(provenance["site"]).rpartition(".")[2]
    reads = {"hook_out": "normalised", "hook_normalized": "standardised"}.get(end, "residual")
    return TranscoderSite(transcoder.requires_grad_(False), reads)  # type: ignore[arg-type]


def run_graph(job: GraphJob, out: str | Path | None = None, *, force: bool = False) -> "AttributionGraph":
    """Attribution graph of a prompt; with ``out`` also written as a folder of kind ``circuit``."""
    from saelab.analysis.circuits.attribution.export import save_graph
    from saelab.analysis.circuits.attribution.graph import attribution_graph
    from saelab.analysis.prompt import tokenise
    from saelab.core.artifacts import check_output
    from saelab.models.components import Components

    if out is not None:
        check_output(out, force=force)
    model, loaded = open_saes(job.transcoders, job.model, job.device)
    sites: dict[int, Any] = {}
    for path, (transcoder, provenance) in zip(job.transcoders, loaded, strict=True):
        if transcoder.config.architecture != "transcoder":
            raise ConfigError(
                f"{path} is a {transcoder.config.architecture} SAE; an attribution graph needs transcoders"
            )
        sites[mlp_layer(provenance)] = transcoder_site(transcoder, provenance)
    graph = attribution_graph(
        Components(model),
        tokenise(model, job.prompt).to(model.device),
        sites,
        prompt=job.prompt,
        logit_share=job.logit_share,
        most_logits=job.most_logits,
        most_features=job.most_features,
        node_threshold=job.node_threshold,
        edge_threshold=job.edge_threshold,
    )
    if out is not None:
        tokens = {mlp_layer({"site": site}): texts for site, texts in top_tokens(job.features).items()}
        describe = (lambda layer, i: tokens[layer][i] if layer in tokens else "") if tokens else None
        save_graph(graph, out, job.prompt, describe, force=force)
    return graph
