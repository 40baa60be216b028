"""CREMA-D (https://github.com/CheyneyComputerScience/CREMA-D, ODbL): 91 actors, twelve sentences, six emotions.

    VideoDemographics.csv    SentenceFilenames.csv    AudioWAV/{actor}_{sentence}_{emotion}_{level}.wav

`emotion` is the one that was acted, not the listeners' vote. The corpus has no split: 10 % of the actors each are
validation and test, by a hash of their number.
"""

from collections.abc import Iterator
from pathlib import Path

from .schema import Report, make_row, read_csv, split_by

_EMOTIONS = {"ANG": "angry", "DIS": "disgust", "FEA": "fearful", "HAP": "happy", "NEU": "neutral", "SAD": "sad"}
_TEXTS = {
    "IEO": "It's eleven o'clock.",
    "TIE": "That is exactly what happened.",
    "IOM": "I'm on my way to the meeting.",
    "IWW": "I wonder what this is about.",
    "TAI": "The airplane is almost full.",
    "MTI": "Maybe tomorrow it will be cold.",
    "IWL": "I would like a new alarm clock.",
    "ITH": "I think I have a doctor's appointment.",
    "DFA": "Don't forget a jacket.",
    "ITS": "I think I've seen this before.",
    "TSI": "The surface is slick.",
    "WSI": "We'll stop in a couple of minutes.",
}


def read(root: Path, report: Report) -> Iterator[dict]:
    """Rows of every clip that `SentenceFilenames.csv` lists."""
    gender = {
        record["ActorID"]: record["Sex"].lower()
        for record in read_csv(root / "VideoDemographics.csv", ("ActorID", "Sex"))
    }
    for record in read_csv(root / "SentenceFilenames.csv", ("Filename",)):
        fields = record["Filename"].split("_")
        if len(fields) != 4:
            raise ValueError(
                f"{root / 'SentenceFilenames.csv'}: {record['Filename']!r} is no clip's name. Is it cut off?"
            )
        actor, sentence, emotion, _ = fields
        yield make_row(
            id=record["Filename"],
            corpus="cremad",
            split=split_by(f"cremad/{actor}", validation=0.1, test=0.1),
            audio=str(root / "AudioWAV" / f"{record['Filename']}.wav"),
            transcript=_TEXTS.get(sentence),
            speaker=f"cremad_{actor}",
            gender=gender.get(actor),
            emotion=_EMOTIONS.get(emotion),
        )
