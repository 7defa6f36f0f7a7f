"""Word lists of the generated prompts. Calibration and held-out prompts never share a key, a name or a place."""

from __future__ import annotations

import random
from collections.abc import Sequence

from fluxc.data.prompt import CALIBRATION


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words("""
amber ancient bitter blue brave broken bronze calm clever cold copper crimson curious dark distant dusty early eager
empty fading famous gentle golden grand green hidden hollow humble icy jolly lazy little lonely loud lucky mellow
misty modest narrow noble olive pale patient plain polite proud purple quick quiet rapid red rough round rusty salty
scarlet sharp silent silver simple sleepy slow small smooth solid stormy sunny sweet swift tall tender tiny violet
warm white wild windy wise wooden yellow young
""")

NOUNS = _words("""
anchor apple arrow badger barrel basket beacon bell bird boat bottle branch bridge bucket button cabin candle canyon
carpet castle cherry circle cliff clock cloud coin compass cottage crown desert diamond dragon drum eagle engine
falcon feather fiddle flower forest fountain fox garden gate glacier guitar hammer harbor hawk hill horse island
jacket jewel kettle key kite ladder lake lamp lantern lemon lion lizard magnet maple marble meadow mirror monkey
mountain needle oak ocean onion orchard otter owl panda pearl pencil pepper piano pillow pine planet pony pumpkin
rabbit raven ribbon river robin rocket saddle sailor salmon shadow shell ship spider spoon squirrel star statue
stone temple thunder tiger tower train tree trumpet tulip tunnel turtle valley violin wagon walnut whale wheel
willow window wolf
""")

FIRST_NAMES = _words("""
Adam Agnes Albert Alice Anna Arthur Barbara Ben Bruno Carl Clara Daniel Diana Edgar Edith Emma Eric Felix Frank
George Grace Hannah Harold Helen Henry Ida Irene Isaac Ivan Jack Jane Julia Karen Karl Kate Laura Leo Lily Louis
Lucy Maria Mark Martha Max Mia Nina Nora Oliver Oscar Paul Peter Rachel Robert Rosa Ruth Sam Sarah Simon Sophie
Thomas Tom Victor Vera Walter
""")

PLACES = _words("""
Amsterdam Athens Baghdad Bangkok Barcelona Beijing Berlin Bogota Boston Brussels Budapest Cairo Chicago Copenhagen
Dallas Delhi Dublin Geneva Hamburg Havana Helsinki Istanbul Jakarta Kyoto Lagos Lima Lisbon London Madrid Manila
Miami Milan Montreal Moscow Munich Nairobi Naples Oslo Paris Prague Rome Seattle Seoul Singapore Stockholm Sydney
Tehran Tokyo Toronto Venice Vienna Warsaw Zurich
""")

COMPANIES = _words("""
bakery bank brewery circus cinema clinic factory gallery hospital hotel laboratory library market museum observatory
opera pharmacy prison refinery shipyard stadium studio theater university warehouse winery zoo
""")


def half(words: Sequence[str], split: str) -> Sequence[str]:
    """The half of a word list that belongs to a split."""
    return words[0::2] if split == CALIBRATION else words[1::2]


def word_pairs(rng: random.Random, split: str, count: int) -> list[str]:
    """Distinct keys such as `silent harbor`; no two of them share a word."""
    adjectives = rng.sample(half(ADJECTIVES, split), count)
    return [f"{a} {n}" for a, n in zip(adjectives, rng.sample(half(NOUNS, split), count), strict=True)]


def number(rng: random.Random, digits: int = 7) -> str:
    """A number of that many digits; it does not start with 0."""
    return str(rng.randrange(10 ** (digits - 1), 10**digits))
