"""The keys by which questions are found: shards that ask by themselves, or a benchmark's file and its images."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from data.loading.heldout import HeldOutSet
from data.samples.captions import TxtLayout
from eval.choices.files import BenchmarkFile, found, read_file
from eval.choices.pictures import FolderPictures, Pictures, ShardPictures
from eval.evaluator import EvaluationContext
from eval.shards import ImageEvaluationConfig, Patterns
from vlm.paths import LocalPath

Where = Callable[[str], str]


class QuestionsConfig(ImageEvaluationConfig):
    """Questions out of shards; or out of files, with their images in a folder or in shards."""

    shards: Annotated[
        Patterns | None, Field(description="Tar files, of the questions or of a file's images by their names.")
    ] = None
    file: Annotated[
        LocalPath | Annotated[tuple[LocalPath, ...], Field(min_length=1)] | None,
        Field(description="The file of the benchmark, as published, or several."),
    ] = None
    images: Annotated[LocalPath | None, Field(description="The folder of the file's images.")] = None
    txt: Annotated[
        TxtLayout | None, Field(description="A txt member holds one caption (whole), or one a line (lines).")
    ] = None

    @model_validator(mode="after")
    def _one_place_of_images(self) -> "QuestionsConfig":
        if self.images is not None and self.file is None:
            raise ValueError("images: a folder of images needs a file that asks about them (file)")
        if self.images is not None and self.shards is not None:
            raise ValueError("images: the images lie in a folder (images) or in shards, not in both")
        if self.images is None and self.shards is None:
            raise ValueError("shards: name shards (--data), or a file and the folder of its images (file, images)")
        return self

    def check_files(self, root: str | None, where: Where) -> None:
        """Raise UserError for a folder that is not there, and for files that are no such benchmark."""
        self.folder(root, where)
        self.check_entries(self.files(root, where))

    def check_entries(self, files: Sequence[BenchmarkFile]) -> None:
        """Raise UserError for files that are no such benchmark."""

    def files(self, root: str | None, where: Where) -> list[BenchmarkFile]:
        """The benchmark's files, read. Raises UserError for one that cannot be."""
        names = () if self.file is None else (self.file,) if isinstance(self.file, str) else self.file
        key = where("file")
        return [read_file(found(name, key, root), key) for name in names]

    def folder(self, root: str | None, where: Where) -> Path | None:
        """The folder of images, where one is named. Raises UserError where it is not there."""
        return None if self.images is None else found(self.images, where("images"), root, "folder")

    def pictures(self, context: EvaluationContext) -> Pictures:
        """The images that a file's entries name. Raises UserError where there are none at all."""
        folder = self.folder(context.root, context.where)
        if folder is not None:
            return FolderPictures(folder, context.image, context.where("images"))
        return ShardPictures(self.held_out(context, limit=None))

    def held_out(self, context: EvaluationContext, limit: int | None) -> HeldOutSet:
        """The samples of the shards. Raises UserError, in a line that begins with their key."""
        assert self.shards is not None  # the validator asked for them
        return HeldOutSet(
            self.shards,
            context.image,
            root=context.root,
            limit=limit,
            cache=context.cache,
            where=context.where("shards"),
            txt=self.txt,
        )
