"""Loading a model's tokenizer from its `ModelFiles`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from delta_suite.errors import UnavailableError, brief
from delta_suite.models.files import ModelFiles
from delta_suite.models.spec import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(spec: ModelSpec, files: ModelFiles) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer; one in a GGUF file is rebuilt, which takes seconds.

    Raises:
        ModelUnavailableError: transformers cannot build it from the files.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            files.directory, gguf_file=files.gguf, local_files_only=True, trust_remote_code=spec.trust_remote_code
        )
    except Exception as error:  # any type: it comes of the files, through transformers, tokenizers or trusted code
        raise UnavailableError(
            spec.name,
            f"its tokenizer cannot be built from {files.directory} ({brief(error)})",
            "Save the one it was trained with there: tokenizer.save_pretrained(DIRECTORY)."
            if files.gguf is None
            else "A newer transformers may know it: pip install --upgrade transformers.",
        ) from error
    return tokenizer
