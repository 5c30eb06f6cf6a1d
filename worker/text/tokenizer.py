"""The tokenizer of a pipeline folder."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from comfy_xdit.protocol.errors import InvalidInput

WHOLE = "tokenizer.json"  # everything, in the format of the tokenizers package
VOCABULARIES = (WHOLE, "spiece.model", "tokenizer.model", "vocab.json", "vocab.txt")
READERS = ("sentencepiece", "google.protobuf")  # packages that read a file of the sentencepiece kind
SHOWN = 60  # letters


class Tokenizer:
    """Texts to tokens, without the special ones. `head`, `tail` and `pad` are known once it is loaded.

    Raises:
        InvalidInput: no vocabulary in the folder, or a package that reads it is not installed.
    """

    def __init__(self, folder: Path, name: str):
        found = [file for file in VOCABULARIES if (folder / file).is_file()]
        # A class of its own builds anew what the file says, and some build it wrong: of Llama 3's spaces and
        # line ends transformers 5's LlamaTokenizer keeps none.
        self._folder, self._name = folder, "PreTrainedTokenizerFast" if WHOLE in found else name
        if not found:
            raise InvalidInput(
                f"{folder} holds none of {', '.join(VOCABULARIES)}; download the complete folder."
            )
        missing = [package for package in READERS if found[0].endswith(".model") and _is_missing(package)]
        if missing:
            raise InvalidInput(
                f"{folder / found[0]} is read with packages that are not installed: pip install "
                f"{' '.join(package.removeprefix('google.') for package in missing)}"
            )

    def load(self) -> None:
        """Read the vocabulary.

        Raises:
            InvalidInput: it is damaged, or of no class that this transformers has.
        """
        import transformers

        cls = getattr(transformers, self._name, None)
        if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedTokenizerBase):
            raise InvalidInput(
                f"{self._folder.parent / 'model_index.json'} names {self._name!r} as {self._folder.name}, "
                f"which is no tokenizer of transformers {transformers.__version__}: update transformers, or "
                "download the folder again."
            )
        try:
            self._tokenizer: Any = cls.from_pretrained(self._folder, local_files_only=True)
        except Exception as error:  # the tokenizers package raises nothing narrower
            raise InvalidInput(f"{self._folder} cannot be read ({error}); download it again.") from error
        if self._tokenizer.pad_token_id is None:
            raise InvalidInput(f"{self._folder} names no token for padding; download it again.")
        self.pad: int = self._tokenizer.pad_token_id
        inside, whole = self.tokens("a"), self._tokenizer("a").input_ids
        start = next(n for n in range(len(whole)) if whole[n : n + len(inside)] == inside)
        self.head, self.tail = tuple(whole[:start]), tuple(whole[start + len(inside) :])

    def tokens(self, text: str) -> list[int]:
        """All of a text's, however many."""
        return self._tokenizer(text, add_special_tokens=False, truncation=False).input_ids if text else []

    def words(self, tokens: list[int]) -> str:
        """The beginning of the text that tokens are of."""
        text = self._tokenizer.decode(tokens, skip_special_tokens=True).strip()
        return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _is_missing(package: str) -> bool:
    parent = package.rpartition(".")[0]
    return bool(parent and find_spec(parent) is None) or find_spec(package) is None
