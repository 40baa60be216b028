"""The command line: `dual-slm backbones | reply | corpus | align | train | evaluate | push | benchmark`."""

import argparse
import json
import os
import platform
import re
import sys
import tempfile
import time
from pathlib import Path

DTYPES = ("auto", "float32", "bfloat16", "float16")


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default=None, help="checkpoint: a folder or Hub id (default: the released small one)"
    )
    parser.add_argument("--revision", default=None, help="branch, tag or commit on the Hub")
    for side in ("audio", "text"):
        parser.add_argument(
            f"--{side}-model-id", default=None, help=f"where the same {side} backbone is on this machine"
        )
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of the backbones")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code in the checkpoint in place of this package's"
    )


DEFAULT_CHECKPOINT = "dual-slm-smollm2-135m"


def default_checkpoint() -> str:
    """`model_cards/dual-slm-smollm2-135m` of this checkout, else of the working folder."""
    for root in (Path(__file__).parent.parent, Path.cwd()):
        folder = root / "model_cards" / DEFAULT_CHECKPOINT
        if (folder / "config.json").is_file():
            return str(folder)
    raise FileNotFoundError(
        f"model_cards/{DEFAULT_CHECKPOINT} is not here: run in a checkout of the repository, or name a checkpoint by --model."
    )


def _fit_dtype(args: argparse.Namespace) -> None:
    """`--dtype bfloat16` becomes float32 on a CPU that crawls in it."""
    if getattr(args, "dtype", "auto") != "auto" and args.device == "cpu":
        from .backbones import fast_dtype

        args.dtype = fast_dtype(args.dtype, sys.stderr)


def load(args: argparse.Namespace):
    """Model and processor of a checkpoint."""
    import torch
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    from .. import register_auto_classes
    from ..modeling_dual_slm import name_in_errors

    register_auto_classes()
    name = args.model or default_checkpoint()
    if not Path(name).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise FileNotFoundError(f"{name}: no such folder, and no Hub id (OWNER/NAME).")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: this machine has no CUDA device; use --device cpu.")
    options = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    with name_in_errors(name):
        processor = AutoProcessor.from_pretrained(name, **options)
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    device_map = None if args.device == "cpu" else {"": args.device}
    given = {name: getattr(args, name, None) for name in ("audio_model_id", "text_model_id")}
    options |= {name: value for name, value in given.items() if value is not None}
    model = AutoModelForMultimodalLM.from_pretrained(name, dtype=dtype, device_map=device_map, **options)
    return model, processor


# --------------------------------------------------------------------------------------------------------------------


def backbones(args: argparse.Namespace) -> None:
    """Fetch, check and convert the pip-hosted backbones; print where they are."""
    from .backbones import BACKBONES, DEFAULT_BACKBONES, fetch_backbone

    if args.list:
        for name, backbone in BACKBONES.items():
            print(f"{name:24} {backbone.about}")
        return
    for name in args.names or DEFAULT_BACKBONES:
        print(f"{name:24} {fetch_backbone(name)}")


def reply(args: argparse.Namespace) -> None:
    """What is heard in each file, how it is said, and the reply; several files are turns of one conversation."""
    for file in args.files:
        if not Path(file).is_file() and "://" not in file:
            raise FileNotFoundError(f"{file}: no such file.")
    model, processor = load(args)
    if args.hotwords:
        processor.set_hotwords(model, args.hotwords)
    generation = {"max_new_tokens": args.max_new_tokens}
    if args.temperature > 0:
        generation |= {"do_sample": True, "temperature": args.temperature}
    transcribe = None
    if processor.linguistic_adapter_type == "none" and model.config.audio_config.model_type == "whisper":
        transcribe = _decoder(model)
    if args.say is None and processor.attribute_questions:  # it was trained to be asked, not to chat
        args.say = processor.question(next(iter(processor.attribute_questions)))
    conversation = processor.conversation(model, system=args.system, transcribe=transcribe, **generation)
    if args.files:
        for file in args.files:
            _turn(conversation, args, audio=file)
        return
    print("Type the name of an audio file, or a sentence. An empty line ends the conversation.", file=sys.stderr)
    while True:
        try:
            line = input("you> ").strip()
        except EOFError:
            return
        if not line:
            return
        audio = line if Path(line).is_file() or "://" in line else None
        try:
            _turn(conversation, args, audio=audio, text=None if audio else line)
        except (ValueError, OSError) as error:
            print(f"dual-slm: {error}", file=sys.stderr)


def _decoder(model):
    """Whisper's own decoder, for checkpoints that take the words as text; loaded at the first clip."""
    from ..modeling_dual_slm import resolve_backbone
    from ..processing_dual_slm import load_audio
    from .backbones import transcriber

    made = []

    def transcribe(audio) -> str:
        if not made:
            made.append(transcriber(resolve_backbone(model.config.audio_model_id)))
        return made[0](load_audio(audio))

    return transcribe


def _turn(conversation, args: argparse.Namespace, audio: str | None = None, text: str | None = None) -> None:
    start = time.perf_counter()
    said = args.say if audio is not None else text
    if args.json:
        turn = conversation.say(audio=audio, text=said)
        attributes = {name: max(p, key=p.get) for name, p in (turn["attributes"] or {}).items()} or None
        result = {"file": audio, "heard": turn["heard"], "attributes": attributes, "probabilities": turn["attributes"]}
        print(json.dumps(result | {"reply": turn["reply"], "seconds": round(time.perf_counter() - start, 3)}))
        return
    pieces = conversation.stream(audio=audio, text=said)
    first = next(pieces, "")
    turn = conversation.current_turn
    if audio is not None:
        print(f"\nfile        {audio}")
        if turn["heard"] is not None:
            print(f"heard       {turn['heard'] or '(nothing)'}")
        if turn["attributes"] is not None:
            best = {name: max(p, key=p.get) for name, p in turn["attributes"].items()}
            print("attributes  " + ", ".join(f"{n} {v} ({turn['attributes'][n][v]:.0%})" for n, v in best.items()))
    print(f"reply       {first}", end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print(f"\nseconds     {time.perf_counter() - start:.2f}", flush=True)


def calibrate(args: argparse.Namespace) -> None:
    """Fit a temperature for each attribute on validation speakers; the checkpoint's probabilities are right as often as
    they say."""
    from .evaluation.calibrate import calibrate as fit
    from .evaluation.calibrate import calibration_rows
    from .evaluation.systems import Checkpoint, load_system
    from .journal import write_text

    path = Path(args.checkpoint) / "processor_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a checkpoint's folder is calibrated in place.")
    with tempfile.TemporaryDirectory() as folder:
        system = load_system(args.checkpoint, args.features or folder, dtype=args.dtype, device=args.device)
        if not isinstance(system, Checkpoint):
            raise ValueError(f"{args.checkpoint} is no checkpoint of this package.")
        rows = calibration_rows(args.data, system.model.config.attribute_thresholds)
        for name, found in fit(system, rows).items():
            print(name + "  " + ", ".join(f"{k} {v:.2f}" if k != "clips" else f"{v} clips" for k, v in found.items()))
    values = json.loads(path.read_text(encoding="utf-8"))
    values["attribute_temperatures"] = system.processor.attribute_temperatures
    write_text(path, json.dumps(values, indent=2, sort_keys=True) + "\n")  # as save_pretrained writes it


def push(args: argparse.Namespace) -> None:
    """Load a checkpoint folder, then push its model, processor and card to the Hub."""
    from huggingface_hub import HfApi

    folder = Path(args.folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no checkpoint: it has no config.json.")
    args.model, args.revision, args.dtype, args.device, args.trust_remote_code = (
        str(folder),
        None,
        "auto",
        "cpu",
        False,
    )
    model, processor = load(args)  # what cannot be loaded is not pushed
    for name in ("audio_model_id", "text_model_id"):
        if os.path.isdir(getattr(model.config, name)):
            print(
                f"{name} is the folder {getattr(model.config, name)}: who pulls this must name theirs, "
                f"from_pretrained(..., {name}=...)",
                file=sys.stderr,
            )
    api = HfApi()
    api.create_repo(args.repo, private=args.private, exist_ok=True)
    model.push_to_hub(args.repo, commit_message=args.message)
    processor.push_to_hub(args.repo, commit_message=args.message)
    about = ["README.md", "evaluation.json", "training_log.json", "*.png", "examples/*"]  # the card, and what it shows
    api.upload_folder(folder_path=folder, repo_id=args.repo, allow_patterns=about, commit_message=args.message)
    if args.tag:
        api.create_tag(args.repo, tag=args.tag)
    print(f"{api.endpoint}/{args.repo}")


def corpus_build(args: argparse.Namespace) -> None:
    """Synthesise a small complete corpus: synthesisers speak sentences, or the rows of a table."""
    from .corpora.synthesis import ENGINES, VOICES, build, read_texts

    if args.list_voices:
        for voice in VOICES:
            print(
                f"{voice.engine:10} {voice.name:20} {voice.gender:7} {voice.split:11} {voice.share:4.0%}  {voice.licence}"
            )
        return
    if args.out is None:
        raise ValueError("--out DIR says where the corpus is made.")
    texts = read_texts(args.texts)
    hours = args.hours if args.hours is not None or (texts and isinstance(texts[0], dict)) else 0.5
    print(build(texts, args.out, hours, args.seed, args.processes, tuple(args.engines or ENGINES)))


def corpus_read(args: argparse.Namespace) -> None:
    """Read a corpus from its own files into a table; audio by reference."""
    from .corpora import reader
    from .corpora.schema import Report, check_rows, write_table

    root, out = Path(os.path.abspath(args.root)), Path(args.out)  # tables hold whole paths, wherever they are used
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder: --root is where the corpus was unpacked.")
    options = {"role_reversed": True} if args.role_reversed else {}
    if options and args.name != "styletalk":
        raise ValueError(f"--role-reversed is StyleTalk's second test, not {args.name}'s.")
    if args.fold is not None:
        if args.name != "iemocap":
            raise ValueError(
                "--fold is for IEMOCAP, whose sessions are the folds; others are cut by `dual-slm corpus folds`."
            )
        options["fold"] = args.fold
    report = Report()
    rows = check_rows(
        reader(args.name)(root, report, **options), report, args.allow_missing_audio, out.with_suffix(".audio")
    )
    count = write_table(rows, out, progress=args.name)
    if report:
        print(report)
    print(f"{count:,} rows in {out}")


def corpus_folds(args: argparse.Namespace) -> None:
    """Cross-validation over the speakers of a table; a table for each fold, the table's own test speakers in none."""
    from .corpora.schema import SPLITS, cross_validated, read_table, write_table

    for number, rows in enumerate(cross_validated(read_table(args.table), args.folds), 1):
        path = Path(args.out) / f"fold-{number}.parquet"
        write_table(rows, path)
        names = {split: sorted({row["speaker"] for row in rows if row["split"] == split}) for split in SPLITS}
        print(f"{path}: " + "; ".join(f"{split} {', '.join(those)}" for split, those in names.items()))


def corpus_label(args: argparse.Namespace) -> None:
    """Measure pitch, energy and tempo of each clip, label them and write captions; in place unless --out is given."""
    from .attributes import Thresholds, label_row, measure_rows, read_thresholds, tertiles, write_thresholds
    from .corpora.schema import Report, read_table, write_table
    from .journal import Journal

    out, report = Path(args.out or args.table), Report()
    journal = Journal(f"{out}.measured.jsonl")
    rows = list(measure_rows(list(read_table(args.table)), journal, report, args.processes))
    if args.thresholds == "textrolspeech":
        thresholds = {"all": Thresholds()}
    elif args.thresholds == "tertiles":
        thresholds = tertiles(rows)
    else:
        thresholds = read_thresholds(args.thresholds)
    count = write_table((label_row(row, thresholds, args.seed, args.overwrite) for row in rows), out)
    write_thresholds(thresholds, out.with_suffix(".thresholds.json"))
    journal.remove()
    if report:
        print(report)
    for gender, borders in thresholds.items():
        print(f"{gender}: pitch {borders.pitch} Hz, energy {borders.energy} RMS, tempo {borders.tempo} s a word")
    print(f"{count:,} rows in {out}, borders in {out.with_suffix('.thresholds.json')}")


def corpus_stats(args: argparse.Namespace) -> None:
    """Counts, hours, labels, speakers, leaks between splits, and where speech begins; as text and as a picture."""
    from transformers import AutoTokenizer

    from ..modeling_dual_slm import resolve_backbone
    from .corpora.schema import read_table
    from .stats import describe_table, first_speech_positions, leaks, plot_table

    rows = list(read_table(*args.tables))
    tokenizer = AutoTokenizer.from_pretrained(resolve_backbone(args.tokenizer))
    positions = first_speech_positions(rows, tokenizer)
    print(describe_table(rows, positions))
    out = Path(args.out or Path(args.tables[0]).with_suffix(".png"))
    plot_table(rows, out, positions, title=", ".join(Path(table).name for table in args.tables))
    print(f"\npicture in {out}")
    if args.check and leaks(rows)[0]:
        raise ValueError("splits leak into each other (--check), see above.")


def corpus_show(args: argparse.Namespace) -> None:
    """Print conversations of a table as a model is trained on them, and the batch that they make."""
    from transformers import AutoProcessor

    from .. import register_auto_classes
    from .collator import DualSLMCollator
    from .corpora.schema import read_table
    from .tasks import label_sets, make_sample, tasks_of

    register_auto_classes()
    table = read_table(args.table)
    rows = (
        row for row in table if row["split"] == args.split and (args.task in (None, *tasks_of(row)) and tasks_of(row))
    )
    rows = [row for row, _ in zip(rows, range(args.count), strict=False)]
    if not rows:
        raise ValueError(f"{args.table} has no {args.split} row for {args.task or 'any task'}.")
    choices = label_sets(table)
    tasks = [args.task or tasks_of(row)[n % len(tasks_of(row))] for n, row in enumerate(rows)]
    samples = [make_sample(row, task, choices, args.seed, args.epoch) for row, task in zip(rows, tasks, strict=True)]
    for sample in samples:
        print(f"--- {sample.id}, {sample.kind} task {sample.task}")
        for message in sample.messages:
            parts = message["content"] if isinstance(message["content"], list) else [message["content"]]
            for part in parts:
                text = part if isinstance(part, str) else part.get("text")
                if text is None:
                    where = part.get("path", "no audio")
                    text = f"<speech: {where} | transcript: {part.get('transcript')} | caption: {part.get('caption')}>"
                print(f"{message['role']:>10}  {text}")
        print(f"{'assistant':>10}  {sample.target}" + ("" if sample.complete else "  (cut: its end is not trained)"))
    processor = AutoProcessor.from_pretrained(args.model or default_checkpoint())
    print("--- batch")
    for name, tensor in DualSLMCollator(processor)(samples).items():
        print(f"{name:>22}  {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}")


def align(args: argparse.Namespace) -> None:
    """Let the frozen LLM answer the text twins of a table; its replies are the targets of behaviour alignment."""
    from .alignment import Aligner, AlignmentConfig, align_rows
    from .corpora.schema import Report, read_table, write_table
    from .journal import Journal
    from .tasks import cut_histories

    rows = [row for row in read_table(args.table) if args.split in (None, row["split"])][: args.limit]
    if args.cut:
        rows = cut_histories(rows, args.seed)
    config = AlignmentConfig(
        args.max_new_tokens, args.temperature, args.repetition_penalty, args.batch_size, args.seed, args.mood
    )
    aligner = Aligner(args.model, config, dtype=args.dtype, device=args.device, revision=args.revision)
    report = Report()
    count = write_table(align_rows(rows, aligner, Journal(f"{args.out}.replies.jsonl"), report), args.out)
    if report:
        print(report)
    if aligner.seconds:
        print(f"{aligner.tokens:,} tokens in {aligner.seconds:.0f} s, {aligner.tokens / aligner.seconds:.0f} tokens/s")
    print(f"{count:,} rows in {args.out}")


def train(args: argparse.Namespace) -> None:
    """Run a recipe; features, warm start, the three stages, checkpoint."""
    from .recipe import RECIPES, load_recipe
    from .run import plan, run

    if args.list:
        for path in sorted(RECIPES.glob("*.yaml")):
            print(f"{path.stem:30} {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")
        return
    if not args.recipe or not (args.output or args.dry_run):
        raise ValueError("--recipe NAME_OR_FILE and --output DIR are needed (--list shows the recipes there are).")
    recipe = load_recipe(args.recipe, args.set)
    if args.dry_run:
        print(plan(recipe, args.output))
        return
    print(run(recipe, args.output, resume=args.resume))


def evaluate(args: argparse.Namespace) -> None:
    """Ask a checkpoint (or Qwen2-Audio, or a file of replies) what it hears, score it, and write a report."""
    from .evaluation.evaluate import averaged, compared
    from .evaluation.evaluate import evaluate as run_suites
    from .evaluation.report import markdown, write_card

    if args.compare:
        print(compared(*args.compare))
        return
    if args.mean:
        print(averaged(args.mean))
        return
    if not args.checkpoint or not args.data or not args.out:
        raise ValueError("evaluate needs a checkpoint, --data TABLE and --out DIR (or --compare DIR DIR).")
    if args.card and not Path(args.checkpoint).is_dir():
        raise ValueError(f"--card writes into a checkpoint's folder; {args.checkpoint} is none.")
    result = run_suites(
        args.checkpoint,
        args.data,
        args.out,
        suites=args.suite,
        split=args.split,
        limit=args.limit,
        seed=args.seed,
        judges=args.judge,
        dtype=args.dtype,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
    )
    print(markdown(result["figures"]))
    for warning in result["warnings"]:
        print(f"! {warning}")
    if args.card:
        write_card(Path(args.checkpoint), result)
        print(f"figures written into {Path(args.checkpoint) / 'README.md'}")
    print(f"{Path(args.out) / 'report.html'} ({result['seconds']:.0f} s)")


def benchmark(args: argparse.Namespace) -> None:
    """What it costs; `reply`: seconds to the first token, `train`: a step, `corpus`: rows to batches, `align`: replies."""
    from .benchmark import benchmark_align, benchmark_corpus, benchmark_reply, benchmark_train, show

    if args.what == "reply":
        model, processor = load(args)
        result = benchmark_reply(model, processor, args.seconds, args.repeats, args.max_new_tokens)
        print(json.dumps(result) if args.json else show(result))
        return
    if args.what == "train":
        result = benchmark_train(*load(args), batch_size=args.batch_size)
    else:
        result = benchmark_corpus() if args.what == "corpus" else benchmark_align()
    if args.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:36} {value:,.2f}" if isinstance(value, float) else f"{name:36} {value:,}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dual-slm", description="Speech language models that hear how it is said.")
    from .corpora import CORPORA

    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, function) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=function.__doc__.split(";")[0].rstrip("."), description=function.__doc__)
        sub.set_defaults(function=function)
        return sub

    sub = command("backbones", backbones)
    sub.add_argument("names", nargs="*", metavar="NAME", help="default: whisper-base smollm2-135m-instruct")
    sub.add_argument("--list", action="store_true", help="list the backbones there are")

    sub = command("reply", reply)
    sub.add_argument("files", nargs="*", metavar="FILE", help="audio files or URLs; none starts a chat by file names")
    _model_arguments(sub)
    sub.add_argument("--json", action="store_true", help="one JSON object for each turn")
    sub.add_argument("--system", default=None, help="system prompt")
    sub.add_argument("--hotwords", nargs="+", default=[], metavar="WORD", help="names and terms that are expected")
    sub.add_argument("--say", default=None, help="text added to every spoken turn, for example a question about it")
    sub.add_argument("--max-new-tokens", type=int, default=96)
    sub.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")

    corpus = commands.add_parser(
        "corpus", help="data sets as tables of conversations", description="Corpora as tables."
    )
    rooms = corpus.add_subparsers(dest="corpus", required=True, metavar="build | read | folds | label | stats | show")

    def room(name: str, function) -> argparse.ArgumentParser:
        sub = rooms.add_parser(name, help=function.__doc__.split(";")[0].rstrip("."), description=function.__doc__)
        sub.set_defaults(function=function)
        return sub

    sub = room("build", corpus_build)
    sub.add_argument("--out", default=None, metavar="DIR", help="folder that `corpus read folder` reads")
    sub.add_argument("--texts", default=None, help="sentences, one a line, or a table (default: 500 of LibriSpeech)")
    sub.add_argument("--hours", type=float, default=None, help="of audio (default 0.5; of a table, all rows)")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--processes", type=int, default=None)
    sub.add_argument("--engines", nargs="+", default=None, help="whose voices speak (default: all but kokoro)")
    sub.add_argument("--list-voices", action="store_true", help="list the voices with their licences")

    sub = room("read", corpus_read)
    sub.add_argument("name", choices=CORPORA, help="; ".join(f"{name}: {c.about}" for name, c in CORPORA.items()))
    sub.add_argument("--root", required=True, help="where the corpus was unpacked")
    sub.add_argument("--out", required=True, metavar="TABLE", help="Parquet file")
    sub.add_argument("--allow-missing-audio", action="store_true", help="keep rows without audio as text")
    sub.add_argument("--role-reversed", action="store_true", help="StyleTalk: add the test with roles exchanged")
    sub.add_argument(
        "--fold", type=int, default=None, help="IEMOCAP: the session that is the test, 1 to 5 (default 1)"
    )

    sub = room("folds", corpus_folds)
    sub.add_argument("table")
    sub.add_argument("--folds", type=int, default=4)
    sub.add_argument("--out", required=True, metavar="DIR", help="for fold-1.parquet and the others")

    sub = room("label", corpus_label)
    sub.add_argument("table")
    sub.add_argument("--out", default=None, metavar="TABLE")
    sub.add_argument("--thresholds", default="textrolspeech", help="textrolspeech, tertiles, or a .thresholds.json")
    sub.add_argument("--overwrite", action="store_true", help="replace the labels and captions of the corpus too")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--processes", type=int, default=None)

    sub = room("stats", corpus_stats)
    sub.add_argument("tables", nargs="+", metavar="TABLE")
    sub.add_argument("--out", default=None, metavar="PNG")
    sub.add_argument("--tokenizer", default="smollm2-135m-instruct", help="whose tokens count positions")
    sub.add_argument("--check", action="store_true", help="exit with 1 if a speaker or dialogue is in two splits")

    sub = room("show", corpus_show)
    sub.add_argument("table")
    sub.add_argument("--model", default=None, help="checkpoint whose processor makes the batch")
    sub.add_argument("--task", default=None, help="asr, gender, pitch, tempo, energy, emotion or dialogue")
    sub.add_argument("--split", default="train")
    sub.add_argument("--count", type=int, default=4)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--epoch", type=int, default=0)

    sub = command("align", align)
    sub.add_argument("table")
    sub.add_argument("--out", required=True, metavar="TABLE")
    sub.add_argument("--model", default="smollm2-135m-instruct", help="the LLM: Hub id, folder or pip-hosted backbone")
    sub.add_argument("--revision", default=None)
    sub.add_argument("--dtype", default="auto", choices=DTYPES)
    sub.add_argument("--device", default="cpu")
    sub.add_argument("--split", default=None, help="only this split")
    sub.add_argument("--limit", type=int, default=None, help="only so many rows")
    sub.add_argument("--cut", action="store_true", help="one more row for each history, with a part of it")
    sub.add_argument("--max-new-tokens", type=int, default=96)
    sub.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    sub.add_argument("--repetition-penalty", type=float, default=1.0)
    sub.add_argument("--batch-size", type=int, default=16)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument(
        "--mood",
        default=None,
        metavar="SYSTEM",
        help="tell the LLM the emotion by this system prompt, with {emotion} in it, instead of a caption in the turn: for a "
        "small LLM, which answers captions by talking about them",
    )

    sub = command("train", train)
    sub.add_argument("--recipe", default=None, help="a recipe of the package, or a YAML file")
    sub.add_argument("--output", default=None, metavar="DIR", help="the run's folder")
    sub.add_argument(
        "--set",
        nargs="*",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="for example stages.0.learning_rate=1e-4",
    )
    sub.add_argument("--resume", action="store_true", help="go on with the run in --output")
    sub.add_argument("--dry-run", action="store_true", help="print the plan: rows, steps, memory, hours")
    sub.add_argument("--list", action="store_true", help="list the recipes")

    sub = command("evaluate", evaluate)
    sub.add_argument("checkpoint", nargs="?", default=None, help="folder or Hub id, or a .jsonl of replies")
    sub.add_argument("--data", nargs="+", metavar="TABLE", help="tables of `dual-slm corpus`")
    sub.add_argument(
        "--suite",
        nargs="+",
        default=["all"],
        help="hearing, asr, attributes, meld, conversation, disentanglement, style, context, or all (default)",
    )
    sub.add_argument("--out", default=None, metavar="DIR", help="report, samples; an interrupted run goes on there")
    sub.add_argument("--split", default="test", choices=["validation", "test"])
    sub.add_argument("--limit", type=int, default=None, help="rows of each corpus and task")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument(
        "--judge", nargs="+", default=[], metavar="LLM", help="a causal LM, or http://host:port/v1#model; one or two"
    )
    sub.add_argument("--card", action="store_true", help="write the figures into the checkpoint's README.md")
    sub.add_argument("--compare", nargs=2, metavar="DIR", help="paired differences of two finished evaluations")
    sub.add_argument("--mean", nargs="+", metavar="DIR", help="mean and spread of finished evaluations (seeds)")
    sub.add_argument("--dtype", default="auto", choices=DTYPES, help="of the backbones")
    sub.add_argument("--device", default="cpu", help="cpu, cuda ...")
    sub.add_argument("--trust-remote-code", action="store_true", help="run the code in the checkpoint")

    sub = command("calibrate", calibrate)
    sub.add_argument("checkpoint", help="folder; its processor_config.json is written")
    sub.add_argument("--data", nargs="+", metavar="TABLE", required=True, help="tables of `dual-slm corpus`")
    sub.add_argument("--features", default=None, metavar="DIR", help="where features are kept (default: nowhere)")
    sub.add_argument("--dtype", default="auto", choices=DTYPES, help="of the backbones")
    sub.add_argument("--device", default="cpu", help="cpu, cuda ...")

    sub = command("push", push)
    sub.add_argument("folder", help="checkpoint folder")
    sub.add_argument("--repo", required=True, help="user/name on the Hub")
    sub.add_argument("--private", action="store_true")
    sub.add_argument("--tag", default=None, help="tag the pushed version")
    sub.add_argument("--message", default="Upload checkpoint")

    sub = command("benchmark", benchmark)
    sub.add_argument("what", choices=["reply", "train", "corpus", "align"])
    _model_arguments(sub)
    sub.add_argument("--seconds", type=float, default=4.0, help="length of the spoken turn")
    sub.add_argument("--repeats", type=int, default=7)
    sub.add_argument("--batch-size", type=int, default=16, help="of a training step")
    sub.add_argument("--max-new-tokens", type=int, default=32)
    sub.add_argument("--json", action="store_true")
    return parser


# glibc gives each large tensor back to the kernel and takes it anew, page by page: on a CPU that is half of a step. With
# these it keeps what it has, in huge pages.
_TUNABLES = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8589934592"
_TUNABLES += ":glibc.malloc.top_pad=268435456:glibc.malloc.arena_max=1"
_LONG = ("train", "evaluate", "align", "benchmark")


def keep_memory(command: str) -> None:
    """Starts this program again with an allocator that suits tensors on a CPU, unless $GLIBC_TUNABLES says otherwise.

    The setting is read when a process starts; nothing but the speed depends on it.
    """
    if command not in _LONG or "GLIBC_TUNABLES" in os.environ or platform.libc_ver()[0] != "glibc":
        return
    environment = os.environ | {"GLIBC_TUNABLES": _TUNABLES}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 1 with one line that says what went wrong."""
    if not sys.stderr.isatty():  # a log file wants a line now and then, not a moving bar
        os.environ.setdefault("TQDM_MININTERVAL", "30")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    args = build_parser().parse_args(argv)
    if argv is None:
        keep_memory(args.command)
    if "DUAL_SLM_DEBUG" not in os.environ:
        from transformers.utils import logging

        logging.set_verbosity_error()
        if getattr(args, "json", False) or not sys.stderr.isatty():
            logging.disable_progress_bar()
    try:
        _fit_dtype(args)
        args.function(args)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if "DUAL_SLM_DEBUG" in os.environ:
            raise
        if isinstance(error, ModuleNotFoundError):
            error = f"{error}: pip install -e '.[train,eval]' in a checkout of the repository"
        message = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
        print(f"dual-slm {args.command}: {message or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
