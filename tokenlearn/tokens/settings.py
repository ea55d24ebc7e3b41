"""Settings of tokens that are about to be learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenlearn.errors import UserError, check_at_least, check_braces
from tokenlearn.tokens.embeddings import Embeddings
from tokenlearn.tokens.files.base import MOST_VECTORS
from tokenlearn.tokens.spaces import Space


@dataclass(frozen=True)
class TokenSettings:
    """Names, numbers and starting points of the tokens of a training.

    Attributes:
        placeholder: name of a class's token; ``{}`` is the class in lower case, with dashes for spaces.
        num_vectors: vectors per token.
        initial_words: word or words from whose embedding tokens start; ``{}`` is the class's name. Null searches for a
            word per class, where the method can.
        class_words: class to words in place of ``initial_words``, for classes that start from others.
        initial_embeddings: embedding files to start from instead, for the tokens in them.
        hold_norms: after each step, scale token vectors into the range of norms in the vocabulary.
        space: where the vectors live: ``input``, in place of the placeholder's embedding, so that other programs can
            use them; ``output``, added to the text encoder's output at all positions; or ``output_content``, added
            from the first content token on.

    Raises:
        UserError: if a token would have no vector or far more than a prompt takes, or start from no word, a text has
            braces other than ``{}``, or a setting is of the input space alone.
    """

    placeholder: str = "<{}>"
    num_vectors: int = 1
    initial_words: str | None = "a"
    class_words: dict[str, str] = field(default_factory=dict)
    initial_embeddings: Embeddings = field(default_factory=list)
    hold_norms: bool = False
    space: Space = "input"

    def __post_init__(self) -> None:
        check_at_least("tokens", 1, num_vectors=self.num_vectors)
        if self.num_vectors > MOST_VECTORS:
            raise UserError(f"tokens.num_vectors must be at most {MOST_VECTORS}, got {self.num_vectors}")
        if self.initial_words is not None and not self.initial_words.strip():
            raise UserError(
                "tokens.initial_words is empty; name a word, such as a, or set it to null to search for one"
            )
        check_braces(self.initial_words or "", "tokens.initial_words", "class")
        if empty := [name for name, words in self.class_words.items() if not words.strip()]:
            raise UserError(f"tokens.class_words of '{empty[0]}' is empty; name a word, such as a")
        if self.class_words and self.initial_words is None:
            raise UserError(
                "tokens.initial_words is null, which searches for the word of every class, but tokens.class_words has "
                f"words for {', '.join(self.class_words)}; set one of them"
            )
        check_braces(self.placeholder, "tokens.placeholder", "class")
        if self.space != "input" and (self.hold_norms or self.num_vectors != 1):
            name, value = ("hold_norms", "false") if self.hold_norms else ("num_vectors", "1")
            raise UserError(f"tokens.{name} is for the input space; set it to {value}, or tokens.space to input")

    def name(self, class_name: str) -> str:
        """Placeholder of a class."""
        return token_name(self.placeholder, class_name)

    def words_of(self, class_names: Sequence[str]) -> dict[str, str]:
        """Class to the words that its token starts from, "a" until a search finds others.

        Args:
            class_names: all classes.

        Raises:
            UserError: if there are words for something else than a class.
        """
        if unknown := [name for name in self.class_words if name not in class_names]:
            raise UserError(
                f"tokens.class_words has words for '{unknown[0]}', but the classes are {', '.join(class_names)}; name "
                "one of them"
            )
        words = (self.initial_words or "a").format
        return {name: self.class_words.get(name, words(name)) for name in class_names}


def token_name(placeholder: str, class_name: str) -> str:
    """Placeholder of a class.

    Args:
        placeholder: see :class:`TokenSettings`.
        class_name: the class.
    """
    return placeholder.format(class_name.lower().replace(" ", "-"))


def check_distinct(tokens: Sequence[tuple[str, str]]) -> None:
    """Refuse two classes with the same token.

    Args:
        tokens: each class, as a message names it, and its token.

    Raises:
        UserError: naming both classes.
    """
    owners: dict[str, str] = {}
    for owner, token in tokens:
        if token in owners:
            raise UserError(
                f"{owners[token]} and {owner} have the same token '{token}'; put '{{}}' for the class into "
                "tokens.placeholder, and name each class once"
            )
        owners[token] = owner
