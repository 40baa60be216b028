"""`dual-slm serve`."""

import argparse
from pathlib import Path

from .common import add_command, add_device_arguments, default_checkpoint, load_checkpoint, select


def register(subparsers) -> None:
    parser = add_command(subparsers, "serve", serve)
    text = "folder or Hub id (default: the released small one)"
    parser.add_argument("checkpoint", nargs="?", metavar="CKPT", help=text)
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--engine", default="transformers", choices=["transformers"], help="what runs the LLM")
    text = "another LLM answers, behind an OpenAI API: http://host:port/v1#model; the key is in OPENAI_API_KEY"
    parser.add_argument("--llm", metavar="URL", help=text)
    text = "what that LLM gets: `text` is the words and a caption of the voice"
    parser.add_argument("--as", dest="form", choices=["text"], help=text)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--queue", type=int, default=32, help="requests that run or wait; more get 429")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one request")
    parser.add_argument("--max-seconds", type=float, default=120.0, help="longest clip")
    parser.add_argument("--max-bytes", type=int, default=20_000_000, help="largest encoded clip")
    text = "hosts that clips may be fetched from (default: none); private addresses have to be listed themselves"
    parser.add_argument("--allow-host", nargs="+", default=[], metavar="HOST", help=text)
    add_device_arguments(parser, remote_code=True)


def serve(args: argparse.Namespace) -> None:
    """Serve a checkpoint by OpenAI's API: chat completions with audio, transcriptions, and what is heard.

    With `--llm URL --as text` the checkpoint only hears, and its own LLM is not loaded."""
    if (args.llm is None) != (args.form is None):
        raise ValueError(
            "--llm URL and --as text belong together: the one says which LLM answers, the other what it gets."
        )
    import uvicorn

    from ..serving.ears import Ears
    from ..serving.engines import TextEngine, TransformersEngine
    from ..serving.policy import Policy
    from ..serving.server import Service, make_app

    checkpoint = args.checkpoint or default_checkpoint()
    options = select(args, "dtype", "device", "revision", "trust_remote_code")
    model, processor = load_checkpoint(checkpoint, **options, ears_only=args.llm is not None)
    if args.llm is not None and processor.linguistic_adapter_type != "letters":
        raise ValueError(f"{checkpoint} writes no words, so --as text has nothing to send: it has no character CTC.")
    ears = Ears(model, processor)
    engine = TransformersEngine(ears) if args.llm is None else TextEngine(args.llm, args.timeout)
    clip = args.max_bytes
    policy = Policy(clip, args.max_seconds, max_request_bytes=2 * clip, hosts=tuple(args.allow_host))
    name = checkpoint if "/" in checkpoint and not Path(checkpoint).is_dir() else Path(checkpoint).resolve().name
    app = make_app(Service(name, ears, engine, policy, args.queue, args.timeout))
    config = uvicorn.Config(app, args.host, args.port, timeout_graceful_shutdown=30, log_level="warning")
    socket = config.bind_socket()
    host, port = socket.getsockname()[:2]
    print(f"{name}  http://{host}:{port}/v1", flush=True)
    uvicorn.Server(config).run(sockets=[socket])
