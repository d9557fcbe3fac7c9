"""Scenes of the demo world: what a caption says (attributes) and what it does not (a seed for all geometry)."""

from dataclasses import dataclass

from ..errors import require, require_one_of
from .layout import DRIFT, generator, measures

KINDS = ("car", "boat", "ball", "balloon", "house")
COLOURS = ("red", "yellow", "green", "blue", "purple", "white")
SEASONS = ("summer", "autumn", "winter")
TIMES = ("day", "sunset", "night")
STYLES = ("photo", "pencil sketch", "watercolour", "oil painting", "comic", "pixel art")

ATTRIBUTES = {"kind": KINDS, "colour": COLOURS, "season": SEASONS, "time": TIMES, "style": STYLES}
CAPTION_VARIANTS = 8

_PLACES = {
    "car": "on a road",
    "boat": "on a lake",
    "ball": "on the grass",
    "balloon": "in the sky",
    "house": "on a meadow",
}
_WHEN = {"day": "by day", "sunset": "at sunset", "night": "at night"}


@dataclass(frozen=True)
class Scene:
    """One place of the demo world.

    Attributes:
        seed: of all geometry, 0 to 2**63 - 1. The attributes below change none of it.
        kind: what the object is; one of KINDS, and so on for the others.
        colour: of the object.
        style: of the picture.

    Raises:
        InputError: for an attribute or a seed that the world does not have.
    """

    seed: int
    kind: str
    colour: str
    season: str
    time: str
    style: str = "photo"

    def __post_init__(self):
        require(0 <= self.seed < 2**63, "Scene", "seed", self.seed, "a whole number from 0 to 2**63 - 1")
        for name, options in ATTRIBUTES.items():
            require_one_of(getattr(self, name), options, "Scene", name)

    @classmethod
    def random(cls, seed: int) -> "Scene":
        """A scene whose attributes are drawn from the seed as well; the style is any of STYLES."""
        draws = generator(seed, "attributes")
        return cls(seed, **{name: options[draws.integers(len(options))] for name, options in ATTRIBUTES.items()})

    def random_view(self, seed: int) -> tuple[float, float]:
        """A camera position (picture heights) and a clock (seconds) that show the object wholly inside the picture."""
        draws = generator(seed, "view")
        clock = float(draws.uniform(0, 60))
        return self.follow(clock) + float(draws.uniform(-DRIFT, DRIFT)), clock

    def follow(self, clock: float) -> float:
        """The camera position that moves along with the object; DRIFT to either side still shows it all."""
        return self.velocity * clock

    @property
    def velocity(self) -> float:
        """Of the object along the ground, in picture heights a second."""
        return measures(self.seed, self.kind)["velocity"]

    def caption(self, variant: int = 0) -> str:
        """One of CAPTION_VARIANTS sentences that name every attribute that can be read off the picture.

        A pencil sketch is grey: colour, season and time cannot be read off it, and its caption names none of them.
        """
        grey = self.style == "pencil sketch"
        thing = "hot air balloon" if self.kind == "balloon" and variant % 2 else self.kind
        thing = thing if grey else f"{self.colour} {thing}"
        time, when = ("", "") if grey else (self.time, _WHEN[self.time])
        style = f"an {self.style}" if self.style == "oil painting" else f"a {self.style}"
        season, on = ("", "") if grey else (self.season, f"in {self.season}")
        place = _PLACES[self.kind]
        sentences = (
            ((style, "of a", thing, place, on, when),),
            (("a", thing, place), (season,), (time,), (self.style,)),
            ((style,), (season, time), ("a", thing, place)),
            (("a", thing, place, when, on), (self.style,)),
            ((style, "of a", thing), (season,), (time,)),
            ((season, when), (style, "of a", thing, place)),
            ((style, "of a", season, "landscape", when, "with a", thing),),
            ((thing, place), (season, time, self.style)),
        )
        parts = (" ".join(word for word in part if word) for part in sentences[variant % CAPTION_VARIANTS])
        return ", ".join(part for part in parts if part)
