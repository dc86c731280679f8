"""Reads and writes adapter folders. Their format is PEFT's; there is no other.

The keys of `adapter_model.safetensors` are a prefix and this package's own parameter
paths, so nothing is renamed or transposed in either direction.
"""

import dataclasses
import json
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from interviewmate_mlx.adapter import mlx_lm
from interviewmate_mlx.adapter.card import CARD_FILE, CHAT_TEMPLATE_FILE, rename_base
from interviewmate_mlx.adapter.config import (
    CONFIG_FILE,
    MERGE_HINT,
    AdapterConfig,
    is_mlx_lm,
    read_content,
    read_peft_config,
)
from interviewmate_mlx.data.templates import PLAIN, VERBATIM, Template, Tokenizer, own_template
from interviewmate_mlx.errors import AdapterError, WeightsError, brief, list_faults
from interviewmate_mlx.files import atomic_file, atomic_folder, is_empty_folder
from interviewmate_mlx.formats.cast import FLOAT_DTYPES, cast
from interviewmate_mlx.formats.links import refuse_outside_links
from interviewmate_mlx.formats.safetensors_file import (
    SafetensorsHeader,
    TensorEntry,
    load_tensors,
    read_safetensors_header,
    save_tensors,
)
from interviewmate_mlx.model.dora import place_dora
from interviewmate_mlx.model.lora import (
    bias_shapes,
    linear_paths,
    place_lora,
    shape_of,
    train_biases,
)
from interviewmate_mlx.model.tree import named_arrays

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
RUN_FILE = "run.toml"
_SUMMARY_FILE = "summary.json"
# In the metadata of WEIGHTS_FILE.
_BASE_KEY = "base_weights"
_TEMPLATE_KEY = "template"
_JINJA_KEY = "chat_template"
# The templates that need no text in the metadata, by their names there.
_NAMED_TEMPLATES = {"questions": PLAIN, "verbatim": VERBATIM}
_MAGNITUDE = ".lora_magnitude_vector"  # DoRA's
_HEAD = "lm_head"
# PEFT merges such an adapter into a tied head and into the embedding with it: wrong answers.
_TIED_HEAD_HINT = (
    "Load the base with tie_word_embeddings=False and a copy of the embedding as its lm_head, "
    "merge the adapter into that with PEFT (merge_and_unload), and convert the merged model. "
    "The page docs/peft.md shows each line."
)
# The files to export or push. Checkpoints are only for the trainer.
_FILES = (
    WEIGHTS_FILE,
    CONFIG_FILE,
    CARD_FILE,
    CHAT_TEMPLATE_FILE,
    RUN_FILE,
    "metrics.jsonl",
    _SUMMARY_FILE,
)


@dataclass(frozen=True)
class Adapter:
    """A PEFT folder, or one of mlx-lm's, opened and checked. `Adapter.open` creates one.

    Attributes:
        folder: the adapter's folder.
        config: its `adapter_config.json`.
        tensors: where each matrix lies, by parameter path.
        base_hash: `Base.weights_hash` of the base it was trained on; empty if unknown.
        template: how it was asked in training; None if that is not known.
        files: names of its files, without checkpoints.
    """

    folder: Path
    config: AdapterConfig
    tensors: dict[str, TensorEntry]
    base_hash: str
    template: Template | None
    files: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path | str) -> "Adapter":
        """Read and check an adapter's folder.

        Raises:
            AdapterError: it is not an adapter, is damaged or not supported, holds links
                to files outside it, or has numbers that are not finite.
        """
        folder = Path(folder)
        content = read_content(folder)
        header = _read_header(folder, mlx_lm.WEIGHTS_FILE if is_mlx_lm(content) else WEIGHTS_FILE)
        if is_mlx_lm(content):
            config = mlx_lm.read_config(folder, content, header.tensors)
            entries = header.tensors.items()
            tensors = {mlx_lm.our_name(name): mlx_lm.transposed(e) for name, e in entries}
            _check_dtypes(folder, tensors)
        else:
            config = read_peft_config(folder, content)
            tensors = _check_names(folder, header.tensors)
        template = _read_template(folder, header.metadata)
        _check_finite(folder, tensors)
        files = tuple(name for name in _FILES if (folder / name).is_file())
        refuse_outside_links(folder, files, AdapterError)
        base_hash = header.metadata.get(_BASE_KEY, "")
        return cls(folder, config, tensors, base_hash, template, files)

    @property
    def weights_file(self) -> Path:
        """The file that holds its matrices."""
        return next(iter(self.tensors.values())).path

    @property
    def is_mlx_lm(self) -> bool:
        """Whether mlx-lm's own tuner wrote it."""
        return self.weights_file.name == mlx_lm.WEIGHTS_FILE

    def matrices(self) -> dict[str, mx.array]:
        """Its matrices by parameter path, float32."""
        loaded = load_tensors(self.weights_file)
        if self.is_mlx_lm:
            found = {mlx_lm.our_name(name): array.T for name, array in loaded.items()}
        else:
            found = {name.removeprefix(PREFIX): array for name, array in loaded.items()}
        return {path: array.astype(mx.float32) for path, array in found.items()}

    def apply(self, model: nn.Module) -> None:
        """Add the adapter to a base model, in place. Its matrices are float32, as in PEFT.

        The model keeps the adapter's template: see `template_for`.

        Raises:
            AdapterError: it changes more than linear layers, or its keys or shapes do not
                fit the model. All of these are named, and the model is unchanged.
        """
        self._refuse_other_parts(model)
        layers = self.config.layers(model)
        self._compare(model, layers)
        place_lora(model, layers, self.config.dropout, rslora=self.config.rslora)
        if self.config.dora:
            place_dora(model)
        train_biases(model, self.config.bias)
        self.load_into(model)
        model.template = self.template

    def load_into(self, model: nn.Module) -> None:
        """Give a model with a LoRA of this shape the adapter's numbers, in place.

        Biases are cast to the model's dtype, which is that of what they are added to.
        """
        own = named_arrays(model.parameters())
        found = self.matrices()
        numbers = [(path, array.astype(own[path].dtype)) for path, array in found.items()]
        model.load_weights(numbers, strict=False)
        mx.eval(model.parameters())

    def export(self, out: Path, replace: bool = False, base: str = "") -> Path:
        """Copy the adapter's files, without checkpoints, and return `out`.

        One of mlx-lm's becomes a PEFT folder.

        Args:
            out: the new folder; it may exist if it is empty.
            replace: `out` may also be an adapter that was exported before.
            base: the base's name for the copy, in its config, card and run; "" keeps the name.

        Raises:
            AdapterError: `out` is or contains the adapter, or exists and may not be
                replaced.
            StorageError: it cannot be written.
        """
        self._check_out(out, replace)
        with atomic_folder(out, replace=replace) as temporary:
            if self.is_mlx_lm:
                config = dataclasses.replace(self.config, base=base or self.config.base)
                save_adapter(temporary, self.matrices(), config)
                return out
            for name in self.files:
                shutil.copyfile(self.folder / name, temporary / name)
            if base:
                self._rename_base(temporary, base)
        return out

    def export_as_mlx_lm(
        self, out: Path, model: nn.Module, replace: bool = False, base: str = ""
    ) -> Path:
        """Write the adapter as `mlx_lm.generate --adapter-path` loads it, and return `out`.

        Args:
            out: as for `export`.
            model: the base's network, without LoRA; changed in place.
            replace: as for `export`.
            base: as for `export`.

        Raises:
            AdapterError: as for `export` and `apply`, or mlx-lm has no place for what the
                adapter is.
            StorageError: it cannot be written.
        """
        if self.config.bias != "none":
            raise AdapterError(
                f"mlx-lm cannot hold {self.folder}, which brings biases (lora.bias).\n"
                "Merge it into its base instead: imate-mlx merge."
            )
        self._check_out(out, replace)
        self.apply(model)
        with atomic_folder(out, replace=replace) as temporary:
            mlx_lm.write(temporary, model, base or self.config.base, self.config.dropout)
        return out

    def _check_out(self, out: Path, replace: bool) -> None:
        """Refuse to write over what is no export.

        Raises:
            AdapterError: `out` is or contains the adapter, or exists and may not be replaced.
        """
        source = self.folder.resolve()
        if out.exists() and any(out.samefile(place) for place in (source, *source.parents)):
            raise AdapterError(
                f"{out} is the adapter to be copied, or contains it: {self.folder}\n"
                "Choose another folder.",
                "out",
            )
        # Checkpoints may be the only copy of a run's state. A folder with them is not an export.
        is_export = (out / CONFIG_FILE).is_file() and not (out / "checkpoints").exists()
        if is_export and not replace:
            raise AdapterError(
                f"{out} already exists.\nReplace it, or choose another folder.", "replace", "out"
            )
        if out.exists() and not is_export and not is_empty_folder(out):
            raise AdapterError(
                f"{out} exists and is not an exported adapter; nothing else is replaced:\n"
                f"expected {CONFIG_FILE} in it, and no checkpoints.\nChoose another folder.",
                "out",
            )

    def _rename_base(self, copy: Path, base: str) -> None:
        """Write another name of the base into the files of a copy, where they name it."""
        names = {self.config.base}
        texts = {}
        for name in self.files:
            if name in (CONFIG_FILE, CARD_FILE, RUN_FILE, _SUMMARY_FILE):
                with suppress(UnicodeDecodeError):  # not written here: it stays as it is
                    texts[name] = (copy / name).read_text(encoding="utf-8")
        for name, key in ((CONFIG_FILE, "base_model_name_or_path"), (_SUMMARY_FILE, "base")):
            with suppress(KeyError, TypeError, ValueError):  # no such file, or another content
                content = json.loads(texts[name])
                names.add(str(content[key]))
                texts[name] = json.dumps(content | {key: base}, indent=2) + "\n"
        if RUN_FILE in texts:
            line = f"base = {json.dumps(base)}"
            texts[RUN_FILE] = re.sub(r"(?m)^base = .*$", lambda _: line, texts[RUN_FILE], count=1)
        if CARD_FILE in texts:
            texts[CARD_FILE] = rename_base(texts[CARD_FILE], names, base)
        for name, text in texts.items():
            (copy / name).write_text(text, encoding="utf-8")

    def _refuse_other_parts(self, model: nn.Module) -> None:
        """Refuse what PEFT can keep beside the LoRA of linear layers."""
        is_tied = _HEAD not in linear_paths(model)
        faults, merge_hint = [], MERGE_HINT
        for name in self.tensors:
            if ".lora_embedding_" in name:
                faults.append(f"{name}: LoRA on an embedding, expected linear layers only")
            elif is_tied and name.startswith(f"{_HEAD}.") and name != f"{_HEAD}.weight":
                faults.append(f"{name}: LoRA on the head, which this base ties to its embedding")
                merge_hint = _TIED_HEAD_HINT
            elif ".lora_" not in name and name.endswith(".weight"):
                faults.append(f"{name}: a whole weight, saved beside the LoRA")
        if faults:
            raise AdapterError(
                f"{self.folder} changes more than linear layers, which is not supported:\n"
                f"{list_faults(faults)}\n{merge_hint}"
            )

    def _compare(self, model: nn.Module, layers: dict[str, tuple[int, float]]) -> None:
        modules = dict(model.named_modules())
        expected: dict[str, tuple[int, ...]] = {}
        for path, (rank, _) in layers.items():
            out_features, in_features = shape_of(modules[path])
            expected[f"{path}.lora_A.weight"] = (rank, in_features)
            expected[f"{path}.lora_B.weight"] = (out_features, rank)
            if self.config.dora:
                expected[f"{path}{_MAGNITUDE}"] = (out_features,)
        expected |= bias_shapes(model, self.config.bias, layers)
        got = {name: entry.shape for name, entry in self.tensors.items()}
        faults = [
            f"{name}: got {got.get(name, 'nothing')}, expected {shape}"
            for name, shape in expected.items()
            if got.get(name) != shape
        ]
        faults += [f"{name}: unexpected key" for name in got if name not in expected]
        if faults:
            raise AdapterError(
                f"{self.folder} does not fit this model:\n{list_faults(faults)}\n"
                "Choose the base that the adapter was trained on.",
                "base",
            )


def save_adapter(
    folder: Path,
    weights: dict[str, mx.array],
    config: AdapterConfig,
    base_hash: str = "",
    template: Template | None = None,
    chat_template: str = "",
) -> None:
    """Write the two PEFT files, and perhaps a chat template; each whole or not at all.

    Args:
        folder: created if it does not exist; other files in it are kept.
        weights: matrices by parameter path, from `adapter_weights`.
        config: the content of `adapter_config.json`.
        base_hash: `Base.weights_hash` of the base that they were trained on. It is stored
            in the metadata of the weights, because PEFT ignores that. PEFT would warn
            about an unknown key in `adapter_config.json`.
        template: of the rows that they were trained on (`data.prompts.template_of`). It is
            stored beside the hash; None if it is not known.
        chat_template: Jinja, for `chat_template.jinja`; "" for no such file.

    Raises:
        StorageError: they cannot be written.
    """
    # The weights come first, because a folder with a config counts as an adapter.
    with atomic_file(folder / WEIGHTS_FILE) as temporary:
        named = {PREFIX + path: matrix for path, matrix in weights.items()}
        metadata = {"format": "pt"} | (_template_metadata(template) if template else {})
        metadata |= {_BASE_KEY: base_hash} if base_hash else {}
        save_tensors(temporary, named, metadata)
    if chat_template:
        with atomic_file(folder / CHAT_TEMPLATE_FILE) as temporary:
            temporary.write_text(chat_template, encoding="utf-8")
    with atomic_file(folder / CONFIG_FILE) as temporary:
        temporary.write_text(json.dumps(config.to_peft(), indent=2) + "\n", encoding="utf-8")


def template_for(model: nn.Module, tokenizer: Tokenizer) -> Template:
    """How to ask a model: as its adapter was trained, or with the base's own template.

    Raises:
        ModelError: the base's chat template is not text.
    """
    template = getattr(model, "template", None)
    return template if isinstance(template, Template) else own_template(tokenizer)


def adapter_weights(model: nn.Module) -> dict[str, mx.array]:
    """What an adapter of a model holds, by parameter path, in the model's order: all that learns.

    That is the LoRA matrices, DoRA's magnitudes, and biases.
    """
    return named_arrays(model.trainable_parameters())


def _read_header(folder: Path, name: str) -> SafetensorsHeader:
    path = folder / name
    if not path.is_file():
        hint = (
            "Adapters in pickle files (adapter_model.bin) are not read: load and save it with PEFT."
        )
        raise AdapterError(
            f"{folder} has no {name}.\n{hint if name == WEIGHTS_FILE else 'Copy it again.'}"
        )
    refuse_outside_links(folder, [name], AdapterError)
    try:
        return read_safetensors_header(path)
    except WeightsError as error:
        fault = str(error).splitlines()[0]
        raise AdapterError(f"{path} is damaged: {fault}\nCopy or train it again.") from error


def _check_names(folder: Path, tensors: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Check dtypes and names; return the tensors by parameter path, without PEFT's prefix."""
    faults = _dtype_faults(tensors)
    named = {name.removeprefix(PREFIX): entry for name, entry in tensors.items()}
    if len(named) < len(tensors):
        faults.append(f"got the same matrix with and without the prefix {PREFIX}, expected it once")
    if faults:
        raise AdapterError(
            f"{folder / WEIGHTS_FILE} does not hold LoRA matrices:\n{list_faults(faults)}\n"
            "Export the adapter again."
        )
    return named


def _check_dtypes(folder: Path, tensors: dict[str, TensorEntry]) -> None:
    if faults := _dtype_faults(tensors):
        raise AdapterError(f"{folder} does not hold LoRA matrices:\n{list_faults(faults)}")


def _dtype_faults(tensors: dict[str, TensorEntry]) -> list[str]:
    return [
        f"{name}: got {entry.dtype}, expected one of {', '.join(FLOAT_DTYPES)}"
        for name, entry in tensors.items()
        if entry.dtype not in FLOAT_DTYPES
    ]


def _template_metadata(template: Template) -> dict[str, str]:
    """A template as metadata: the name of one that is always the same, or its text, too."""
    for name, known in _NAMED_TEMPLATES.items():
        if template == known:
            return {_TEMPLATE_KEY: name}
    return {_TEMPLATE_KEY: template.name, _JINJA_KEY: template.text}


def _read_template(folder: Path, metadata: dict[str, str]) -> Template | None:
    """The template in the weights' metadata. PEFT writes none."""
    name, text = metadata.get(_TEMPLATE_KEY), metadata.get(_JINJA_KEY)
    if name is None:
        return None
    if text:
        return Template(name, text)
    if name not in _NAMED_TEMPLATES:
        raise AdapterError(
            f"{folder / WEIGHTS_FILE}: template: got {brief(name)}, expected one of "
            f"{', '.join(_NAMED_TEMPLATES)}, or {_JINJA_KEY} beside it.\n"
            "Update this package: a newer one has written the adapter."
        )
    return _NAMED_TEMPLATES[name]


def _check_finite(folder: Path, tensors: dict[str, TensorEntry]) -> None:
    bad = [name for name, entry in tensors.items() if not _is_finite(entry)]
    if bad:
        raise AdapterError(
            f"{folder / WEIGHTS_FILE} holds NaN or infinity:\n{list_faults(bad)}\nTrain it again."
        )


def _is_finite(entry: TensorEntry) -> bool:
    """Whether all numbers are finite. Read in pieces: a file may be larger than memory."""
    pieces = (cast(chunk, entry.dtype, "float32") for chunk in entry.chunks())
    return all(np.isfinite(np.frombuffer(piece, "<f4")).all() for piece in pieces)
