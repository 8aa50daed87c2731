"""True statements about a scene: claims, the words for them, and the test of a claim against any scene."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from random import Random
from typing import Final

from data.scenes.scene import Group, Scene, stands
from data.scenes.vocabulary import NUMBER_WORDS, OPPOSITE, plural

SIZE_WORDS: Final = {
    "small": ("small", "small", "little", "tiny"),
    "medium": ("medium-sized",),
    "large": ("large", "big"),
}
POSITION_WORDS: Final = {
    "top left": ("in the top left corner", "in the upper left corner", "at the top left"),
    "top": ("at the top", "near the top"),
    "top right": ("in the top right corner", "in the upper right corner", "at the top right"),
    "left": ("on the left", "on the left side"),
    "centre": ("in the centre", "in the middle"),
    "right": ("on the right", "on the right side"),
    "bottom left": ("in the bottom left corner", "in the lower left corner", "at the bottom left"),
    "bottom": ("at the bottom", "near the bottom"),
    "bottom right": ("in the bottom right corner", "in the lower right corner", "at the bottom right"),
}
RELATION_WORDS: Final = {
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
}
OPENINGS: Final = ("a picture of ", "an image of ", "a scene with ", "a drawing of ")
DIGIT_FRACTION: Final = 0.15


@dataclass(frozen=True)
class GroupClaim:
    """So many objects that look like this; None leaves the question open."""

    count: int
    shape: str
    colour: str | None
    size: str | None

    def holds(self, group: Group) -> bool:
        """Whether `group` is at least what is said here: "two circles" is also true of three small red ones."""
        first = group.first
        return (
            self.shape == first.shape
            and self.colour in (None, first.colour)
            and self.size in (None, first.size)
            and self.count <= len(group.objects)
        )


@dataclass(frozen=True)
class Claim:
    """The content of one caption; None leaves the question open."""

    groups: tuple[GroupClaim, ...]
    relation: str | None = None
    position: str | None = None
    line: str | None = None
    background: str | None = None

    def holds(self, scene: Scene) -> bool:
        """Whether the claim, read as generously as its words allow, is true of `scene`."""
        if self.background not in (None, scene.background):
            return False
        groups_by_claim = [[group for group in scene.groups if claim.holds(group)] for claim in self.groups]
        if not all(groups_by_claim):
            return False
        if self.relation is not None:
            return any(
                a is not b and stands(a, self.relation, b) for a in groups_by_claim[0] for b in groups_by_claim[1]
            )
        if self.line is not None:
            return any(group.line == self.line for group in groups_by_claim[0])
        return self.position is None or any(
            o.position == self.position for group in groups_by_claim[0] for o in group.objects
        )


@dataclass(frozen=True)
class Caption:
    """A caption and what it claims."""

    text: str
    claim: Claim


def full_claim(scene: Scene) -> Claim:
    """All that captions can say of a scene: kinds, numbers, sizes, relation, place or line, background."""
    return Claim(
        groups=tuple(
            GroupClaim(len(group.objects), group.first.shape, group.first.colour, group.first.size)
            for group in scene.groups
        ),
        relation=scene.relation,
        position=scene.objects[0].position if len(scene.objects) == 1 else None,
        line=scene.groups[0].line if len(scene.groups) == 1 else None,
        background=scene.background,
    )


def describe(scene: Scene, rng: Random, number: int) -> list[Caption]:
    """`number` differently worded captions that each say everything; only a medium size goes without saying."""
    return _distinct(rng, number, lambda: _plain_medium(full_claim(scene)))


def caption(scene: Scene, rng: Random) -> list[Caption]:
    """Four captions: a full description, then ones that leave things out, as people do, at least one of them bare."""
    full = describe(scene, rng, 1)
    claim = full_claim(scene)
    bare = _distinct(rng, 1, lambda: _bare(claim, rng), [c.text for c in full])
    taken = [c.text for c in full + bare]
    shorter = _distinct(rng, 2, lambda: _shortened(claim, rng) if rng.random() < 0.6 else _bare(claim, rng), taken)
    return full + bare + shorter


def _distinct(rng: Random, number: int, claim: Callable[[], Claim], taken: Iterable[str] = ()) -> list[Caption]:
    texts = set(taken)
    captions: list[Caption] = []
    while len(captions) < number:
        turned = _turned(claim(), rng)
        text = _sentence(turned, rng)
        if text not in texts:
            texts.add(text)
            captions.append(Caption(text, turned))
    return captions


def _plain_medium(claim: Claim) -> Claim:
    groups = tuple(replace(g, size=None) if g.size == "medium" else g for g in claim.groups)
    return replace(claim, groups=groups)


def _bare(claim: Claim, rng: Random) -> Claim:
    """Only what is there: numbers, colours and shapes, or numbers and shapes."""
    coloured = rng.random() < 0.6
    return Claim(tuple(replace(g, size=None, colour=g.colour if coloured else None) for g in claim.groups))


def _shortened(claim: Claim, rng: Random) -> Claim:
    """`claim` with some of its answers left open."""

    def keep(value: str | None, fraction: float) -> str | None:
        return value if rng.random() < fraction else None

    groups = claim.groups
    relation = keep(claim.relation, 0.6)
    if relation is None and len(groups) > 1 and rng.random() < 0.4:
        groups = tuple(rng.sample(groups, rng.randint(1, len(groups) - 1)))
    groups = tuple(replace(g, size=keep(g.size, 0.12 if g.size == "medium" else 0.4)) for g in groups)
    alone = len(groups) == 1
    return Claim(
        groups,
        relation,
        keep(claim.position, 0.4) if alone else None,
        keep(claim.line, 0.4) if alone else None,
        keep(claim.background, 0.35),
    )


def _turned(claim: Claim, rng: Random) -> Claim:
    """The same claim told in another order."""
    if claim.relation is None:
        return replace(claim, groups=tuple(rng.sample(claim.groups, len(claim.groups))))
    if rng.random() < 0.7:
        return claim
    return replace(claim, groups=claim.groups[::-1], relation=OPPOSITE[claim.relation])


def _sentence(claim: Claim, rng: Random) -> str:
    """Words for a claim."""
    phrases = [_noun(group, rng) for group in claim.groups]
    if claim.relation is not None:
        subject = f" {rng.choice(RELATION_WORDS[claim.relation])} ".join(phrases)
    else:
        subject = " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)
    places = []
    if claim.position is not None:
        places.append(rng.choice(POSITION_WORDS[claim.position]))
    if claim.line is not None:
        places.append(f"in a {claim.line}")
    if claim.background is not None:
        places.append(f"{rng.choice(('on', 'on', 'against'))} a {claim.background} background")
    if len(places) > 1 and claim.line is None:
        rng.shuffle(places)
    return " ".join([_opening(claim, rng) + subject, *places])


def _opening(claim: Claim, rng: Random) -> str:
    draw = rng.random()
    if draw < 0.6 or len(claim.groups) > 2:
        return ""
    if draw < 0.75:
        return "there is " if claim.groups[0].count == 1 else "there are "
    return rng.choice(OPENINGS)


def _noun(group: GroupClaim, rng: Random) -> str:
    """ "three small red circles", "a blue square"."""
    if group.count == 1:
        number, noun = rng.choice(("a", "a", "a", "a", "one")), group.shape
    else:
        digits = rng.random() < DIGIT_FRACTION
        number, noun = str(group.count) if digits else NUMBER_WORDS[group.count], plural(group.shape)
    size = rng.choice(SIZE_WORDS[group.size]) if group.size is not None else None
    return " ".join(word for word in (number, size, group.colour, noun) if word is not None)
