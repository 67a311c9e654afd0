"""How dates, names, places, nationalities and occupations are spelled in encyclopedic English.

Regular expressions as text, to be put into larger ones; no groups of their own.
"""

from __future__ import annotations

import re

MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
MONTH = "|".join(MONTHS)
YEAR = r"(?:1\d{3}|20[0-2]\d)\b"
DATE = rf"(?:\d{{1,2}} (?:{MONTH}),? \d{{3,4}}|(?:{MONTH}) \d{{1,2}}, ?\d{{3,4}})"

_LINKING = "of|the|de|von|van|der|den|la|le|di|da|del|al|bin|ibn|y|e|af|zu|du|dos"
_WORD = r"[A-Z][\w'’.\-]*"
NAME = rf"{_WORD}(?:(?: (?:{_LINKING}))* {_WORD})*"
FULL_NAME = rf"{_WORD}(?:(?: (?:{_LINKING}))* {_WORD})+"
PLACE = rf"[A-Z][\w'’.\-]+(?: (?:(?:of|the|de|del|la|upon|on|am|and) )?{_WORD})*(?:, {_WORD}(?: {_WORD})*){{0,2}}"

NATIONALITY = (
    "South Korean|North Korean|South African|New Zealand|Sri Lankan|Hong Kong|Puerto Rican|American|British|"
    "English|Scottish|Welsh|Irish|French|German|Italian|Spanish|Portuguese|Dutch|Belgian|Swiss|Austrian|"
    "Swedish|Norwegian|Danish|Finnish|Icelandic|Polish|Czech|Slovak|Hungarian|Romanian|Bulgarian|Serbian|"
    "Croatian|Bosnian|Slovenian|Macedonian|Albanian|Greek|Turkish|Russian|Soviet|Ukrainian|Belarusian|"
    "Estonian|Latvian|Lithuanian|Armenian|Georgian|Kazakh|Indian|Pakistani|Bangladeshi|Nepali|Burmese|"
    "Chinese|Japanese|Korean|Taiwanese|Mongolian|Filipino|Philippine|Thai|Vietnamese|Indonesian|Malaysian|"
    "Singaporean|Australian|Canadian|Mexican|Brazilian|Argentine|Argentinian|Chilean|Colombian|Peruvian|"
    "Venezuelan|Uruguayan|Bolivian|Ecuadorian|Cuban|Jamaican|Iranian|Persian|Iraqi|Israeli|Lebanese|Syrian|"
    "Egyptian|Moroccan|Algerian|Tunisian|Nigerian|Ghanaian|Kenyan|Ethiopian|Ugandan|Zimbabwean|Luxembourgish|"
    "Maltese|Cypriot|Yugoslav|Malayalam|Tamil|Telugu|Kannada|Hindi|Bengali"
)

OCCUPATION = (
    "film director|theatre director|television director|film producer|record producer|television producer|"
    "film actor|film actress|stage actor|football player|basketball player|baseball player|hockey player|"
    "tennis player|singer-songwriter|actor|actress|director|producer|screenwriter|politician|singer|"
    "songwriter|writer|composer|lawyer|painter|poet|author|musician|footballer|businessman|historian|"
    "professor|journalist|cricketer|cinematographer|architect|photographer|novelist|playwright|pianist|"
    "guitarist|rapper|judge|mathematician|physician|engineer|philosopher|economist|diplomat|sculptor|chemist|"
    "physicist|botanist|conductor|boxer|wrestler|cyclist|swimmer|sprinter|rower|golfer|comedian|dancer|model|"
    "bishop|general|editor|critic|theologian|violinist|saxophonist|drummer|choreographer|animator|astronomer|"
    "biologist|psychologist|sociologist|inventor|explorer|missionary"
)

RULER = "king|queen|duke|duchess|count|countess|earl|prince|princess|emperor|empress|baron|lord|noble|nobleman|ruler"

_CAPITAL_CUT = re.compile(r"(?: (?:and|in|on|of|the|at|He|She|In|After|The|A|It|His|Her|This|for|with))+$")
_LAST_STOP = re.compile(r"(?<=[a-z]{3})[.,;:]+$")
_SENTENCE_END = re.compile(r"(?<=[a-z]{2})\. (?=[A-Z][a-z])")


def tidy(text: str) -> str:
    """A matched value without the punctuation and small words that a greedy name took along at its end."""
    text = _SENTENCE_END.split(text)[0]
    for _ in range(3):
        text = _CAPITAL_CUT.sub("", _LAST_STOP.sub("", text.strip(" ,;:'\"")))
    return text.strip(" ,;:")
