"""What a caption lacks for this method: motion, background; and what it should leave out: the face itself.

Lists of English words, so these are counts and no verdicts: they say where to look. Nothing is changed.
"""

import re


def _words(text: str, ending: str = "") -> re.Pattern:
    """Any of the words, with other endings where `ending` allows them."""
    return re.compile(rf"\b(?:{'|'.join(text.split())}){ending}\b".replace("_", r"[\s-]"), re.IGNORECASE)


MOTION = _words(
    "turn walk run nod shak smil laugh grin frown blink wink open clos rais lift lower tilt lean bend look gaz glanc "
    "star mov com back step approach leav enter pass rotat spin danc jump sit_down stand_up ris kneel climb talk speak "
    "say sing shout whisper yawn sigh cough chew eat drink wav point reach grab hold_up pick put clap gestur touch "
    "rub brush wip scratch adjust throw catch push pull carry driv rid swim fly play typ writ read cook cut pour gap "
    "tip shift sway swing drop fall roll zoom pan_ kiss hug danc stretch cr(?:y|ie) weep nibbl lick pout squint face",
    r"(?:s|es|ed|d|e|ing|ning|ting|ping)?",
)
BACKGROUND = _words(
    "background backdrop behind in_front_of against before wall room street road office kitchen bedroom studio stage "
    "park garden forest wood beach sea ocean lake river mountain field sky city town building house window door "
    "curtain outdoor indoor outside inside car train bus shop store cafe restaurant bar bridge snow grass tree desk "
    "table sofa couch bench hallway corridor library gym church school classroom hospital market crowd gradient scene "
    "sunset night landscape",
    r"(?:s|es)?",
)
COLOR = "blue|green|brown|hazel|gr[ae]y|dark|light|amber|black|bright|almond-shaped|deep-set|round|narrow"
FACE = re.compile(
    rf"\b(?:(?:{COLOR})[\s-]+eye[sd]|(?:\w+-)?hair(?:ed|style|cut)?|beard(?:ed)?|m(?:o|ou)stached?|goatee|stubble|bald|"
    r"blond[e]?s?|brunette|redhead(?:ed)?|freckle[sd]?|wrinkle[sd]?|skin(?:ned)?|complexion|cheekbones?|jaw(?:line)?|"
    r"dimples?|scars?|eyebrows? (?:is|are)|(?:full|thin|plump)\W+lips|(?:long|short|straight|crooked|pointed|button|"
    r"broad|narrow)\W+nose|(?:round|oval|square|long|narrow|heart-shaped)\W+face)\b",
    re.IGNORECASE,
)


def names_motion(caption: str) -> bool:
    return bool(MOTION.search(caption))


def names_background(caption: str) -> bool:
    return bool(BACKGROUND.search(caption))


def face_words(caption: str) -> list[str]:
    """The words that describe the face, which the reference should decide."""
    return [match.group().lower() for match in FACE.finditer(caption)]
