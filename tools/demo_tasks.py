"""The tasks of the demo model: its voices as functions of text, and the pseudo-sentences for its training.

Everything here is a pure function of its arguments and of the `random.Random` it is given.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable

SILENCE = "(silence)"  # stands for an empty text
MAX_TEXT_BYTES = 96

_WORD = re.compile(r"[A-Za-z]+")
_ONSET = re.compile(r"[yY]?(?:[qQ][uU]|[^aeiouyAEIOUY])*")
_UPPER = str.maketrans(string.ascii_lowercase, string.ascii_uppercase)
_ROT13 = str.maketrans(string.ascii_letters, "nopqrstuvwxyzabcdefghijklmNOPQRSTUVWXYZABCDEFGHIJKLM")


def repeat(text: str) -> str:
    """Return the text unchanged."""
    return text


def upper(text: str) -> str:
    """Return the text with ASCII letters in upper case."""
    return text.translate(_UPPER)


def reverse(text: str) -> str:
    """Return the characters from last to first."""
    return text[::-1]


def rot13(text: str) -> str:
    """Return the text with ASCII letters moved 13 places round the alphabet. Case is kept."""
    return text.translate(_ROT13)


def pig_latin(text: str) -> str:
    """Return pig latin: the leading consonants of each run of ASCII letters go to its end, and "ay" follows.

    A run without leading consonants gets "way". A vowel is one of aeiou, or y where it is not the first letter; "qu"
    counts as a consonant. Letters keep their case, and other characters keep their place.
    """

    def turn(match: re.Match[str]) -> str:
        word = match.group()
        onset = _ONSET.match(word).group()  # type: ignore[union-attr]
        return word[len(onset) :] + onset + ("ay" if onset else "way")

    return _WORD.sub(turn, text)


VOICES: dict[str, Callable[[str], str]] = {
    "upper": upper,
    "reverse": reverse,
    "rot13": rot13,
    "pig-latin": pig_latin,
}
TASKS: dict[str, Callable[[str], str]] = {"repeat": repeat, **VOICES}


def answer(task: str, text: str) -> str:
    """Return the right answer of a voice to `text`. An empty text is answered as "(silence)"."""
    return TASKS[task](text or SILENCE)


def _listed(words: str) -> list[str]:
    return words.split()


_COMMON = _listed("""
the the the the a a an and and of of to to in in is it it you that he was for on are with as I I his they be
at one have this from or had by but not what all were we when your can said there use each which she do how
their if will up other about out many then them these so some her would make like him into has look two more
""")
_WORDS = _listed("""
actor adapter again air album alone always among answer apple aria arm art autumn away baby back bad band
bar base bass batch beat because bell best big bird black block blue board boat body book both box boy
branch brass bread bright bring brown build bus call came candle car care cat chair change child choir chord
church circle city class clear clock cloud coast cold color come cook corn count country cover cross crowd
cry cup dance dark day deep descant dog door down dragon draft dream drum dust early earth east easy eight
empty end engine evening ever every eye face fact family far farm fast father field fifth fire first fish
five flag flute fly follow food foot forest four fox free friend fruit garden gate gentle girl give glass go
gold good grass great green grow guitar hair half hand happy harbor harp hat head hear heart heavy hello
help hi high hill home horn horse hot hour house hundred ice idea iron island jar jazz jewel joke judge jug
juice jump jumps just keep keeps key kind king kitchen kite knee knife know lake lamp land large last late
laugh lazy leaf learn left letter light line lion list little live long lose loses lot low lunch machine map
march market master melody metal middle milk mind model money moon morning mother mountain mouse mouth move
music my name near never new night nine noise north nose note number oak ocean octave often oil old once
onion only open opera orange organ over own page paint paper park part past pause pen people phrase piano
picture pitch place plain plant play please point pond poor press queen question quick quiet quite quote
rain raven read real red rest rhythm rice ride right ring river road rock roof room root rope rose round run
sail salt same sand save scale school score sea second see send sentence seven shade sharp sheep ship shoe
short show sing singing singer six sky sleep slow small smile snow soft solo song soprano sound soup south
spring square stand star start stay step still stone stop storm story stream street string strong student
sugar summer sun sure sweet swim table talk tall tea teacher tempo ten thank think third thousand three
through time today together token tone town train travel tree true try tune twelve under until upon use
valley verse very violin violet visit voice wait walk wall want warm wash watch water wave way weather week
well west wheel white who why wide wild wind window winter wise wish wolf woman wonder wood word work world
write year yellow yes yesterday young zebra zero zone
""")
_FOREIGN = _listed("""
café naïve Zürich señor über crème Ångström déjà 日本 東京 音楽 пение голос хор μουσική ñandú œuvre £5 20€ – — … ’
“ ” 🎵 🎶 😀 ½ ° «oui» ça El niño
""")
_ONSETS = (
    _listed("b c d f g h j k l m n p qu r s t v w x y z bl br ch cl cr dr fl gr pl pr sh sl sp st str th tr wh")
    + [""] * 6
)
_NUCLEI = _listed("a e i o u a e i o u ai ea ee oo ou y")
_CODAS = _listed("b d g k l m n p r s t x ck ll nd ng nt rd st") + [""] * 10
_GAPS = (
    [" "] * 40
    + [", "] * 3
    + ["  ", "   ", "-", "; ", ": ", " - ", "'", "/", ". ", "? ", "! ", "_", " (", ") ", '"', "\n"]
)


def _made_word(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.60:
        syllables = rng.choice((1, 1, 2, 2, 3))
        parts = (rng.choice(_ONSETS) + rng.choice(_NUCLEI) + rng.choice(_CODAS) for _ in range(syllables))
        return "".join(parts)
    if kind < 0.76:
        return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 6)))
    if kind < 0.94:
        return "".join(rng.choices(string.digits, k=rng.randint(1, 5)))
    return "".join(rng.choices(string.printable[:95], k=rng.randint(1, 6)))


def _cased(rng: random.Random, word: str) -> str:
    kind = rng.random()
    if kind < 0.78:
        return word
    if kind < 0.90:
        return word.capitalize()
    if kind < 0.96:
        return word.upper()
    return "".join(rng.choice((c.lower(), c.upper())) for c in word)


def _pieces(rng: random.Random, foreign: bool) -> str:
    kind = rng.random()
    if foreign and kind < 0.3:
        return rng.choice(_FOREIGN)
    if kind < 0.45:
        return _cased(rng, rng.choice(_COMMON))
    if kind < 0.86:
        return _cased(rng, rng.choice(_WORDS))
    return _cased(rng, _made_word(rng))


def sentence(rng: random.Random, size: int, *, ascii_only: bool) -> str:
    """Return a pseudo-sentence of at most `size` bytes of UTF-8 (exactly `size` if it is ASCII)."""
    plain = rng.random() < 0.5  # words and single spaces, as most people write
    foreign = not ascii_only and rng.random() < 0.08
    parts, length = [], 0
    while length < size:
        part = _pieces(rng, foreign) + (" " if plain else rng.choice(_GAPS))
        parts.append(part)
        length += len(part.encode())
    text = "".join(parts).encode()[:size].decode(errors="ignore")
    if text and rng.random() < 0.6:
        text = text[0].upper() + text[1:] if ord(text[0]) < 128 else text
    if text and rng.random() < 0.5 and ord(text[-1]) < 128:
        text = text[:-1] + rng.choice("...!??")
    return text


def sample_text(rng: random.Random, task: str, shortest: int, longest: int) -> str:
    """Return a text for `task` with a length drawn uniformly from `shortest` to `longest` bytes."""
    return sentence(rng, rng.randint(shortest, longest), ascii_only=task == "reverse")
