"""Figures of captions are those of the COCO caption evaluation, in any order of images; so are words."""

import math
import random
from collections.abc import Sequence

import pytest

from eval.caption_metrics.rouge import common_subsequence
from eval.caption_metrics.scores import CaptionScores, score_captions
from eval.caption_metrics.words import words

# Candidate and references of each image.
CAPTIONS: list[tuple[str, list[str]]] = [
    # a reference word for word
    (
        "A brown dog runs across the grass.",
        ["A brown dog runs across the grass.", "A dog is running on a lawn.", "The dog's in the park!"],
    ),
    # nothing generated
    ("", ["Two men play football.", "Men are playing with a ball on a field."]),
    # nothing but punctuation
    (" . ", ["A red bus, parked.", "The bus is red."]),
    # one word again and again
    ("a a a a a a a a", ["A cat sits on a mat on a floor.", "There is a cat.", "The cat sat down, and a mouse ran."]),
    # one word; a reference without words
    ("dog", ["A dog.", "...", "dog", "A black dog jumps over a log.", "The dog jumps."]),
    # longer than every reference
    (
        "A man in a red shirt and blue jeans is riding a big white horse along the beach at sunset in summer",
        ["A man rides a horse.", "A man in a red shirt rides along the beach."],
    ),
    # shorter than every reference
    (
        "Children play",
        [
            "Three children play in the snow near a house.",
            "Several kids are playing outside in the snow, wearing warm coats.",
            "Children play in deep snow.",
            "The children don't seem to be cold.",
            "Kids & snow",
        ],
    ),
    # contractions, quotation marks and brackets
    (
        "The boy can't reach the \"STOP\" sign (it's too high)",
        ["A boy can't reach a stop sign.", "It's too high for the boy's hand (he isn't tall)."],
    ),
    # unicode
    (
        "Un café crème près d'une fenêtre — naïve 日本語 sign",
        [
            "A café crème near a window",
            "Un café près d'une fenêtre…",
            "日本語 sign over a “café”",
            "Ein naïve Straße café",
        ],
    ),
    # the words of a reference in another order
    ("grass the across runs dog brown a", ["a brown dog runs across the grass", "a dog runs"]),
    # two references equally far in length; nothing in common with either
    ("seven little yellow ducks", ["An old tree", "Some very tall old trees"]),
    # words that stand in references of other images only
    ("A bus runs across the snow", ["A skier goes down the slope.", "Someone skiing downhill"]),
    # hyphens, numbers, abbreviations
    (
        "A 3-year-old girl at 5:30 p.m. on Main St. with 1,000 T-shirts",
        ["A 3-year-old girl on Main St. near Mr. Smith", "At 5:30 p.m. there are 1,000 t-shirts", "girl no. 3"],
    ),
    # a caption of the set's most common n-grams
    (
        "A man riding a wave on top of a surfboard.",
        [
            "A man riding a wave on a surfboard in the ocean.",
            "A surfer on top of a wave",
            "A man on top of a surfboard riding a big wave.",
            "Surfing",
            "The man is surfing.",
        ],
    ),
    ("a dog and a dog and a dog", ["a dog and a cat and a dog", "two dogs and a cat", "a dog, a dog and a cat"]),
]

# What pycocoevalcap 1.2 finds for them (PTBTokenizer with its jar, then Bleu(4), Rouge and Cider).
BLEU = [0.7454545454477686, 0.6073588095325055, 0.49530942493773455, 0.3961615560322258]
ROUGE_L = 0.506439398184269
CIDER_D = 1.290734523392113
ROUGE_L_BY_IMAGE = [
    1.0,
    0.0,
    0.0,
    0.34923664122137404,
    1.0,
    0.6032967032967033,
    0.5304347826086957,
    0.5736677115987461,
    0.7530864197530864,
    0.21554770318021202,
    0.0,
    0.3333333333333333,
    0.6075697211155379,
    0.7554179566563467,
    0.875,
]
CIDER_D_BY_IMAGE = [
    3.5140160361750588,
    0.0,
    0.0,
    0.014579646081411652,
    1.2740294940770518,
    0.2818971801680559,
    0.8330842116059951,
    2.6082587771307235,
    1.5472719794501655,
    1.816297514677213,
    0.0,
    0.00861726998736795,
    1.5953877429777035,
    2.974656048053589,
    2.8929219504973576,
]


def scores_of(captions: Sequence[tuple[str, list[str]]]) -> CaptionScores:
    return score_captions([candidate for candidate, _ in captions], [references for _, references in captions])


def figures(scores: CaptionScores) -> list[float]:
    return [scores.bleu_1, scores.bleu_2, scores.bleu_3, scores.bleu_4, scores.rouge_l, scores.cider_d]


def test_figures_are_those_of_the_coco_caption_evaluation() -> None:
    scores = scores_of(CAPTIONS)
    assert figures(scores) == pytest.approx([*BLEU, ROUGE_L, CIDER_D], rel=0, abs=1e-12)
    assert scores.rouge_l_by_image == pytest.approx(ROUGE_L_BY_IMAGE, rel=0, abs=1e-12)
    assert scores.cider_d_by_image == pytest.approx(CIDER_D_BY_IMAGE, rel=0, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_figures_do_not_depend_on_the_order_of_images(seed: int) -> None:
    draw = random.Random(seed)
    vocabulary = [f"{letter}{number}" for letter in "abc" for number in range(30)]
    texts = [[" ".join(draw.choices(vocabulary, k=draw.randrange(2, 40))) for _ in range(4)] for _ in range(60)]
    captions = [*CAPTIONS, *((candidate, references) for candidate, *references in texts)]
    order = draw.sample(range(len(captions)), len(captions))
    scores, shuffled = scores_of(captions), scores_of([captions[image] for image in order])
    assert figures(shuffled) == figures(scores)
    assert shuffled.rouge_l_by_image.tolist() == scores.rouge_l_by_image[order].tolist()
    assert shuffled.cider_d_by_image.tolist() == scores.cider_d_by_image[order].tolist()


@pytest.mark.parametrize("num_images", [1, 2, 3, 7, 49, 1000])
def test_ngrams_that_all_images_have_weigh_nothing_in_cider_d(num_images: int) -> None:
    scores = scores_of([("a dog runs on grass", ["a dog runs on grass", "a dog"])] * num_images)
    assert scores.cider_d == 0
    assert scores.rouge_l == 1
    assert scores.bleu_4 == pytest.approx(1, abs=1e-9)


def test_cider_d_of_a_case_by_hand() -> None:
    # "x" weighs log 2. Of two in the candidate one counts. The vectors are 2 log 2 and log 2 long; lengths differ by 1.
    scores = scores_of([("x x", ["x"]), ("one two three four", ["one two three four"])])
    assert scores.cider_d_by_image == pytest.approx([10 / 4 * 0.5 * math.exp(-1 / 72), 10], rel=1e-12)


def test_brevity_takes_the_reference_nearest_in_length_and_of_two_the_shorter() -> None:
    three, five = "a b c", "a b c d e"
    assert scores_of([("a b c d", [five, three])]).bleu_1 == pytest.approx(1, abs=1e-8)
    assert scores_of([("a b c d", [five])]).bleu_1 == pytest.approx(math.exp(1 - 5 / 4), abs=1e-8)
    assert scores_of([("a b c d", [five, "a b c d e f"])]).bleu_1 == pytest.approx(math.exp(1 - 5 / 4), abs=1e-8)


def test_an_empty_candidate_costs() -> None:
    perfect = [(references[0], references) for _, references in CAPTIONS]
    image = ("", ["A dog on a lawn."])
    without, scores = scores_of(perfect), scores_of([*perfect, image])
    num_words = sum(len(words(candidate)) for candidate, _ in perfect)
    assert without.bleu_4 == pytest.approx(1, abs=1e-8)
    assert scores.bleu_4 == pytest.approx(math.exp(1 - (num_words + 5) / num_words), abs=1e-8)
    assert scores.rouge_l == pytest.approx(without.rouge_l * len(perfect) / (len(perfect) + 1))
    assert scores.rouge_l_by_image[-1] == scores.cider_d_by_image[-1] == 0


def test_empty_candidates_score_nothing_even_against_empty_references() -> None:
    scores = scores_of([("", ["A dog."]), ("...", ["", "."])])
    assert figures(scores) == [0] * 6
    assert scores.rouge_l_by_image.tolist() == scores.cider_d_by_image.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("candidates", "references", "told"),
    [
        ([], [], "no images"),
        (["a"], [["a"], ["b"]], "image 1 .* has no candidate"),
        (["a", "b"], [["a"]], "image 1 .* has no reference"),
        (["a", "b", "c"], [["a"], [], ["c"]], "image 1 .* has no reference"),
    ],
)
def test_an_image_without_candidate_or_reference_is_named(
    candidates: list[str], references: list[list[str]], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        score_captions(candidates, references)


def test_one_text_is_not_taken_for_a_list_of_references() -> None:
    with pytest.raises(TypeError, match="image 1 "):
        score_captions(["a", "b"], [["a"], "a dog"])


@pytest.mark.parametrize("seed", range(20))
def test_the_longest_common_subsequence_equals_its_table(seed: int) -> None:
    draw = random.Random(seed)
    first, second = (
        draw.choices("abcd", k=draw.randrange(90)) for _ in range(2)
    )  # more words than a machine word's bits
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, one in enumerate(first):
        for j, other in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if one == other else max(table[i][j + 1], table[i + 1][j])
    assert common_subsequence(first, second) == table[-1][-1]


@pytest.mark.parametrize(
    ("caption", "split"),  # by PTBTokenizer with -lowerCase, less what pycocoevalcap drops
    [
        ("A man's dog doesn't like the boys' ball.", "a man 's dog does n't like the boys ball"),
        ("Don't, can't, won't, shouldn't've", "do n't ca n't wo n't should n't 've"),
        ("I'm sure you're they'll we've he'd let's", "i 'm sure you 're they 'll we 've he 'd let 's"),
        ("I cannot, gonna wanna gotta gimme lemme, 'tis", "i can not gon na wan na got ta gim me lem me 't is"),
        ("The woman 's dog does n't run .", "the woman 's dog does n't run"),
        (
            'A sign says "Stop!", or \u2018go\u2019 or “wait”; it\u2019s red: yes?',
            "a sign says stop or go or wait it 's red yes",
        ),
        (
            "A two-way street -- black-and-white, a dog/cat - and so on...",
            "a two-way street black-and-white a dog/cat and so on",
        ),
        (
            "At 5 o'clock, O'Neil and ma'am play rock 'n' roll of the '50s and 1970's",
            "at 5 o'clock o'neil and ma'am play rock 'n' roll of the '50s and 1970 's",
        ),
        (
            "Mr. Smith on Main St. in the U.S. at 5 p.m., vs. no. 5 and no. It is in the sun.",
            "mr. smith on main st. in the u.s. at 5 p.m. vs. no. 5 and no it is in the sun",
        ),
        (
            "$5.00, 50% off, 1,000 people, 3.5-inch, 1/2 cup, 10:30, #1, 2nd, 3D, 5' 2\"",
            "$ 5.00 50 % off 1,000 people 3.5-inch 1/2 cup 10:30 # 1 2nd 3d 5 2",
        ),
        (
            "A sign (big) [red] {x} & a + b = c * d",
            "a sign -lrb- big -rrb- -lsb- red -rsb- -lcb- x -rcb- & a + b = c * d",
        ),
        ("What?! Wow!! Ok?", "what ?! wow !! ok"),
        ("#dog @home a_b", "#dog @home a_b"),
        ("CAFÉ Straße naïve 日本語 हिन्दी ЧЁРНЫЙ 😀 ok ★", "café straße naïve 日本語 हिन्दी чёрный ok ★"),
        ("  spaces and tabs  ", "spaces and tabs"),
        ("", ""),
        ('... -- "" !', ""),
    ],
)
def test_words_are_those_of_the_coco_tokenizer(caption: str, split: str) -> None:
    assert words(caption) == split.split()
