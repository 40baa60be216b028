"""CREMA-D (https://github.com/CheyneyComputerScience/CREMA-D, ODbL): 91 actors, twelve sentences, six emotions.

    VideoDemographics.csv    SentenceFilenames.csv    AudioWAV/{actor}_{sentence}_{emotion}_{level}.wav

`emotion` is the acted one, not the listeners' vote. The corpus has no split: 10 % of the actors are validation, 10 % are
test, by a hash of their number.
"""

from collections.abc import Iterator
from pathlib import Path

from ..text import split_by
from .checks import Report
from .reading import read_csv
from .row import Row, make_row

_EMOTIONS = {"ANG": "angry", "DIS": "disgust", "FEA": "fearful", "HAP": "happy", "NEU": "neutral", "SAD": "sad"}
_TEXTS = {"IEO": "It's eleven o'clock.", "TIE": "That is exactly what happened.", "TSI": "The surface is slick."}
_TEXTS |= {"IOM": "I'm on my way to the meeting.", "IWW": "I wonder what this is about."}
_TEXTS |= {"TAI": "The airplane is almost full.", "MTI": "Maybe tomorrow it will be cold."}
_TEXTS |= {"IWL": "I would like a new alarm clock.", "ITH": "I think I have a doctor's appointment."}
_TEXTS |= {"DFA": "Don't forget a jacket.", "ITS": "I think I've seen this before."}
_TEXTS |= {"WSI": "We'll stop in a couple of minutes."}


def read(root: Path, report: Report) -> Iterator[Row]:
    """Rows of all clips that `SentenceFilenames.csv` lists."""
    gender = {r["ActorID"]: r["Sex"].lower() for r in read_csv(root / "VideoDemographics.csv", ("ActorID", "Sex"))}
    names = root / "SentenceFilenames.csv"
    for name in (record["Filename"] for record in read_csv(names, ("Filename",))):
        fields = name.split("_")
        if len(fields) != 4:
            raise ValueError(f"{names}: {name!r} is not the name of a clip. Is it cut off?")
        actor, sentence, emotion, _ = fields
        known = {"id": name, "corpus": "cremad", "split": split_by(f"cremad/{actor}", validation=0.1, test=0.1)}
        known |= {"speaker": f"cremad_{actor}", "gender": gender.get(actor)}
        known |= {"transcript": _TEXTS.get(sentence), "emotion": _EMOTIONS.get(emotion)}
        yield make_row(**known, audio=str(root / "AudioWAV" / f"{name}.wav"))
