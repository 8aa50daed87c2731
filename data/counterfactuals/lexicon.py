"""Words that captions are made of, in groups of which a thing is one member or another: the words of editors.

A line of a group is one thing with its synonyms, which never replace each other; the first of them is the word that
replaces others. No member may be a kind of another one (a puppy is a dog), or an edit would be true.
"""

from typing import Final, NamedTuple

COLOURS: Final = (
    "red; yellow; green mint; cyan turquoise teal; blue navy; purple violet; pink; brown beige tan; white; black; "
    "orange; grey gray silver"
)

ATTRIBUTES: Final[dict[str, str]] = {
    "size": "small little tiny; large big huge",
    "height": "tall; short",
    "width": "wide; narrow",
    "age": "old elderly; young",
    "newness": "new modern; ancient",
    "material": "wooden; metal; plastic; glass; stone; leather; paper; brick",
    "pattern": "striped; spotted; checkered plaid; plain",
    "light": "bright sunny; dark",
    "wetness": "wet; dry",
    "weather": "snowy; rainy; cloudy; clear",
    "fullness": "empty; full",
    "busyness": "crowded busy; deserted",
    "temper": "happy smiling; sad crying; angry",
    "warmth": "hot; cold",
    "openness": "open; closed",
    "state": "clean; dirty muddy",
    "hair": "blond blonde; bald; bearded",
    "place": "indoor; outdoor",
    "side": "left; right",
}

NOUNS: Final[dict[str, str]] = {
    "adult": "man guy; woman lady",
    "child": "boy; girl",
    "pet": "dog puppy; cat kitten; rabbit; hamster",
    "farm animal": "horse; cow; sheep lamb; goat; pig; donkey",
    "wild animal": "elephant; bear; zebra; giraffe; lion; tiger; monkey; deer; fox; wolf; camel; kangaroo",
    "bird": "duck; chicken; owl; parrot; eagle; penguin; pigeon; swan",
    "small animal": "butterfly; bee; spider; snail; frog; snake; turtle; fish",
    "vehicle": "car; bus; truck lorry; bicycle bike; motorcycle motorbike; train; boat ship; airplane plane; "
    "helicopter; tractor; scooter; skateboard; kayak canoe; sled sledge",
    "building": "house; church; barn; bridge; lighthouse; castle; tower; windmill; hotel; shop store; garage; stadium",
    "room": "kitchen; bedroom; bathroom; office; garden; restaurant; classroom; garage; library",
    "landscape": "beach; forest woods; mountain; desert; river; field meadow; street road; lake; park; hill; island",
    "ground": "grass; sand; snow; mud; ice; pavement sidewalk; carpet rug",
    "sky": "sun; moon; rainbow; cloud",
    "furniture": "chair; table; bed; couch sofa; bench; desk; shelf; lamp; mirror; cupboard cabinet",
    "clothing": "shirt; jacket coat; dress; skirt; sweater jumper; suit; hoodie; bikini swimsuit",
    "legwear": "jeans; shorts; leggings",
    "headwear": "hat; cap; helmet; scarf; crown; hood",
    "worn": "glove; tie; belt; watch; necklace; backpack rucksack; apron; vest",
    "sport": "football soccer; basketball; baseball; tennis; golf; hockey; volleyball; rugby; cricket",
    "sports gear": "ball; frisbee; racket; bat; surfboard; skis; snowboard; kite; rope",
    "instrument": "guitar; piano; violin; drum; trumpet; flute; accordion; saxophone",
    "device": "phone telephone cellphone; laptop; camera; television tv; clock; keyboard; microphone; radio",
    "vessel": "cup mug; bottle; bowl; plate; vase; bucket; basket; box; jar",
    "tool": "knife; fork; spoon; hammer; scissors; broom; umbrella; ladder; shovel",
    "fruit": "apple; banana; strawberry; lemon; pear; grape; pineapple; cherry",
    "vegetable": "carrot; tomato; onion; potato; broccoli; corn; pumpkin; cabbage",
    "dish": "pizza; sandwich; cake; soup; salad; pasta spaghetti; burger hamburger; pie; doughnut donut",
    "drink": "coffee; tea; beer; wine; milk; juice; water",
    "plant": "tree; flower; bush; cactus; mushroom",
    "shape": "circle; square; triangle; star; heart; cross; ring; diamond; crescent",
    "body part": "hand; foot; face; arm; leg; ear; nose; knee; shoulder",
    "job": "doctor; firefighter; policeman; chef; soldier; farmer; cyclist; surfer; skier; clown; musician; bride",
    "toy": "doll; balloon; puzzle; swing; slide; trampoline; seesaw",
    "time": "morning; night; noon; evening",
    "season": "summer; winter; autumn fall; spring",
    "water": "pool; ocean sea; waterfall; fountain; puddle",
}

_PLURALS: Final[dict[str, str]] = {
    "man": "men",
    "woman": "women",
    "policeman": "policemen",
    "sheep": "sheep",
    "deer": "deer",
    "fish": "fish",
    "foot": "feet",
    "knife": "knives",
    "shelf": "shelves",
    "wolf": "wolves",
    "bus": "buses",
    "cactus": "cacti",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "piano": "pianos",
    "child": "children",
    "person": "people",
}
_SINGULARS: Final = {
    **{many: one for one, many in _PLURALS.items()},
    **{f"{word}s": word for word in ("cookie", "movie", "hoodie", "selfie", "zombie", "brownie", "headache")},
}
_SHORTEST_PLURAL: Final = 4
_ONE_FORM: Final = ("skis", "jeans", "shorts", "leggings", "scissors", "grass", "broccoli", "tennis", "this")


class Word(NamedTuple):
    """A word of a group: the thing that it names, whether in the plural, and the group's name."""

    group: str
    thing: int
    is_plural: bool


class Things(NamedTuple):
    """The things of a group by the words that replace others: each in the singular and in the plural."""

    singular: tuple[str, ...]
    plural: tuple[str, ...]


class Lexicon:
    """Groups of words, looked up by word. `inflected`: nouns, whose plurals are made; adjectives have one form."""

    def __init__(self, groups: dict[str, str], *, inflected: bool) -> None:
        self.things: dict[str, Things] = {}
        self._words: dict[str, tuple[Word, ...]] = {}
        for group, text in groups.items():
            things = [thing.split() for thing in text.split(";")]
            firsts = tuple(thing[0] for thing in things)
            self.things[group] = Things(firsts, tuple(map(plural, firsts)) if inflected else firsts)
            for number, thing in enumerate(things):
                for word in thing:
                    self._add(word, Word(group, number, False))
                    if inflected and plural(word) != word:
                        self._add(plural(word), Word(group, number, True))

    def find(self, word: str) -> tuple[Word, ...]:
        """What a word may be, in whatever case: one entry for each group that has it."""
        return self._words.get(word.lower(), ())

    def others(self, word: Word) -> tuple[str, ...]:
        """The words for the other things of a word's group, in its number."""
        things = self.things[word.group]
        forms = things.plural if word.is_plural else things.singular
        return tuple(form for number, form in enumerate(forms) if number != word.thing)

    def _add(self, form: str, word: Word) -> None:
        known = self._words.get(form, ())
        if not any(one.group == word.group for one in known):
            self._words[form] = (*known, word)


def plural(noun: str) -> str:
    """The plural of a noun in lower case."""
    if noun in _ONE_FORM:
        return noun
    if noun in _PLURALS:
        return _PLURALS[noun]
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}s"


def singular(word: str) -> str:
    """A word in lower case, its ending taken off where it looks like a plural."""
    word = word.lower()
    if word in _SINGULARS or word in _ONE_FORM:
        return _SINGULARS.get(word, word)
    if not word.endswith("s") or word.endswith(("ss", "us")) or len(word) < _SHORTEST_PLURAL:
        return word
    if word.endswith("ies") and len(word) > len("ties"):
        return f"{word[:-3]}y"
    return word[:-2] if word.endswith(("sses", "xes", "ches", "shes")) else word[:-1]


COLOUR_WORDS: Final = Lexicon({"colour": COLOURS}, inflected=False)
ATTRIBUTE_WORDS: Final = Lexicon(ATTRIBUTES, inflected=False)
NOUN_WORDS: Final = Lexicon(NOUNS, inflected=True)
