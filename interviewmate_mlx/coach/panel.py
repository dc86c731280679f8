"""A base and any number of adapters beside it, in memory once."""

from interviewmate_mlx import backend  # its BLAS must be loaded before MLX

# isort: split
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from interviewmate_mlx.adapter.folder import Adapter
from interviewmate_mlx.base.base import public_name
from interviewmate_mlx.coach.generate import open_base, warn_of_other_weights
from interviewmate_mlx.data.prompts import encode_messages, encode_prompt
from interviewmate_mlx.data.records import Message
from interviewmate_mlx.data.templates import VERBATIM, Template, end_ids
from interviewmate_mlx.errors import AdapterError, ConfigError, brief
from interviewmate_mlx.files import Progress
from interviewmate_mlx.hub.names import is_path
from interviewmate_mlx.model.lora import lora_layers, remove_lora
from interviewmate_mlx.model.switched_lora import SwitchedModel


@dataclass(frozen=True)
class Voice:
    """One that answers: the base, or the base with an adapter.

    Attributes:
        name: as users call it.
        number: of its update in the model; 0 is the base.
        template: how it is asked; None: with the base's own.
        adapter_hash: sha256 of the adapter's weights file; "" for the base.
    """

    name: str
    number: int
    template: Template | None = None
    adapter_hash: str = ""

    def prompt(self, tokenizer: TokenizerWrapper, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, as the voice is asked.

        Raises:
            ConfigError: the voice knows verbatim texts, and this is more than one message.
            ConfigError, ModelError, DataError: its template cannot be used, or not for this.
        """
        if self.template != VERBATIM:
            return encode_messages(tokenizer, messages, self.template)
        if len(messages) > 1:
            raise ConfigError(
                f"{self.name} was trained on verbatim texts, which have no turns.\n"
                "Give it one message, or its text as a prompt."
            )
        return encode_prompt(tokenizer, messages[0].content, VERBATIM)


@dataclass(frozen=True)
class Panel:
    """A base and adapters, ready to answer. `Panel.load` creates one.

    Attributes:
        model: whose rows may have different adapters.
        tokenizer: the base's.
        voices: by name, the base first; `-base` is added to its name where an adapter has it.
        context: tokens that a prompt and its answer may have together.
    """

    model: SwitchedModel
    tokenizer: TokenizerWrapper
    voices: dict[str, Voice]
    context: int

    @classmethod
    def load(
        cls,
        base: str | Path | None,
        adapters: Mapping[str, Path],
        dtype: str = "auto",
        progress: Progress | None = None,
    ) -> "Panel":
        """Load a base and adapters.

        Args:
            base: `mini`, a folder or a Hub id; by default the one that the first adapter names.
            adapters: PEFT folders by the names that they will have.
            dtype: of the weights.
            progress: called with bytes done and bytes in all, while a base is pulled.

        Raises:
            InterviewMateError: one of them is missing or does not fit.

        Warns:
            UserWarning: an adapter fits, but was trained on other weights.
        """
        opened = {name: Adapter.open(folder) for name, folder in adapters.items()}
        opened_base = open_base(base, next(iter(opened.values()), None), progress)
        base_name = public_name(opened_base.name)
        base_name = Path(base_name).resolve().name if is_path(base_name) else base_name
        if base_name in opened:  # as that of `imate-mlx train --run mini`, in adapters/mini
            base_name += "-base"
        if base_name in opened:
            raise ConfigError(
                f"An adapter is named {brief(base_name)}, as the base is.\n"
                "Give it another name: NAME=PATH.",
                "adapter",
            )
        if biased := [name for name, one in opened.items() if one.config.bias != "none"]:
            raise AdapterError(
                f"{', '.join(biased)}: got an adapter that brings biases (lora.bias), and these "
                "cannot be switched from row to row.\n"
                "Merge it into its base (imate-mlx merge), and name the merged model as the base.",
                "adapter",
            )
        network = opened_base.load(backend.resolve_dtype(dtype))
        updates = {}
        voices = {base_name: Voice(base_name, 0)}
        for number, (name, adapter) in enumerate(opened.items(), start=1):
            adapter.apply(network)
            warn_of_other_weights(adapter, opened_base)
            updates[number] = dict(lora_layers(network))
            voices[name] = Voice(name, number, adapter.template, _hash(adapter))
            remove_lora(network)
        network.eval()
        model = SwitchedModel(network)
        for number, layers in updates.items():
            model.add(number, layers)
        mx.eval(model.parameters())  # here: another thread has no stream of this one's
        tokenizer = opened_base.tokenizer
        ends = [end_ids(voice.template, tokenizer) for voice in voices.values()]
        tokenizer.eos_token_ids = set().union(*ends)
        return cls(model, tokenizer, voices, opened_base.network.context)

    @property
    def base(self) -> Voice:
        """The voice without an adapter."""
        return next(iter(self.voices.values()))

    def voice(self, name: str) -> Voice:
        """A voice by its name.

        Raises:
            ConfigError: there is none of that name.
        """
        if name not in self.voices:
            raise ConfigError(
                f"No adapter {brief(name)} here, expected one of: {', '.join(self.voices)}."
            )
        return self.voices[name]


def _hash(adapter: Adapter) -> str:
    with adapter.weights_file.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
