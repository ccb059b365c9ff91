"""The depth of a model as its config or GGUF header states it, so that claims can be refused before it is loaded."""

from __future__ import annotations

from delta_suite.errors import SuiteError
from delta_suite.models.files import nested
from delta_suite.models.gguf_header import gguf_content
from delta_suite.models.sources import locate
from delta_suite.models.spec import ModelSpec
from delta_suite.reading import UnreadableFileError, read_json

_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
"""Keys of a config that state the number of decoder blocks, the first that is there counts."""


def stated_depth(spec: ModelSpec) -> int | None:
    """Return the number of blocks that a model's files state; None where they are not here, or state none.

    The blocks are counted when the model is loaded, and that count is what is recorded.
    """
    try:
        files = locate(spec, download=False)
        if files.gguf is not None:
            values = gguf_content(files.directory / files.gguf)[0]
            stated = {key.rpartition(".")[2]: value for key, value in values.items()}
            depth = stated.get("block_count")
        else:
            content = read_json(files.directory / "config.json")
            stated = {key.rpartition(".")[2]: value for key, value in reversed([*nested(dict(content))])}
            depth = next((stated[key] for key in _KEYS if key in stated), None)
    except (SuiteError, UnreadableFileError, OSError, TypeError, ValueError):
        return None  # the measurement says what is wrong with the files
    return depth if isinstance(depth, int) and not isinstance(depth, bool) and 0 < depth < 1_000_000 else None
