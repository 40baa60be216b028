"""The closed sets of the project: splits, attributes with their classes, tasks. Imports neither torch nor transformers."""

SPLITS = ("train", "validation", "test")
ATTRIBUTES = ("gender", "pitch", "tempo", "energy", "emotion")
KINDS = {"asr": "linguistic", "dialogue": "dual"} | dict.fromkeys(ATTRIBUTES, "paralinguistic")  # task -> kind
TASKS = tuple(KINDS)

LEVELS = {
    "gender": ("female", "male"),
    "pitch": ("low", "normal", "high"),
    "tempo": ("slow", "normal", "fast"),
    "energy": ("low", "normal", "high"),
}
# A corpus's word -> the one name of this emotion here; an emotion without an entry keeps its name.
EMOTIONS = {"happiness": "happy", "joy": "happy", "sadness": "sad", "anger": "angry"}
EMOTIONS |= {"fear": "fearful", "disgusted": "disgust", "surprise": "surprised"}
MEASURED = {"pitch": "pitch_hz", "energy": "energy_rms", "tempo": "seconds_per_word"}  # attribute -> column of a table

CAPTION_TEMPLATE = "({gender} voice, {pitch} pitch, {tempo} tempo, {energy} energy, {emotion} emotion)"
ATTRIBUTE_LABELS = {name: list(classes) for name, classes in LEVELS.items()} | {
    "emotion": ["neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised"]
}


def best_labels(attributes: dict[str, dict[str, float]] | None) -> dict[str, str]:
    """The most probable label of each attribute."""
    return {name: max(labels, key=lambda label: labels[label]) for name, labels in (attributes or {}).items()}
