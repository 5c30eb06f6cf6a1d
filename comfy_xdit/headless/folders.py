"""Where a run reads and writes, and what its files may be called: known before any of its work begins."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from comfy_xdit.protocol.errors import InvalidInput

LONGEST_PART, LONGEST_PREFIX = 200, 1000  # bytes; file systems take 255, with the number, and 4,096


@dataclass(frozen=True)
class Folders:
    """Where a run reads and writes. `written` collects the files, in their order."""

    output: Path
    inputs: tuple[Path, ...] = (Path(),)
    written: list[Path] = field(default_factory=list)

    def check_writable(self) -> None:
        """Make the output folder, and raise InvalidInput unless a file can be written into it."""
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.output):
                pass
        except (OSError, ValueError) as error:
            raise InvalidInput(
                f"nothing can be written to {self.output}: {why(error)}; name another folder with --output."
            ) from error

    def find_input(self, name: str) -> Path:
        """The file `name` in the first input folder that has it; an absolute path is itself.

        Raises:
            InvalidInput: no folder has it.
        """
        for folder in self.inputs:
            if name and (folder / name).is_file():
                return folder / name
        searched = ", ".join(str(folder) for folder in self.inputs)
        raise InvalidInput(f"no picture {name!r} in {searched}; name the folder it is in with --input.")


def prefix_problem(prefix: str) -> str | None:
    """What is wrong with a filename_prefix, in words; None where nothing is."""
    parts = Path(prefix).parts
    if not parts:
        return f"filename_prefix {prefix!r} names no file; give it a name such as ComfyUI"
    if ".." in parts or Path(prefix).is_absolute():
        return f"filename_prefix {prefix!r} leads out of the output folder; take out '..', or the first '/'"
    if not prefix.isprintable():
        return f"filename_prefix {prefix!r} holds characters that no file name has; take them out"
    longest, whole = max(len(part.encode()) for part in parts), len(prefix.encode())
    if longest > LONGEST_PART or whole > LONGEST_PREFIX:
        return (
            f"filename_prefix {prefix[:40]!r}... has {whole} bytes, {longest} of them between two '/'; at "
            f"most {LONGEST_PREFIX} and {LONGEST_PART} are possible: shorten it"
        )
    return None


def why(error: Exception) -> str:
    """What the system says of it."""
    return getattr(error, "strerror", None) or str(error)
