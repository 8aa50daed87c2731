"""The documents of a run by number of step: their sources, their order, and what stands in for bad ones."""

from data.config import DataConfig
from data.documents_config import DocumentsConfig
from data.loading.documents import DocumentLoader, DocumentReader, document_slots
from data.loading.slots import SlotReader
from data.loading.substitution import SubstitutionLog
from data.loading.summary import summarised
from data.order.order import Order, SourceCounts
from data.samples.document_tokens import DocumentTokenizer
from data.shards.cache import ShardCache
from data.shards.folder_index import FolderIndex
from data.shards.reader import ShardReader
from data.shards.source import Source, open_source, require_documents
from data.source_names import document_source, recipe_key
from vlm.errors import UserError
from vlm.model.image_spec import ImageSpec
from vlm.model.tokenizer import Tokenizer


class DocumentStream:
    """Documents beside the pairs of a run; which are in step s depends on data, `seed`, `per_step` and weights alone.

    Raises:
        UserError: a pattern, shard or source that holds no documents.
    """

    def __init__(
        self, data: DataConfig, documents: DocumentsConfig, cache: ShardCache, log: SubstitutionLog, seed: int
    ) -> None:
        self.log = log
        self._config = documents
        self._augment = documents.augment or data.augment
        self._seed = seed
        self._opened = [_open(data, documents, name, cache) for name in documents.sources]
        weights = [one.weight for one in documents.sources.values()]
        counts = [
            SourceCounts(source.name, source.counts, weight)
            for source, weight in zip(self._opened, weights, strict=True)
        ]
        self.order = Order(seed, counts, documents.per_step, lanes=documents.lanes, window=data.shuffle_shards)
        self.sources = summarised(self._opened, self.order)
        self.problems = tuple(problem for source in self._opened for problem in source.problems(cache))

    def loader(
        self, image: ImageSpec, tokenizer: object, reader: ShardReader, global_batch: int, samples: range
    ) -> DocumentLoader:
        """The loader of the documents that ride along with these samples of a global batch."""
        config = self._config
        if not isinstance(tokenizer, Tokenizer):
            raise TypeError(f"documents need a tokenizer with marks, not a {type(tokenizer).__name__}")
        if config.max_tokens is not None and config.max_tokens > tokenizer.context_length:
            raise UserError(
                f"data.documents.max_tokens: {config.max_tokens} is more than the text tower's context of "
                f"{tokenizer.context_length} tokens"
            )
        slots = document_slots(config.per_step, global_batch, samples)
        read = SlotReader(self._opened, self.order, slots, self.log, self._seed, reader)
        documents = DocumentReader(DocumentTokenizer(tokenizer, config), image, self._augment, self._seed, reader)
        return DocumentLoader(read, documents, global_batch, samples.start)


def _open(data: DataConfig, documents: DocumentsConfig, name: str, cache: ShardCache) -> Source:
    source_name = document_source(name)
    where = recipe_key(source_name)
    index = FolderIndex(cache, f"{where}.shards")
    source = open_source(source_name, documents.sources[name].patterns, index, root=data.root, documents=True)
    require_documents(source, where)
    return source
