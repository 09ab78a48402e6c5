"""The photographs that a command was given, and what it draws of each."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from espkernels.models.data.image_folder import ENDINGS
from espkernels.models.segment import read_image

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Photographs"]


class Photographs:
    """Every image of ``source``, a file or a folder, with the file of its picture, behind a bar of progress.

    One that cannot be read is said to be so and counted in ``failed``. Raises ValueError for a source without images
    and for an output that would overwrite one, and ImportError where tqdm is missing.
    """

    def __init__(self, command: str, source: Path, output: Path) -> None:
        try:
            from tqdm import tqdm
        except ImportError as error:
            raise ImportError("the progress bar needs tqdm: pip install 'espkernels[images]'") from error
        self._bar = tqdm
        self.command = command
        self.jobs = _jobs_of(source, output)
        self.failed = 0

    def __iter__(self) -> Iterator[tuple[Path, Path, Image]]:
        for source, target in self._bar(self.jobs, desc=self.command, unit="image", disable=len(self.jobs) == 1):
            try:
                image = read_image(source)
            except ValueError as error:
                self._bar.write(f"{self.command}: {error}", file=sys.stderr)
                self.failed += 1
                continue
            yield source, target, image

    def say(self, text: str) -> None:
        """Prints above the bar."""
        self._bar.write(text)


def _jobs_of(source: Path, output: Path) -> list[tuple[Path, Path]]:
    """Every image with the file its picture goes to."""
    if not source.exists():
        raise ValueError(f"IMAGE: there is no {source}")
    if not source.is_dir():
        if output.is_dir():
            folder, output = output, output / f"{source.stem}.png"
            if output.exists() and folder.resolve() == source.parent.resolve():
                raise ValueError(f"--output: {output} is there already, beside the photograph; name the file")
        if output.suffix.lower() not in ENDINGS:
            raise ValueError(f"--output: {output} has no ending of an image format ({', '.join(ENDINGS)})")
        if output.resolve() == source.resolve():
            raise ValueError(f"--output: {output} is the photograph itself")
        output.parent.mkdir(parents=True, exist_ok=True)
        return [(source, output)]
    if output.resolve() == source.resolve():
        raise ValueError("--output: it is the folder of the photographs; name another")
    images = sorted(path for path in source.iterdir() if path.suffix.lower() in ENDINGS and path.is_file())
    if not images:
        raise ValueError(f"IMAGE: the folder {source} holds no images ({', '.join(ENDINGS)})")
    output.mkdir(parents=True, exist_ok=True)
    stems = [path.stem for path in images]
    names = [path.stem if stems.count(path.stem) == 1 else path.name for path in images]
    if len(set(names)) < len(names):  # a.jpg.png is alone with its stem, a.jpg is not
        names = [path.name for path in images]
    return [(path, output / f"{name}.png") for path, name in zip(images, names, strict=True)]
