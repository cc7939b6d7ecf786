"""Make captions of answers: strip what introduces the description, and find answers that are no good captions."""

from __future__ import annotations

import re
from collections import Counter

from stdit_data.curation.captioners.prompts import Answer

EMPTY, CUT_OFF, REPEATED, REFUSED = "empty", "cut off", "repeated", "refused"
FLAGS = (EMPTY, CUT_OFF, REPEATED, REFUSED)
SENTENCES, IN_A_ROW = 3, 4  # a sentence that occurs as often, or words that follow themselves as often, are a loop

_MEDIUM = r"(?:video|clip|footage|film|scene|sequence|image|picture|photo(?:graph)?|frame)s?"
_WHICH = r"(?:the|this|these|that)(?:\s+(?:short|brief|given|provided|first|three|\d+)){0,2}"
_OPENERS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?:sure|certainly|of course|absolutely)\s*[,.!:]+\s*",
        r"here(?:'s|’s|\s+is|\s+are)\s[^.:\n]{0,80}:\s*",
        r"(?:caption|description|answer)\s*:\s*",
        rf"in\s+{_WHICH}\s+{_MEDIUM}\s*,?\s+(?:we\s+(?:can\s+)?see|you\s+(?:can\s+)?see|there\s+(?:is|are))\s+",
        rf"in\s+{_WHICH}\s+{_MEDIUM}\s*,\s*",
        rf"{_WHICH}(?:\s+{_MEDIUM}){{1,2}}\s+(?:appears?\s+to\s+|seems?\s+to\s+)?"
        r"(?:shows?|showing|depicts?|depicting|features?|captures?|presents?|displays?|portrays?|showcases?|"
        r"illustrates?|contains?|(?:is|are|be)(?=\s+(?:an?|of)\s))\s+(?:of\s+)?",
    )
]
_REFUSAL = re.compile(
    r"(?:unfortunately,?\s+)?(?:"
    r"(?:i['’]?m|i\s+am|we\s+are)\s+(?:very\s+|so\s+)?(?:sorry|unable|not\s+able|afraid)|sorry\b|my\s+apologies|"
    r"i\s+apologi[sz]e|i\s+(?:can\s?not|can['’]?t|do\s+not|don['’]?t|won['’]?t|will\s+not)\b|as\s+an?\s+(?:ai|language)\b|"
    r"(?:please\s+)?(?:provide|upload|share)\s+(?:me\s+)?(?:with\s+)?(?:the|an?|some)\s+(?:video|images?|frames?)|"
    r"(?:there\s+(?:is|are)\s+)?no\s+(?:video|images?|frames?)\s+(?:was|were|is|are|has|have|provided|attached)"
    r")",
    re.IGNORECASE,
)


def to_caption(answer: Answer) -> tuple[str | None, str | None]:
    """Return an answer as a caption, None if it is empty, and its flag, one of `FLAGS`; None for a good one."""
    text = strip_openers(answer.text)
    if not re.search(r"\w", text):
        return None, EMPTY
    if _REFUSAL.match(text):
        return text, REFUSED
    if repeats(text):
        return text, REPEATED
    return text, None if answer.finished else CUT_OFF


def strip_openers(text: str) -> str:
    """Return a text on one line without openers such as "The video shows"; it begins with a capital letter."""
    text = " ".join(text.split()).strip('"“” ')
    stripped = True
    while stripped:
        stripped = False
        for opener in _OPENERS:
            if found := opener.match(text):
                text, stripped = text[found.end() :], True
    return text[:1].upper() + text[1:]


def repeats(text: str) -> bool:
    """Return whether a text goes round in circles: the same sentence, or the same words in a row, again and again."""
    sentences = Counter(part.strip().casefold() for part in re.split(r"[.!?。！？]+\s*", text) if len(part.strip()) > 3)
    if max(sentences.values(), default=0) >= SENTENCES:
        return True
    words = re.findall(r"\w+", text.casefold())
    if len(words) < 8 < len(text):  # a script without spaces: the letters are its words
        words = [letter for letter in text if letter.isalnum()]
    for length in range(1, 13):
        run = 0
        for i in range(length, len(words)):
            run = run + 1 if words[i] == words[i - length] else 0
            if run >= length * (IN_A_ROW - 1):
                return True
    return False
