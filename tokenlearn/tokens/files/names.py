"""Names of embedding files, which are the words that trigger them in most programs.

AUTOMATIC1111, Forge, SD.Next, kohya's ``gen_img`` and stable-diffusion.cpp replace the file's name wherever it stands
in a prompt, so a file named ``hat`` changes every prompt with a hat in it, and kohya and SD.Next fail on names that
are words of the text encoder's vocabulary. A name in two parts with a hyphen between them never is one: CLIP's
tokenizer first splits text into runs of letters, single digits and runs of other signs, and each unit of its
vocabulary is part of one such piece (the pattern of ``simple_tokenizer.py`` in https://github.com/openai/CLIP).
"""

from __future__ import annotations

import re
import unicodedata

from tokenlearn.errors import UserError

SAFETENSORS = ".safetensors"
SUFFIX = "-tl"
"""End of default names, which makes a name that is no word of one."""

_CASE_MATTERS = "ComfyUI on Linux and InvokeAI take the name with upper and lower case as it is"
_ASCII_ALONE = "InvokeAI takes no name with '{}'; ComfyUI and AUTOMATIC1111 take it as it is typed"
_MAY_BE_A_WORD = (
    "may be a word of the text encoder's vocabulary: AUTOMATIC1111, Forge and stable-diffusion.cpp would replace the "
    "word in every prompt, kohya and SD.Next fail"
)


def default_stem(token: str) -> str:
    """Name of a token's file without its suffix: ``<Wizard>`` gives ``wizard-tl``.

    ComfyUI cuts names at ``<`` and ``[`` and at spaces.

    Raises:
        UserError: if the token has no letter or digit to make a name of.
    """
    stem = re.sub(r"[^\w.-]+", "-", token.lower()).strip("-.")
    if not stem:
        raise UserError(f"cannot make a file name of the token '{token}'; use letters or digits in it")
    return stem if stem.endswith(SUFFIX) else f"{stem}{SUFFIX}"


def embedding_file_name(token: str) -> str:
    """File name for a token, which is no word of a vocabulary: ``<Wizard>`` gives ``wizard-tl.safetensors``.

    Raises:
        UserError: if the token has no letter or digit to make a name of.
    """
    return f"{default_stem(token)}{SAFETENSORS}"


def checked_stem(name: str) -> str:
    """A name that the user chose for a file, without its suffix.

    Raises:
        UserError: if a program cannot take it: it is empty, or has spaces, brackets, commas, colons or separators.
    """
    stem = name.removesuffix(SAFETENSORS)
    if found := re.search(r"[\s<>\[\](){},:;|\\/\"'*?]", stem):
        raise UserError(
            f"the name '{name}' has '{found[0]}', which prompts of ComfyUI, AUTOMATIC1111 or InvokeAI cannot hold; "
            f"use letters, digits, '-', '_' and '.', such as '{default_stem(name) if _letters(name) else 'my-tl'}'"
        )
    if not _letters(stem) or stem.startswith(".") or not stem.isprintable():
        raise UserError(f"the name '{name}' is no name of a file; use letters or digits, such as 'my-tl'")
    return stem


def name_warnings(stem: str) -> list[str]:
    """What to know about a file's name, one line for each kind of program that it troubles.

    Args:
        stem: the name without its suffix.
    """
    found = []
    if may_be_a_word(stem):
        found.append(f"'{stem}' {_MAY_BE_A_WORD}; a name such as '{default_stem(stem)}' is none")
    if stem != stem.lower():
        found.append(f"'{stem}' has capitals: {_CASE_MATTERS}; '{stem.lower()}' is safe")
    if foreign := next((letter for letter in stem if not letter.isascii()), None):
        found.append(f"'{stem}' is not of ASCII letters: {_ASCII_ALONE.format(foreign)}")
    return found


def may_be_a_word(text: str) -> bool:
    """Whether a text may be one unit of CLIP's vocabulary: False is certain, True is not."""
    return len(clip_pieces(text)) <= 1


def clip_pieces(text: str) -> list[str]:
    """Pieces that CLIP's tokenizer splits lower-case text into before it looks units up.

    They are runs of letters, single digits and other numbers, and runs of other visible signs. Contractions such as
    ``'s`` are pieces of their own in CLIP and two pieces here, which matters to no name of a file.
    """
    pieces: list[str] = []
    before = ""
    for letter in text:
        kind = "space" if letter.isspace() else unicodedata.category(letter)[0]
        kind = kind if kind in ("space", "L", "N") else "sign"
        if kind == before and kind != "N":
            pieces[-1] += letter
        else:
            pieces.append(letter)
        before = kind
    return [piece for piece in pieces if not piece.isspace()]


def _letters(text: str) -> bool:
    return any(letter.isalnum() for letter in text)
