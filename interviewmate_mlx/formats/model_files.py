"""The names of the files in a model's folder, here and on the Hub."""

# As one file, and as shards, which need the index `NAME.index.json`. The first kind that a
# folder has is used.
WEIGHTS = (
    ("model.safetensors", "model-*-of-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model-*-of-*.bin"),
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# The other files that this package, or a library that it uses, reads.
OTHER_FILES = (
    "config.json",
    "generation_config.json",
    "hf_quant_config.json",
    "chat_template.jinja",
)
CARD_FILE = "README.md"  # names the licence


def index_of(weights: str) -> str:
    """The name of the index of a weight file's shards."""
    return f"{weights}.index.json"
