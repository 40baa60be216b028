"""Where the frozen backbones are, how they are loaded, and how a wrong one is recognised."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging
from transformers.utils.hub import cached_file, extract_commit_hash

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")
SIDES = ("audio", "text")


def backbones_folder() -> Path:
    """Folder of the converted pip-hosted backbones: `$DUAL_SLM_CACHE`, else `dual_slm/backbones` in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DUAL_SLM_CACHE") or Path(cache) / "dual_slm" / "backbones")


def resolve_backbone(model_id: str) -> str:
    """Maps the name of a pip-hosted backbone to its folder. A local folder or a Hub id is returned unchanged.

    Raises:
        OSError: the name is neither a folder, a Hub id, nor a backbone that was fetched.
    """
    if os.path.isdir(model_id):
        return model_id
    converted = backbones_folder() / model_id
    if (converted / "config.json").is_file():
        return str(converted)
    if "/" not in model_id:
        raise OSError(
            f"The backbone {model_id!r} is neither a folder nor in {backbones_folder()}. It is hosted on the Python "
            f"package index: run `dual-slm backbones {model_id}` once (pip install -e . in a checkout of the repository)."
        )
    return model_id


@contextmanager
def name_in_errors(model_id) -> Iterator[None]:
    """Adds the name of the model to errors of transformers, which do not always tell what was asked for."""
    try:
        yield
    except OSError as error:
        if "use_safetensors" in str(error):
            raise OSError(
                f"{model_id} has no safetensors, and backbones are never read from pickles. Convert it once: "
                f"AutoModel.from_pretrained({model_id!r}).save_pretrained(FOLDER), its feature extractor or tokenizer too, "
                "and name the folder."
            ) from error
        if str(model_id) in str(error):
            raise
        raise OSError(f"{model_id} could not be loaded: {error}") from error


def resolve_commit(model_id: str, revision: str | None, **hub_kwargs) -> str | None:
    """The commit that a branch or tag of a Hub repository points to; `None` for a folder."""
    with name_in_errors(model_id):
        file = cached_file(resolve_backbone(model_id), "config.json", revision=revision, **hub_kwargs)
        return extract_commit_hash(file, None)


def fingerprint(model_id: str, revision: str | None = None, **hub_kwargs) -> str:
    """Hash over the names, shapes, types and sampled values of a backbone's safetensors.

    Three rows of each tensor are read, so a 7B model takes a second. The hash does not depend on sharding, file order,
    or the dtype and quantisation that the model is loaded with.

    Raises:
        OSError: the backbone has no safetensors. Pickles are never read.
    """

    def locate(name: str) -> str | None:
        options = {"_raise_exceptions_for_missing_entries": False, "revision": revision, **hub_kwargs}
        return cached_file(model_id, name, **options)

    index = locate("model.safetensors.index.json")
    if index is not None:
        files = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    lines = []
    for name in files:
        path = locate(name)
        if path is None:
            raise OSError(f"{model_id} has no {name}. Backbones are read from safetensors only, never from pickles.")
        with safe_open(path, framework="pt") as tensors:
            lines += [_sample_tensor(tensors, key) for key in tensors.keys()]  # noqa: SIM118 (not a dict)
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _sample_tensor(tensors, key: str) -> str:
    """Name, shape, type and a hash of the first, middle and last row of one tensor."""
    part = tensors.get_slice(key)
    shape = part.get_shape()
    rows = sorted({0, shape[0] // 2, shape[0] - 1}) if len(shape) > 1 else [slice(None)]
    sample = [part[row] if shape else tensors.get_tensor(key) for row in rows]
    data = b"".join(s.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for s in sample)
    return f"{key} {shape} {part.get_dtype()} {hashlib.sha256(data).hexdigest()}"


@dataclass(frozen=True)
class BackboneSource:
    """Where one backbone comes from: a Hub id, a folder or a pip-hosted name, and its commit on the Hub."""

    model_id: str
    revision: str | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig, side: str) -> "BackboneSource":
        """The `side` ("audio" or "text") backbone that a checkpoint's config names."""
        return cls(getattr(config, f"{side}_model_id"), getattr(config, f"{side}_model_revision"))

    def fingerprint(self, **hub_kwargs) -> str:
        return fingerprint(resolve_backbone(self.model_id), self.revision, **hub_kwargs)


def load_backbones(
    audio: BackboneSource, text: BackboneSource, options: dict, ears_only: bool = False
) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedConfig]:
    """Loads both backbones by their own `from_pretrained`.

    Args:
        ears_only: of the LLM, load the embedding matrix alone.
        options: `dtype`, `device_map`, `quantization_config`, `attn_implementation` and Hub options; `None` is left out.

    Returns:
        The speech encoder, the LLM, and the config of the model that the encoder is a part of.
    """
    options = {name: value for name, value in options.items() if value is not None} | {"use_safetensors": True}
    with name_in_errors(text.model_id):
        source = resolve_backbone(text.model_id)
        load = _load_embeddings if ears_only else AutoModelForCausalLM.from_pretrained
        language_model = load(source, revision=text.revision, **options)
    options.pop("quantization_config", None)  # the encoder is small, and the adapters know its exact features
    place = language_model.get_input_embeddings().weight.device
    if isinstance(options.get("device_map"), str) and place.type != "meta":
        options["device_map"] = {"": place}  # the encoder's layers are called one by one, so it stays in one place
    with name_in_errors(audio.model_id):
        model = AutoModel.from_pretrained(resolve_backbone(audio.model_id), revision=audio.revision, **options)
    audio_tower = model.get_encoder() if model.config.is_encoder_decoder else model
    return audio_tower, language_model, model.config


def _load_embeddings(source: str, **options) -> PreTrainedModel:
    """An LLM without layers and head, so that transformers reads its embedding matrix alone."""
    hub_kwargs = {name: options[name] for name in (*HUB_OPTIONS, "revision") if name in options}
    config = AutoConfig.from_pretrained(source, **hub_kwargs).get_text_config(decoder=True)
    config.num_hidden_layers = 0
    if getattr(config, "layer_types", None):
        config.layer_types = []
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # pyright: ignore
    options.pop("quantization_config", None)
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it would list every weight that is not read
    try:
        return AutoModel.from_pretrained(source, config=config, **options)
    finally:
        logging.set_verbosity(level)


def refuse_other_backbone(config: PreTrainedConfig, side: str, hub_kwargs: dict) -> None:
    """Compares a backbone with the fingerprint in the config; a config without one accepts any.

    Raises:
        ValueError: the adapters were trained with another backbone.
    """
    expected = getattr(config, f"{side}_model_fingerprint")
    if expected is None:
        return
    source = BackboneSource.of(config, side)
    actual = source.fingerprint(**hub_kwargs)
    if actual != expected:
        other = "move them by `dual-slm port` if you mean this LLM" if side == "text" else "train new ones"
        raise ValueError(
            f"{source.model_id} is not the {side} backbone that these adapters were trained with: its fingerprint is "
            f"{actual[:16]}…, the config says {expected[:16]}…. Load the original (revision {source.revision}; "
            f"`dual-slm backbones` for the pip-hosted ones), or {other}."
        )


def refuse_wrong_keys(name, missing=(), unexpected=(), mismatched=()) -> None:
    """Compares the tensors of a checkpoint with those that its config asks for.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape.
    """
    problems = []
    for kind, found in (("missing", missing), ("unexpected", unexpected), ("mismatched", mismatched)):
        keys = sorted(str(key) for key in found)
        if keys:
            shown = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
            problems.append(f"{kind} keys: {shown}")
    if problems:
        raise ValueError(
            f"the adapters in {name} do not fit its config.json ({'; '.join(problems)}). Weights and config must come "
            "from the same save_pretrained; nothing was loaded."
        )
