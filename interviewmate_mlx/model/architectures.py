"""What a `config.json` means to the networks of mlx-lm; held against what transformers reads.

mlx-lm reads the keys that it knows, takes a default of its own for the others, and says nothing.
transformers 5 has moved some of them, above all the rotary settings. So a config is first read as
transformers reads it, with its defaults, and then translated. What a network of mlx-lm does not
compute is refused by name.
"""

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, fields
from io import StringIO
from typing import Any

from mlx_lm.utils import MODEL_REMAPPING
from transformers import CONFIG_MAPPING, PreTrainedConfig

from interviewmate_mlx.errors import brief, one_line

MAX_DIMENSION = 1 << 24  # MLX has 32 bits for the size of an axis; some are a multiple of a key's


@dataclass(frozen=True)
class Architecture:
    """What a network of mlx-lm takes for granted.

    Attributes:
        activations: of its MLP, any of these.
        is_tied: whether its head is its embedding; None if config.json says.
        computes_window: whether its attention has the sliding window of its config.
        is_mixture: its MLPs are mixtures of experts.
        taken: other keys that it does not read, and the values that it stands for.
    """

    activations: tuple[str, ...] = ("silu",)
    is_tied: bool | None = None
    computes_window: bool = False
    is_mixture: bool = False
    taken: dict[str, tuple[Any, ...]] = field(default_factory=dict)


_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")  # one function
# By `model_type`: the networks that `tests/model/test_zoo.py` holds against transformers.
TESTED = {
    "cohere": Architecture(is_tied=True),
    "cohere2": Architecture(is_tied=True, computes_window=True),
    "ernie4_5": Architecture(),
    "gemma": Architecture(_TANH, is_tied=True),
    "gemma2": Architecture(_TANH, is_tied=True),
    "gemma3_text": Architecture(
        _TANH,
        is_tied=True,
        computes_window=True,
        taken={"attn_logit_softcapping": (None,), "final_logit_softcapping": (None,)},
    ),
    "glm4": Architecture(is_tied=False),
    "granite": Architecture(),
    "helium": Architecture(),
    "hunyuan_v1_dense": Architecture(),
    "llama": Architecture(),
    "mistral": Architecture(),
    "mixtral": Architecture(is_mixture=True),
    "nemotron": Architecture(("relu2",)),
    "olmo2": Architecture(),
    "olmo3": Architecture(computes_window=True),
    "olmoe": Architecture(is_mixture=True, taken={"clip_qkv": (None,)}),
    "phi": Architecture(_TANH, is_tied=False, taken={"qk_layernorm": (False,)}),
    "phi3": Architecture(),
    "qwen2": Architecture(),
    "qwen2_moe": Architecture(
        is_mixture=True,
        taken={
            "decoder_sparse_step": (1,),
            "mlp_only_layers": ([], None),
            "norm_topk_prob": (False,),
            "qkv_bias": (True,),
        },
    ),
    "qwen3": Architecture(),
    "seed_oss": Architecture(),
    "smollm3": Architecture(),
    "stablelm": Architecture(is_tied=False),
    "starcoder2": Architecture((*_TANH, "gelu"), taken={"use_bias": (True,)}),
}
# Of keys that a network does not read, the values that change nothing.
_TAKEN: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_bidirectional_attention": (False, None),
    "router_jitter_noise": (0, 0.0, None),
    "rope_traditional": (False, None),
}
# Keys of transformers' configs that do not change what a decoder computes.
_WITHOUT_EFFECT = {
    *PreTrainedConfig().to_dict(),
    "attention_dropout",
    "bos_token_id",
    "decoder_start_token_id",
    "embd_pdrop",
    "embedding_dropout",
    "eod_token_id",
    "eos_token_id",
    "hidden_dropout",
    "initializer_range",
    "max_position_embeddings",
    "max_window_layers",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",  # the same products in parts
    "resid_pdrop",
    "residual_dropout",
    "router_aux_loss_coef",
    "use_cache",
    # Translated or compared below.
    "hidden_act",
    "hidden_activation",
    "layer_types",
    "original_max_position_embeddings",
    "rope_parameters",
    "sliding_window",
    "tie_word_embeddings",
    "use_sliding_window",
    "_sliding_window_pattern",
}
# Kinds of rotary embedding, and what each has beside its kind, theta and share of a head.
_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {
        "factor",
        "high_freq_factor",
        "low_freq_factor",
        "original_max_position_embeddings",
    },
    "yarn": {"beta_fast", "beta_slow", "factor", "original_max_position_embeddings"},
    "longrope": {"factor", "long_factor", "original_max_position_embeddings", "short_factor"},
}
_THETA_KEYS = ("rope_theta", "rotary_emb_base")
_SHARE_KEYS = ("partial_rotary_factor", "rotary_pct")


@dataclass(frozen=True)
class NetworkConfig:
    """A network of mlx-lm, as a `config.json` describes it.

    Attributes:
        model_type: its name in transformers.
        args: mlx-lm's own, complete.
        activation: of its MLP, by transformers' name; "" if unknown.
        longest_row: tokens of a row that it computes as transformers does; None if there is no
            limit.
        doubts: what is not known to be right; () for a network that the tests hold.
        is_mixture: its MLPs are mixtures of experts.
    """

    model_type: str
    args: Any
    activation: str = ""
    longest_row: int | None = None
    doubts: tuple[str, ...] = ()
    is_mixture: bool = False

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return int(self.args.vocab_size)

    @property
    def num_layers(self) -> int:
        return int(self.args.num_hidden_layers)

    @property
    def context(self) -> int:
        """Tokens of the longest text that it can go on from."""
        trained = getattr(self.args, "max_position_embeddings", None) or 2048
        return min(trained, self.longest_row or trained)


def read_network_config(config: dict[str, Any]) -> NetworkConfig:
    """Read a `config.json` for mlx-lm's network.

    Raises:
        ValueError: there is no such network, or it would not compute what the config
            describes. All such keys are named, a line each.
    """
    model_type = config.get("model_type")
    _refuse_other_kinds(config)
    assert isinstance(model_type, str)
    known = {item.name for item in fields(_module(model_type).ModelArgs)}
    settings = _as_transformers_reads(config)
    faults: list[str] = []
    doubts: list[str] = []
    architecture = TESTED.get(model_type)
    if architecture is None:
        doubts.append(f"no test holds {model_type} of mlx-lm against transformers")
    if settings is None:
        settings = dict(config)
        doubts.append(f"transformers does not know {model_type}")
    longest_row = _translate_window(settings, known, architecture, faults)
    if limit := _translate_rope(settings, known, faults):
        longest_row = min(limit, longest_row or limit)
    activation = settings.get("hidden_activation") or settings.get("hidden_act") or ""
    unread = _compare(settings, known, architecture or Architecture(), activation)
    if architecture:
        faults += unread
    else:
        doubts += [f"not read by mlx-lm's {fault}" for fault in unread]
    faults += _size_faults(settings)
    if faults:
        raise ValueError("\n".join(faults))
    return NetworkConfig(
        model_type,
        _build_args(model_type, settings),
        str(activation),
        longest_row,
        tuple(doubts),
        bool(architecture and architecture.is_mixture),
    )


def _refuse_other_kinds(config: dict[str, Any]) -> None:
    """Refuse what is not a plain decoder that mlx-lm has.

    Raises:
        ValueError: why.
    """
    model_type = config.get("model_type")
    if "model_file" in config:
        raise ValueError(
            f"model_file: got {brief(config['model_file'])}, expected none: its network is code "
            "in that file, which is not run"
        )
    for key in ("vision_config", "audio_config", "text_config"):
        if key in config:
            raise ValueError(
                f"{key}: expected none: a network with parts for images or sound is not trained; "
                "its text part alone, saved as a model of its own, may be"
            )
    if not isinstance(model_type, str) or not model_type.isidentifier():
        raise ValueError(f"model_type: got {brief(model_type)}, expected the name of a network")
    try:
        module = _module(model_type)
    except ImportError:
        raise ValueError(
            f"model_type: got {brief(model_type)}, expected falcon or a network of mlx-lm, such as "
            f"{', '.join(sorted(TESTED))}"
        ) from None
    if not all(hasattr(module, name) for name in ("Model", "ModelArgs")):
        raise ValueError(f"model_type: got {brief(model_type)}, which mlx-lm has not as a network")


def network_class(model_type: str) -> Any:
    """The class of a network in mlx-lm."""
    return _module(model_type).Model


def _module(model_type: str) -> Any:
    """The file of a network in mlx-lm.

    Raises:
        ImportError: there is none, or it needs what is not installed.
    """
    name = MODEL_REMAPPING.get(model_type, model_type)
    try:
        with redirect_stdout(StringIO()) as said:
            return importlib.import_module(f"mlx_lm.models.{name}")
    except SystemExit as error:  # olmo ends the process where its own package is missing
        raise ImportError(said.getvalue()) from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the warnings of a config that is only read; what matters is compared here."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _as_transformers_reads(config: dict[str, Any]) -> dict[str, Any] | None:
    """The keys that transformers' own config has, with its defaults; None if it has no such.

    Raises:
        ValueError: transformers refuses it.
    """
    model_type = config["model_type"]
    if model_type not in CONFIG_MAPPING:
        return None
    ours = {k: v for k, v in config.items() if k not in ("quantization", "quantization_config")}
    with _quiet_transformers():
        kind = CONFIG_MAPPING[model_type]
        try:
            known = kind().to_dict()
            settings = kind.from_dict(ours).to_dict()
        except Exception as error:
            raise ValueError(f"transformers refuses it: {one_line(error)}") from error
    rope_keys = {"rope_parameters", "rope_theta", "rope_scaling"}
    return {k: v for k, v in settings.items() if k in known or k in rope_keys}


def _translate_window(
    settings: dict[str, Any],
    known: set[str],
    architecture: Architecture | None,
    faults: list[str],
) -> int | None:
    """Read which blocks have a sliding window; the rows that are too short to notice, if any."""
    window, types = settings.get("sliding_window"), settings.get("layer_types") or []
    is_used = settings.get("use_sliding_window") is not False
    if types and "sliding_window_pattern" in known:
        # The last block of each group looks at the whole row.
        pattern = types.index("full_attention") + 1 if "full_attention" in types else 0
        regular = [
            "full_attention" if pattern and (number + 1) % pattern == 0 else "sliding_attention"
            for number in range(len(types))
        ]
        if not pattern or types != regular:
            faults.append(f"layer_types: got {brief(types)}, expected a pattern that repeats")
        settings["sliding_window_pattern"] = pattern
    has_window = bool(window) and is_used and (not types or "sliding_attention" in types)
    if not has_window or (architecture and architecture.computes_window):
        return None
    if type(window) is not int or window < 1:
        faults.append(f"sliding_window: got {brief(window)}, expected a whole number above 0")
        return None
    # Every block looks at the whole row. In rows of so many tokens that makes no difference.
    settings.pop("layer_types", None)
    return window


def _translate_rope(settings: dict[str, Any], known: set[str], faults: list[str]) -> int | None:
    """Put the rotary settings where mlx-lm looks; the longest row for which they hold, if any."""
    rope = settings.pop("rope_parameters", None)
    if not isinstance(rope, dict):
        return None
    whole, local = rope.get("full_attention"), rope.get("sliding_attention")
    if isinstance(whole, dict) and isinstance(local, dict):  # by kind of block
        if "rope_local_base_freq" in known and local.get("rope_type", "default") == "default":
            settings["rope_local_base_freq"] = local.get("rope_theta")
        elif local != whole:
            faults.append(f"rope_parameters: got {brief(rope)}, expected the same for all blocks")
        rope = whole
    kind = rope.get("rope_type") or "default"
    theta, share = rope.get("rope_theta"), rope.get("partial_rotary_factor")
    for keys, value in ((_THETA_KEYS, theta), (_SHARE_KEYS, share)):
        if value is not None:
            found = [key for key in keys if key in known]
            settings.update(dict.fromkeys(found, value))
            if not found and value != 1:
                faults.append(f"rope_parameters: {keys[0]}: got {brief(value)}, expected none")
    surplus = set(rope) - {"rope_type", "rope_theta", "partial_rotary_factor", "type"}
    surplus = {key for key in surplus if rope[key] is not None}
    if kind not in _ROPE_KEYS or (kind != "default" and "rope_scaling" not in known):
        kinds = ["default"] if "rope_scaling" not in known else list(_ROPE_KEYS)
        faults.append(f"rope_type: got {brief(kind)}, expected one of {', '.join(kinds)}")
    elif wrong := sorted(surplus - _ROPE_KEYS[kind]):
        faults.append(f"rope_parameters: got {', '.join(wrong)}, expected no such keys with {kind}")
    settings["rope_scaling"] = None if kind == "default" else {**rope, "type": kind}
    if kind != "longrope":
        return None
    # transformers takes the short factors for rows up to the first length, mlx-lm the long ones
    # always. So mlx-lm gets the short ones, for rows of that length.
    settings["rope_scaling"]["long_factor"] = rope.get("short_factor")
    limit = rope.get("original_max_position_embeddings")
    settings["original_max_position_embeddings"] = limit
    if type(limit) is not int or limit < 1:
        faults.append(f"original_max_position_embeddings: got {brief(limit)}, expected a number")
        return None
    return limit


def _compare(
    settings: dict[str, Any], known: set[str], architecture: Architecture, activation: Any
) -> list[str]:
    """The keys with which mlx-lm's network would compute something else."""
    faults = []
    if activation not in architecture.activations:
        expected = ", ".join(architecture.activations)
        faults.append(f"hidden_act: got {brief(activation)}, expected one of {expected}")
    is_tied = settings.get("tie_word_embeddings")
    if architecture.is_tied not in (None, is_tied):
        faults.append(f"tie_word_embeddings: got {is_tied}, expected {architecture.is_tied}")
    taken = {**_TAKEN, **architecture.taken}
    for key, value in settings.items():
        if key in known or key in _WITHOUT_EFFECT:
            continue
        if key == "head_dim" and value in (None, _head_size(settings)):
            continue
        if value not in taken.get(key, (None,)):
            expected = " or ".join(map(str, taken.get(key, ("no such key",))))
            faults.append(f"{key}: got {brief(value)}, expected {expected}")
    return faults


def _head_size(settings: dict[str, Any]) -> object:
    try:
        return settings["hidden_size"] // settings["num_attention_heads"]
    except (KeyError, TypeError, ZeroDivisionError):
        return None


def _size_faults(settings: dict[str, Any]) -> list[str]:
    """Sizes that no network has; each would be built before its weights are compared."""
    return [
        f"{key}: got {brief(value)}, expected a whole number from 0 to {MAX_DIMENSION}"
        for key, value in settings.items()
        if key.endswith(("_size", "_dim")) or key.startswith("num_")
        if value is not None and not (type(value) is int and 0 <= value <= MAX_DIMENSION)
    ]


def _build_args(model_type: str, settings: dict[str, Any]) -> Any:
    """mlx-lm's own arguments.

    Raises:
        ValueError: a key is missing, or a value is impossible.
    """
    try:
        with redirect_stdout(StringIO()) as said:
            args = _module(model_type).ModelArgs.from_dict(settings)
    except Exception as error:  # of any kind: they are not checked there
        raise ValueError(f"mlx-lm refuses it: {one_line(error)}") from error
    if said.getvalue():  # mlx-lm prints what it leaves out
        raise ValueError(f"mlx-lm: {brief(said.getvalue())}")
    return args
