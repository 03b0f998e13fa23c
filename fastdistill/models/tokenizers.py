"""Checks of a pipeline's tokenizers.

Where there is no vocabulary, transformers makes a tokenizer of a few tokens, and says nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdistill.errors import UserError
from fastdistill.models.folder import Part

ENCODERS = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}
"""Text encoder that reads the tokens of each tokenizer."""


def check_vocabulary(folder: Path, part: Part) -> None:
    """Raise `UserError` if the tokenizer `part` of the pipeline in `folder` has no vocabulary.

    A vocabulary is `tokenizer.json`, or the other files that the class names, such as
    `spiece.model`, or `vocab.json` with `merges.txt`. A class that reads bytes names no files.
    """
    import transformers

    class_ = getattr(transformers, part.class_name, None)
    files = dict(getattr(class_, "vocab_files_names", {}))
    whole = files.pop("tokenizer_file", None)
    ways = [way for way in ([whole] if whole else [], list(files.values())) if way]
    if ways and not any(all((folder / part.name / name).is_file() for name in way) for way in ways):
        needed = " or ".join(" with ".join(way) for way in ways)
        raise UserError(f"{folder}: {part.name} has no vocabulary ({needed}); get a complete copy of the pipeline")


def check_encoders(pipeline: Any) -> None:
    """Raise `UserError` if a tokenizer of `pipeline` has tokens that its text encoder does not
    know.

    A text encoder may know more: that of T5 is filled up to a round number.
    """
    for name, encoder in ENCODERS.items():
        tokens, known = len(getattr(pipeline, name)), getattr(pipeline, encoder).config.vocab_size
        if tokens > known:
            raise UserError(
                f"{name} has {tokens} tokens, and {encoder} knows {known}; get {name} and {encoder} of one model"
            )
