"""
Generate short synthetic conversations that teach the model to take turns.

A model of this size learns the shape of a conversation, not knowledge: whose turn it is, that an
answer is short, and that the end-of-turn token follows it.
"""

# ruff: noqa: INP001 - a folder of scripts, no package

from __future__ import annotations

import random
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MAX_EXCHANGES = 3
SYSTEM_SHARE = 0.5


class Message(TypedDict):
    """One turn, as chat APIs spell it."""

    role: str
    content: str


Exchange = tuple[str, str]

_CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid",
    "Portugal": "Lisbon", "Austria": "Vienna", "Poland": "Warsaw", "Norway": "Oslo",
    "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen", "Greece": "Athens",
    "Hungary": "Budapest", "Ireland": "Dublin", "Japan": "Tokyo", "China": "Beijing",
    "India": "New Delhi", "Egypt": "Cairo", "Kenya": "Nairobi", "Canada": "Ottawa",
    "Cuba": "Havana", "Peru": "Lima", "Chile": "Santiago", "Russia": "Moscow",
}  # fmt: skip
_OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "up": "down", "open": "closed",
    "light": "dark", "early": "late", "full": "empty", "new": "old", "hard": "soft",
    "true": "false", "left": "right", "high": "low", "wet": "dry", "good": "bad",
}  # fmt: skip
_COLOURS = {
    "the sky": "blue", "grass": "green", "snow": "white", "coal": "black", "a lemon": "yellow",
    "blood": "red", "an orange": "orange", "the sea": "blue", "milk": "white", "gold": "yellow",
}  # fmt: skip
_DEFINITIONS = {
    "a function": "A function is a named block of code that takes arguments and returns a value.",
    "a list": "A list is an ordered collection of items.",
    "a database": "A database is an organized collection of data that can be queried.",
    "a test": "A test is code that checks that other code behaves as expected.",
    "a template": "A template is a text with places that are filled in later.",
    "a module": "A module is a file that contains Python code.",
    "a class": "A class describes what its objects contain and what they can do.",
    "a server": "A server is a program that answers requests from clients.",
    "a variable": "A variable is a name that refers to a value.",
    "a loop": "A loop runs the same code several times.",
    "a string": "A string is a sequence of characters.",
    "a cache": "A cache keeps results so that they can be used again quickly.",
}
_KINDS = {
    "colours": ["red", "green", "blue", "yellow", "white", "black", "orange"],
    "animals": ["cat", "dog", "horse", "cow", "bird", "fish", "mouse"],
    "fruits": ["apple", "pear", "plum", "cherry", "lemon", "orange", "banana"],
    "Python types": ["int", "str", "list", "dict", "tuple", "set", "float"],
}
_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_NUMBERS = ["two", "three", "four"]
_WORDS = (
    "table", "window", "river", "stone", "garden", "paper", "music", "letter", "engine",
    "bridge", "cloud", "forest", "hammer", "island", "kitchen", "lantern", "market", "needle",
    "ocean", "pencil", "query", "railway", "signal", "tunnel", "valley", "winter", "yellow",
)  # fmt: skip
_SYSTEM_TEXTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "Answer in one sentence.",
    "You are tiny-llama, a small example model.",
    "Be polite and concise.",
    "",
)
_REFUSED = (
    "How do I break into a house?", "Tell me how to steal a password.",
    "Write a virus for me.", "What is my neighbour's phone number?",
    "How can I make a bomb?", "Help me cheat in my exam.",
)  # fmt: skip
_REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "Sorry, I can't help with that request.",
)
_GREETINGS = ("Hello!", "Hi!", "Hi there.", "Good morning!", "Hello, can you help me?")
_GREETING_ANSWERS = ("Hello! How can I help you?", "Hi! What can I do for you?")


def _capital(rng: random.Random) -> Exchange:
    country, city = rng.choice(sorted(_CAPITALS.items()))
    question = rng.choice(["What is the capital of {}?", "Name the capital of {}.",
                           "Which city is the capital of {}?"])  # fmt: skip
    return question.format(country), f"The capital of {country} is {city}."


def _sum(rng: random.Random) -> Exchange:
    left, right = rng.randint(0, 20), rng.randint(0, 20)
    question = rng.choice(["What is {} + {}?", "Add {} and {}.", "How much is {} plus {}?"])
    return question.format(left, right), f"{left} + {right} = {left + right}"


def _difference(rng: random.Random) -> Exchange:
    right = rng.randint(0, 10)
    left = right + rng.randint(0, 10)
    question = rng.choice(["What is {} - {}?", "How much is {} minus {}?"])
    return question.format(left, right), f"{left} - {right} = {left - right}"


def _opposite(rng: random.Random) -> Exchange:
    word, other = rng.choice(sorted(_OPPOSITES.items()))
    if rng.random() < 0.5:  # noqa: PLR2004 - the relation is symmetric: ask it both ways
        word, other = other, word
    return f"What is the opposite of {word}?", f"The opposite of {word} is {other}."


def _colour(rng: random.Random) -> Exchange:
    thing, colour = rng.choice(sorted(_COLOURS.items()))
    return f"What colour is {thing}?", f"{thing[0].upper()}{thing[1:]} is {colour}."


def _definition(rng: random.Random) -> Exchange:
    thing, definition = rng.choice(sorted(_DEFINITIONS.items()))
    question = rng.choice(["What is {}?", "Explain what {} is.", "Tell me what {} is."])
    return question.format(thing), definition


def _enumeration(rng: random.Random) -> Exchange:
    kind, items = rng.choice(sorted(_KINDS.items()))
    count = rng.randrange(len(_NUMBERS))
    chosen = rng.sample(items, count + 2)
    lines = "\n".join(f"{number}. {item}" for number, item in enumerate(chosen, start=1))
    return f"List {_NUMBERS[count]} {kind}.", lines


def _repetition(rng: random.Random) -> Exchange:
    words = " ".join(rng.sample(_WORDS, rng.randint(1, 4)))
    question = rng.choice(["Repeat: {}", "Say this again: {}", "Echo: {}"])
    return question.format(words), words


def _counting(rng: random.Random) -> Exchange:
    last = rng.randint(2, 12)
    return f"Count to {last}.", ", ".join(str(number) for number in range(1, last + 1))


def _next_day(rng: random.Random) -> Exchange:
    day = rng.randrange(len(_DAYS))
    following = _DAYS[(day + 1) % len(_DAYS)]
    return f"Which day comes after {_DAYS[day]}?", f"{following} comes after {_DAYS[day]}."


def _greeting(rng: random.Random) -> Exchange:
    return rng.choice(_GREETINGS), rng.choice(_GREETING_ANSWERS)


def _thanks(rng: random.Random) -> Exchange:
    return rng.choice(["Thank you!", "Thanks.", "Great, thank you."]), "You're welcome!"


def _identity(rng: random.Random) -> Exchange:
    question = rng.choice(["Who are you?", "What is your name?", "What are you?"])
    return question, "I am tiny-llama, a small example model."


def _refusal(rng: random.Random) -> Exchange:
    return rng.choice(_REFUSED), rng.choice(_REFUSALS)


_SKILLS: Sequence[Callable[[random.Random], Exchange]] = (
    _capital, _sum, _difference, _opposite, _colour, _definition, _enumeration, _repetition,
    _counting, _next_day, _greeting, _thanks, _identity, _refusal,
)  # fmt: skip


def dialogues(seed: int) -> Iterator[list[Message]]:
    """Endless conversations of one to MAX_EXCHANGES exchanges, the same for the same seed."""
    rng = random.Random(seed)  # noqa: S311 - reproducible text, not a secret
    while True:
        messages: list[Message] = []
        if rng.random() < SYSTEM_SHARE:
            messages.append({"role": "system", "content": rng.choice(_SYSTEM_TEXTS)})
        for _ in range(rng.randint(1, MAX_EXCHANGES)):
            question, answer = rng.choice(_SKILLS)(rng)
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        yield messages
