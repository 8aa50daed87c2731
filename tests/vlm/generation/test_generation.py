"""Generated captions: each method against its definition, without cache, one image at a time."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, log_softmax

from tests.vlm.model.hugging_face import save_language_model, save_whole
from tests.vlm.model.tiny import TEXT, VIT, perturb, some_images
from vlm.errors import UserError
from vlm.generation.captioner import CaptionGenerator, marks_of
from vlm.generation.captions import Generated, Limits, Marks
from vlm.generation.choice import contrastive_scores, drawn
from vlm.generation.config import GenerationConfig
from vlm.generation.prefix import Prefixes
from vlm.generation.search import generate
from vlm.model.build import build_model
from vlm.model.captioner import NextToken
from vlm.model.config import ModelConfig
from vlm.model.dual_encoder import DualEncoder

IDS = torch.tensor([5, 7, 11])
LENGTH = 7
TEXTS_OF: dict[str, dict[str, Any]] = {
    "class token": {"embed_cls": True, "correct_cls_mask": True},
    "mask of released weights": {"embed_cls": True},
    "end token": {},
}


def model_of(text: str = "class token", pooler: str = "cascade") -> DualEncoder:
    """A model whose few likeliest tokens, the end among them, depend on image and beginning."""
    captioner = {"layers": 2, "heads": 2, "queries": 4, "pooler_heads": 2, "pooler": pooler}
    towers = {"embed_dim": 24, "image": {"vision_cfg": VIT}, "text": {"text_cfg": {**TEXT, **TEXTS_OF[text]}}}
    model = build_model(ModelConfig.model_validate({"towers": towers, "captioner": captioner}), seed=2).eval()
    perturb(model)
    assert model.decoder is not None
    with torch.no_grad():
        weight = model.decoder.vocabulary.weight
        kept = [49407, *range(320, 330)]
        others = torch.ones(weight.shape[1], dtype=torch.bool)
        others[kept] = False
        weight[:, others] = 0
        weight[:, kept] *= 12
    return model.double()


def model_with_words(text: str) -> DualEncoder:
    """A model of some twenty words: a decoder behind a causal language model of transformers, or one that is split."""
    captioner: dict[str, Any] = {"heads": 2, "queries": 4, "pooler_heads": 2}
    captioner |= {"language_model": {"cross_every": 2}} if text.startswith("split") else {"layers": 1}
    with tempfile.TemporaryDirectory() as folder:
        save_language_model(Path(folder), text.split()[-1])
        written = {"transformers": folder, "pool": "end", "context_length": 16}
        towers = {"embed_dim": 24, "image": {"vision_cfg": VIT}, "text": written}
        model = build_model(ModelConfig.model_validate({"towers": towers, "captioner": captioner}), seed=2).eval()
    perturb(model)
    decoder: Any = model.decoder
    with torch.no_grad():
        decoder.vocabulary.weight *= 4
        for cross in decoder.cross_attn:  # images count more than words
            cross.attn.out_proj.weight *= 40
            if text.startswith("split"):
                cross.ls_1.gate.fill_(1.0)
    return model.double()


class Uncached:
    """The definition of what comes next: the whole beginning through both halves."""

    def __init__(self, model: DualEncoder, image: Tensor) -> None:
        self._model = model
        with torch.no_grad():
            self._image = model.encode_image_and_tokens(image[None])[1]

    @torch.no_grad()
    def __call__(self, tokens: list[int]) -> NextToken:
        ids = torch.tensor([tokens])
        states = self._model.text(ids, torch.tensor([len(tokens)])).tokens
        made: Any = self._model.decoder(states, self._image)  # type: ignore[misc]
        return made  # type: ignore[no-any-return]

    def log_p(self, tokens: list[int]) -> Tensor:
        return log_softmax(self(tokens).logits[0].float(), dim=0)


CLIP_MARKS = Marks(49406, 49407)


def possible(log_p: Tensor, length: int, config: GenerationConfig, marks: Marks = CLIP_MARKS) -> Tensor:
    log_p = log_p.clone()
    if marks.start != marks.end:
        log_p[marks.start] = -torch.inf
    if length < config.min_length:
        log_p[marks.end] = -torch.inf
    return log_p


def written_out(model: DualEncoder, image: Tensor, config: GenerationConfig) -> Generated:
    """Greedy and contrastive search as their definitions have them, token by token."""
    marks = marks_of(model)
    step, tokens, total = Uncached(model, image), [marks.start], 0.0
    assert config.max_length is not None
    while len(tokens) <= config.max_length:
        log_p = step.log_p(tokens)
        scores = possible(log_p, len(tokens) - 1, config, marks)
        if config.method == "greedy":
            token = int(scores.argmax())
        else:
            best, candidates = scores.topk(config.k)
            likeness = []
            for candidate in candidates.tolist():
                states = step([*tokens, candidate]).states[0].float()
                cosines = [cosine_similarity(states[-1], state, dim=0) for state in states[1:-1]]
                likeness.append(float(max(cosines)) if cosines else 0.0)
            token = int(candidates[((1 - config.alpha) * best.exp() - config.alpha * torch.tensor(likeness)).argmax()])
        total += float(log_p[token])
        if token == marks.end:
            break
        tokens.append(token)
    return Generated(tuple(tokens[1:]), total)


def best_caption(
    model: DualEncoder,
    image: Tensor,
    config: GenerationConfig,
    vocabulary: Sequence[int] = (49407, *range(320, 330)),  # only a few tokens are likely at all
    marks: Marks = CLIP_MARKS,
) -> Generated:
    """The best of all captions, by trying them all."""
    step = Uncached(model, image)
    open_captions: list[tuple[list[int], float]] = [([marks.start], 0.0)]
    ended: list[tuple[float, Generated]] = []
    assert config.max_length is not None
    for length in range(1, config.max_length + 1):
        following = []
        for tokens, total in open_captions:
            log_p = step.log_p(tokens)
            scores = possible(log_p, length - 1, config, marks)
            for token in vocabulary:
                if torch.isfinite(scores[token]):
                    following.append(([*tokens, token], total + float(log_p[token])))
        ended += [
            (total / length**config.length_penalty, Generated(tuple(tokens[1:-1]), total))
            for tokens, total in following
            if tokens[-1] == marks.end
        ]
        open_captions = [one for one in following if one[0][-1] != marks.end]
    return max(ended, key=lambda scored: scored[0])[1]


def made(model: DualEncoder, images: Tensor, **options: Any) -> list[Generated]:
    config = GenerationConfig.model_validate({"max_length": LENGTH, **options})
    assert config.max_length is not None
    limits = Limits(marks_of(model), config.max_length, config.min_length)
    with torch.no_grad():
        return generate(Prefixes(model, model.encode_image_and_tokens(images)[1]), limits, config)


def assert_same(found: Generated, expected: Generated) -> None:
    assert found.tokens == expected.tokens
    assert found.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-5)


@pytest.mark.parametrize("text", TEXTS_OF)
@pytest.mark.parametrize(
    "options",
    [
        {"method": "greedy"},
        {"method": "greedy", "min_length": 4},
        {"method": "contrastive", "k": 3, "alpha": 0.3},
        {"method": "contrastive", "k": 4, "alpha": 0.6, "min_length": 3},
    ],
)
def test_token_by_token_it_is_what_the_whole_beginning_says(text: str, options: dict[str, Any]) -> None:
    model, images = model_of(text), some_images(3)
    config = GenerationConfig.model_validate({"max_length": LENGTH, **options})
    found = made(model, images, **options)
    for image, caption in zip(images, found, strict=True):
        assert_same(caption, written_out(model, image, config))
        assert len(caption.tokens) >= config.min_length
    assert len({caption.tokens for caption in found}) > 1  # images differ


@pytest.mark.parametrize("text", ["class token", "mask of released weights"])
@pytest.mark.parametrize("options", [{}, {"length_penalty": 1.0}, {"min_length": 2}])
def test_a_wide_beam_finds_the_best_of_all_captions(text: str, options: dict[str, Any]) -> None:
    model, images = model_of(text), some_images(2)
    config = GenerationConfig.model_validate({"method": "beam", "beams": 300, "max_length": 3, **options})
    for image, caption in zip(images, made(model, images, **config.model_dump()), strict=True):
        assert_same(caption, best_caption(model, image, config))


@pytest.mark.parametrize("text", ["gpt2", "split llama"])
def test_causal_models_of_transformers_remember_their_keys(text: str) -> None:
    model, images = model_with_words(text), some_images(3)[1:]
    assert model.text.remembers
    decoder: Any = model.decoder
    size, marks = decoder.vocabulary.weight.shape[1], marks_of(model)
    assert (marks.start == marks.end) == text.endswith("gpt2")
    for options in ({"min_length": 2}, {"method": "contrastive", "k": 3, "alpha": 0.3}):
        config = GenerationConfig.model_validate({"max_length": 4, **options})
        found = made(model, images, **config.model_dump())
        assert len({caption.log_likelihood for caption in found}) > 1
        for image, caption in zip(images, found, strict=True):
            assert_same(caption, written_out(model, image, config))
    with torch.no_grad():  # the end is as likely as one of the words
        decoder.vocabulary.weight[:, marks.end] = decoder.vocabulary.weight[:, 5]
    config = GenerationConfig(method="beam", beams=400, max_length=2)
    for image, caption in zip(images, made(model, images, **config.model_dump()), strict=True):
        assert_same(caption, best_caption(model, image, config, range(size), marks))


@pytest.mark.parametrize(
    "options",
    [
        {"beams": 500},
        {"beams": 500, "length_penalty": 10.0, "min_length": 0},
        {"beams": 500, "min_length": 2},
    ],
)
def test_more_beams_than_tokens_find_the_best_too(tmp_path: Path, options: dict[str, Any]) -> None:
    """A text model of transformers with some twenty words, which remembers no keys."""
    save_whole(tmp_path, "clip")
    text = {"transformers": str(tmp_path), "pool": "own", "context_length": 16}
    towers = {"embed_dim": 24, "image": {"vision_cfg": VIT}, "text": text}
    captioner = {"layers": 1, "heads": 2, "queries": 4, "pooler_heads": 2}
    model = build_model(ModelConfig.model_validate({"towers": towers, "captioner": captioner}), seed=2).eval()
    perturb(model)
    model = model.double()
    marks, images = marks_of(model), some_images(2)
    decoder: Any = model.decoder
    size = decoder.vocabulary.weight.shape[1]
    assert size < 40
    with torch.no_grad():  # the end is likely everywhere
        decoder.ln_final.bias.fill_(1.0)
        decoder.vocabulary.weight[:, marks.end] += 0.1
    config = GenerationConfig.model_validate({"method": "beam", "max_length": 3, **options})
    for image, caption in zip(images, made(model, images, **config.model_dump()), strict=True):
        assert_same(caption, best_caption(model, image, config, range(size), marks))
    embeddings: Any = model.text.get_submodule("model.embeddings.token_embedding")
    with torch.no_grad():  # what must not come next is the least like all others
        for mark in (marks.start, marks.end):
            embeddings.weight[mark] = -embeddings.weight[mark] * 50
    for caption in made(model, some_images(8), method="contrastive", k=200, alpha=1.0, min_length=3):
        assert len(caption.tokens) >= 3
        assert not {marks.start, marks.end} & set(caption.tokens)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "beam", "beams": 1},
        {"method": "contrastive", "alpha": 0.0},
        {"method": "contrastive", "k": 1, "alpha": 0.6},
        {"method": "top_k", "k": 1},
        {"method": "top_p", "p": 1e-6},
    ],
)
def test_these_are_greedy(options: dict[str, Any]) -> None:
    model, images = model_of(), some_images(3)
    config = GenerationConfig.model_validate({"max_length": LENGTH, **options})
    found = CaptionGenerator(model, config).captions(images, IDS)
    expected = CaptionGenerator(model, GenerationConfig(max_length=LENGTH)).captions(images, IDS)
    assert found == expected


@pytest.mark.parametrize(
    "options",
    [
        {"method": "greedy"},
        {"method": "beam", "beams": 3},
        {"method": "contrastive", "k": 3},
        {"method": "top_k", "k": 5, "temperature": 2.0},
        {"method": "top_p", "p": 0.8, "seed": 3},
    ],
)
def test_a_caption_depends_on_its_image_alone(options: dict[str, Any]) -> None:
    model, images = model_of(), some_images(3)
    generator = CaptionGenerator(model, GenerationConfig.model_validate({"max_length": LENGTH, **options}))
    together = generator.captions(images, IDS)
    turned = generator.captions(images.flip(0), IDS.flip(0))[::-1]
    alone = [generator.captions(images[n : n + 1], IDS[n : n + 1])[0] for n in range(3)]
    for caption, *others in zip(together, turned, alone, strict=True):
        for other in others:
            assert other.text == caption.text
            assert other.log_likelihood == pytest.approx(caption.log_likelihood, abs=1e-5)


def test_draws_differ_by_seed_and_by_id() -> None:
    model, images = model_of(), some_images(1).expand(40, -1, -1, -1)
    options = {"method": "top_p", "p": 1.0, "temperature": 3.0, "max_length": LENGTH}

    def texts(seed: int) -> list[str]:
        generator = CaptionGenerator(model, GenerationConfig.model_validate({**options, "seed": seed}))
        return [caption.text for caption in generator.captions(images, torch.arange(40))]

    assert len(set(texts(0))) > 20
    assert texts(0) == texts(0)
    assert texts(0) != texts(1)


def test_draws_have_the_probabilities_of_what_is_left_after_the_cut() -> None:
    log_p = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    draws = (torch.arange(10_000) + 0.5) / 10_000
    rows = log_p.expand(10_000, 4)
    for options, expected in (
        ({"method": "top_k", "k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"method": "top_p", "p": 0.85}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"method": "top_p", "p": 1.0}, [0.1, 0.4, 0.2, 0.3]),
        ({"method": "top_p", "p": 0.7}, [0, 4 / 7, 0, 3 / 7]),
        ({"method": "top_k", "k": 4, "temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
    ):
        chosen = drawn(rows, draws, GenerationConfig.model_validate(options))
        fractions = [float((chosen == token).double().mean()) for token in range(4)]
        assert fractions == pytest.approx(expected, abs=2e-4)


def test_contrastive_scores_have_their_closed_form() -> None:
    scores = contrastive_scores(torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.95, 0.4, 0.1]), 0.6)
    assert scores.tolist() == pytest.approx([-0.37, -0.12, 0.02], abs=1e-6)


def test_a_model_without_decoder_and_captions_too_long_for_its_texts_are_refused() -> None:
    with pytest.raises(UserError, match=r"max_length: found 16; the model's texts have 15 tokens at most"):
        CaptionGenerator(model_of(), GenerationConfig(max_length=16))
    towers = {"embed_dim": 24, "image": {"vision_cfg": VIT}, "text": {"text_cfg": TEXT}}
    plain = build_model(ModelConfig.model_validate({"towers": towers}))
    with pytest.raises(UserError, match=r"the model has no captioning decoder \(model\.captioner\)"):
        CaptionGenerator(plain, GenerationConfig(max_length=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.2}, "alpha: found 0.2, which means nothing with method: greedy"),
        ({"method": "beam", "p": 0.5}, "p: found 0.5, which means nothing with method: beam"),
        ({"min_length": 9, "max_length": 9}, "min_length: found 9; it is below max_length"),
    ],
)
def test_options_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerationConfig.model_validate(options)
