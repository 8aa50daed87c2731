"""The words of a caption, as the evaluation of COCO captions splits them."""

import re

# Their periods stay with them.
_ABBREVIATIONS = """
    adj adm adv al ala alex apr ariz assn asst atty attys aug ave bancorp bhd bldg blvd brig bros calif capt cf cie
    cmdr co col colo comdr conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga gen
    gov govs hon inc ind insp intl invt jan jos jr jul jun kan kans ky lieut lt ltd maj mar md messrs mfg mich minn
    mlle mme mo mon mont mr mrs ms msgr mt mtg natl neb nev nov oct okla penn pfc ph ph.d plc ppte ppty pres prof profs
    pte ptes pty ptys pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt supts sys tel tenn thu
    thurs tue tues univ va vs vt wed wis wisc wm wyo
"""
_ABBREVIATIONS_OF_NUMBERS = "art ca fig figs no nos op pp prop"  # "no. 5", but "no."

# Of any script: what is no space, no punctuation and no symbol.
_LETTER = (
    r"[^\s\x00-/:-@\[-`{-\xa0-\xa9\xab-\xb4\xb6-\xb9\xbb-\xbf\xd7\xf7"
    r"\u2000-\u2bff\u3000-\u3004\u3008-\u3030\ufe00-\ufe6f\uff00-\uff0f\uff1a-\uff20\U0001f000-\U0010ffff]"
)
_SYMBOL = r"[^\s\u200b-\u200d\ufe0f\U00010000-\U0010ffff]"
_START, _END = rf"(?<!{_LETTER})", rf"(?!{_LETTER})"
_CLITIC = rf"(?:n't|'(?:s|m|d|re|ve|ll)){_END}"
_WORD = re.compile(
    rf"""
    {_START} (?: {"|".join(_ABBREVIATIONS.split()).replace(".", "[.]")} ) [.] {_END}
  | {_START} (?: {"|".join(_ABBREVIATIONS_OF_NUMBERS.split())} ) [.] (?= \s? \d )
  | {_START} (?: [^\W\d_] [.] )+ {_END}                     # u.s., a.m.
  | (?: (?<! \S ) [-+] )?+ \d+ (?: [.,:/] \d+ )++ (?! [-/] )  # 1,000.50, 12:30, 1/2
  | {_CLITIC}
  | ' (?: n' | em {_END} | t (?= [ ] (?: is | was ) ) | \d\d s? {_END} )  # 'n', 'em, 't is, '50s
  | (?: [#@] (?! \d ) )?+ {_LETTER}+ (?: (?: [-/._] | (?<! \d ) ' ) {_LETTER}+ )*
  | [?!]+
  | {_SYMBOL}
    """,
    re.VERBOSE,
)
# Where two words meet without a space: do|n't, dog|'s, can|not.
_SEAM = re.compile(
    rf"(?<={_LETTER})(?={_CLITIC})"
    r"|(?<=\bcan)(?=not\b)|(?<=\bgon)(?=na\b)|(?<=\bwan)(?=na\b)|(?<=\bgot)(?=ta\b)"
    r"|(?<=\bgim)(?=me\b)|(?<=\blem)(?=me\b)|(?<=\B't)(?=(?:is|was)\b)"
)
_STRAIGHT = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_DROPPED = frozenset(".,:;?!\"'`-\u2013\u2014\u2026\xab\xbb")  # the last are dashes, ..., << and >>


def words(caption: str) -> list[str]:
    """Words of a caption: lower case, split like the Penn Treebank, without punctuation.

    The evaluation of COCO captions runs Stanford's PTBTokenizer (CoreNLP 3.4.1, Java) with `-lowerCase`, and drops
    `. , : ; ? !`, quotation marks and dashes. So contractions are two words ("do n't", "dog 's", "can not"), what a
    hyphen or slash joins is one, and abbreviations keep their periods. Two of its habits are kept for the sake of equal
    figures: brackets are words (`-lrb-`: they are dropped in upper case only), and so are several marks (`?!`, `!!`).

    Of 53,328 captions (Flickr8k, COCO, SugarCrepe, CountBench) all but 12 came out the same. The two may differ in
    addresses, tags and entities of HTML, smileys, ranges of decimal numbers, `AT&T`, `y'all`, words that a `!` or `?`
    joins without a space, signs of money (a pound is `#` there, a euro `$`), fractions of one character, rows of
    symbols (`**`), bent apostrophes within words, and capitals that decide what an abbreviation is.
    """
    text = _SEAM.sub(" ", caption.lower().translate(_STRAIGHT))
    return [_BRACKETS.get(word, word) for word in _WORD.findall(text) if word not in _DROPPED]
