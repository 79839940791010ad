"""`mlx-turbo serve`: mlx_lm.server's own main() with compressed caches.

Besides the caches, it differs from mlx_lm.server in these ways:
- The port, the model and the kernels are tried before it listens; if one of them fails, the program ends.
- A prompt longer than the model's context is refused (400), and an answer stops at the context's end.
- Prompt caches are filed under exactly the tokens they hold. If a whole prompt is cached, its last token is trimmed,
  so that the model has one to continue from. --prompt-cache-bytes also applies without batching.
- GET /kv-cache reports what the prompt caches take, and as GET /v1/models does, how many tokens still fit.
- A request that fails gets a status and a message, or an event `error` if its answer is streamed already; the others go
  on (integration/isolation.py), and so does the server.
"""

import argparse
import contextlib
import dataclasses
import functools
import inspect
import io
import json
import logging
import signal
import socket
import sys
import threading
import types
from collections.abc import Callable, Sequence
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
import mlx_lm
import mlx_lm.server as module
from huggingface_hub.errors import CacheNotFound
from mlx_lm.generate import PromptProcessingBatch
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from ..backends.select import get_backend, use_backend
from ..backends.sides import BackendError
from ..cache.memory_budget import MemoryBudget
from ..cache.single import TurboKVCache
from ..integration.isolation import GenerationError
from ..integration.mixed_batch import config_of
from ..integration.prompt_cache import describe, enable, flatten_caches, memory_budget_of
from .common import (
    DEFAULT_SCHEME,
    DEMO_TEMPLATE,
    CliError,
    Parser,
    TurboProgram,
    add_program_arguments,
    check_going_back,
    describe_error,
    describe_model_argument,
    load_model,
    patched_attributes,
    print_message,
    refuse_kv_bits,
    trim_to_common,
    use_demo_model,
    warnings_as_messages,
)
from .serve_context import context, room_of
from .serve_store import (
    PromptClock,
    ServedPrompts,
    StoringBatchGenerator,
    Unfinished,
    add_store_arguments,
    check_store_arguments,
    new_cache,
)


# ---- models ------------------------------------------------------------------------------------------------
class ServerProgram(TurboProgram):
    """Every model that the server loads, at the start or for a request, makes compressed caches from then on."""

    def _load(self, original: Callable[..., Any], path: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        flags = {self.args.draft_model: "--draft-model", self.args.model: "--model"}
        model, *rest = load_model(original, path, flags.get(path, "model"), *args, **kwargs)
        config = self.choose(model, rest[0])
        self.args.rooms[path] = room_of(model, config)
        loaded = self.args.loaded  # before this one if it is a draft model
        if config is not None:
            enable(model, config, loaded[0][1] if loaded else None)
        self.warm(model, rest[0], path == self.args.draft_model)
        with warnings_as_messages():
            cache = make_prompt_cache(model)
        budget = memory_budget_of(cache)
        if budget is not None:
            if not loaded:
                prompts = self.args.prompts
                budget.evict.append(prompts.evict)
                budget.others.append(lambda: prompts.memory_nbytes)
            loaded.append((path, cache))
            ours = [c for _, layers in loaded for c in flatten_caches(layers) if isinstance(c, TurboKVCache)]
            self.args.budgets[loaded[0][0]] = budget, budget.tokens_that_fit(ours, chunk=self.args.prefill_step_size)
        together = self.args.draft_model is None and all(hasattr(c, "merge") for c in flatten_caches(cache))
        print_message(
            f"{path}: KV cache {self.scheme}, {describe(cache)}; requests are answered "
            f"{'in batches' if together else 'one at a time'}"
        )
        self.caches = [cache]
        return model, *rest

    _sharded_load = _load

    def _make_prompt_cache(self, original: Callable[..., Any], model: Any, max_kv_size: int | None = None) -> list[Any]:
        return original(model, max_kv_size)  # the model's own make_cache is ours


def context_of(model: Any) -> int | None:
    """The number of tokens the model was made for; None if its configuration does not say."""
    args = vars(getattr(model, "args", None) or types.SimpleNamespace())
    for config in args, args.get("text_config") or {}:
        if limit := config.get("max_position_embeddings"):
            scaling = config.get("rope_scaling") or {}
            extended = (scaling.get("original_max_position_embeddings") or 0) * (scaling.get("factor") or 0)
            return max(limit, int(extended))
    return None


class ModelProvider(module.ModelProvider):
    """Tells the main thread when the default model is loaded, or why it could not be."""

    def __init__(self, cli_args: argparse.Namespace) -> None:
        self.tried = threading.Event()
        self.failure: Exception | None = None
        super().__init__(cli_args)  # loads the model, in mlx-lm 0.31
        if not hasattr(super(), "load_default"):
            self.tried.set()

    def load(self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None) -> Any:
        """mlx-lm 0.31.3 loses the adapter of --adapter-path, which it looks up after replacing the model's name."""
        adapters = getattr(self, "_adapter_map", {})
        try:
            loaded = super().load(model_path, adapters.get(model_path, adapter_path), draft_model_path)
        finally:
            self.cli_args.loaded.clear()
        if self.draft_model is not None:
            check_going_back(new_cache(self.model), self.limit(), "the model")
            check_going_back(new_cache(self.draft_model), self.limit(), "the draft model")
        return loaded

    def limit(self) -> int | None:
        """The most tokens that prompt and answer may have: of --max-context, or the model's context, and what a memory
        budget holds; None: no limit."""
        given, fit = self.cli_args.max_context, self.fit()
        limit = (context_of(self.model) if given is None else given) or None
        return limit if fit is None else fit if limit is None else min(fit, limit)

    def fit(self) -> int | None:
        """How many tokens the memory budget of the loaded model holds, if it holds nothing else; None: any number."""
        return self.cli_args.budgets.get((self.model_key or [None])[0], (None, None))[1]

    def load_default(self) -> None:
        if self.tried.is_set():  # by a generation loop that begins anew: requests load what they name
            return
        try:
            super().load_default()
        except Exception as e:
            self.failure = e
            raise
        finally:
            self.tried.set()


# ---- prompt caches -----------------------------------------------------------------------------------------
class LRUPromptCache(module.LRUPromptCache):
    """mlx-lm's class, with three faults corrected: after speculative decoding its entries hold other tokens than they
    are filed under (the last token is in no cache yet); if a whole prompt is cached, the model has no token to continue
    from; and a cache that cannot be kept, copied or trimmed ended the server.

    schemes: what `schemes_of` says of the caches that a request gets now; those of another scheme are not gone on from.
    prompts: those on disk, where what is not in memory is looked up.
    """

    schemes: Callable[[], Any] | None = None
    prompts: ServedPrompts | None = None

    def evict_oldest(self) -> bool:
        """Drop the entry that would be dropped next; False if there is none."""
        n = len(self)
        if n:
            self.trim_to(n_sequences=n - 1)
        return n > 0

    def insert_cache(self, model: Any, tokens: list[int], prompt_cache: list[Any], **options: Any) -> None:
        """File the caches of a sequence; if that fails, they are dropped and the log says so."""
        try:
            n = trim_to_common(prompt_cache, len(tokens))
            if n is None:
                return
            (
                can_trim_prompt_cache(prompt_cache),
                [c.nbytes for c in prompt_cache],
            )  # what fails, fails before it is filed
            super().insert_cache(model, tokens[:n], list(prompt_cache), **options)
        except Exception:
            logging.exception("the cache of an answer is not kept")
            return
        # a prompt is put once its answer does not wait for it; before that, what no later cut can be made of
        unfinished = isinstance(prompt_cache, Unfinished) and can_trim_prompt_cache(prompt_cache)
        if self.prompts is not None and (not unfinished or options.get("cache_type") == "system"):
            self.prompts.put(tokens[:n], prompt_cache)

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        """The caches that hold most of a prompt, a copy or from disk, and the tokens after them."""
        cache, rest = self._fetch_from_memory(model, tokens)
        if self.prompts is None:
            return cache, rest
        return self.prompts.fetch(tokens, cache, rest)

    def _fetch_from_memory(self, model: Any, tokens: list[int]) -> tuple[Any, list[int]]:
        """Of those in memory; none if that fails."""
        try:
            cache, rest = super().fetch_nearest_cache(model, tokens)
            if cache is None or (self.schemes is not None and schemes_of(cache) != self.schemes()):
                return None, tokens
            if rest:
                return cache, rest
            if can_trim_prompt_cache(cache):
                trim_prompt_cache(cache, 1)
                return cache, tokens[-1:]
        except Exception:
            logging.exception("a kept cache cannot be used: the whole prompt is computed")
        return None, tokens


def schemes_of(prompt_cache: list[Any]) -> set[Any]:
    """The configurations of compressed caches, with their budget of memory if they are under one; none if they are all
    mlx-lm's own."""
    return {config_of(c) for c in flatten_caches(prompt_cache) if isinstance(c, TurboKVCache)}


# ---- requests ----------------------------------------------------------------------------------------------
class RequestError(ValueError):
    """A request that cannot be answered: status 400."""


class Answer:
    """The queue on which mlx-lm's loop puts the parts of an answer, which ends with None or with an exception."""

    def __init__(self, queue: Any, unfinished: "set[Answer]", clock: PromptClock) -> None:
        self.queue, self.unfinished, self.clock = queue, unfinished, clock
        self.context: module.GenerationContext | None = None
        unfinished.add(self)

    def put(self, part: Any) -> None:
        """Hand on a part. The progress of a row that failed is a GenerationError: the loop then drops the row, as one
        whose client is gone."""
        if isinstance(part, module.GenerationContext):
            self.context, self.computed = part, self.clock.start()
        if isinstance(part, tuple):
            self.computed(part[0])
        if part is None or isinstance(part, Exception):
            self.unfinished.discard(self)
        if isinstance(part, Exception):
            if self.context is not None:
                self.context.stop()
            if not isinstance(part, (CliError, GenerationError, RequestError)):
                logging.error("a request failed", exc_info=part)
                part = GenerationError(part)
        self.queue.put(part)


class ResponseGenerator(module.ResponseGenerator):
    """mlx-lm's class; refuses requests that cannot be answered, goes on after a fault, and reports what the prompt
    caches hold."""

    model_provider: ModelProvider

    def __init__(self, model_provider: ModelProvider, prompt_cache: LRUPromptCache) -> None:
        self._unfinished: set[Answer] = set()
        if model_provider.cli_args.prompt_cache_bytes is not None:
            prompt_cache.max_bytes = model_provider.cli_args.prompt_cache_bytes
        prompt_cache.schemes = self._schemes
        prompt_cache.prompts = self.prompts = model_provider.cli_args.prompts
        self.prompts.evict = prompt_cache.evict_oldest
        self.prompts.provider = model_provider
        super().__init__(model_provider, prompt_cache)

    def _schemes(self) -> set[Any]:
        """Those of the caches that the next request gets: `enable` may be called while the server runs."""
        models: tuple[Any, Any] = (self.model_provider.model, self.model_provider.draft_model)
        return schemes_of([c for model in models if model is not None for c in new_cache(model)])

    def _next_request(self, timeout: float | None = None) -> Any:
        request = super()._next_request(timeout)
        return request and (Answer(request[0], self._unfinished, self.prompts.clock), *request[1:])

    def _generate(self) -> None:
        """The generation thread. What ends mlx-lm's loop ends the answers it was at, and the loop begins anew."""
        try:
            while not self._stop:
                try:
                    super()._generate()
                except Exception as e:
                    if e is self.model_provider.failure:  # which the main thread raises: mlx-lm would log its traceback
                        return
                    if self._is_distributed:  # other machines are in the middle of the same step
                        raise
                    logging.exception("%d requests failed", len(self._unfinished))
                    for answer in list(self._unfinished):
                        answer.put(GenerationError(e))
        finally:
            if hasattr(mx, "clear_streams"):  # else MLX 0.32.4 aborts when the process ends (9 of 13 runs)
                mx.clear_streams()

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        try:
            stop = args.stop_words
            if not isinstance(stop, list) or not all(isinstance(word, str) and word for word in stop):
                raise ValueError(f"stop: got {stop!r}, expected a string or a list of strings, none of them empty")
            module._make_sampler(args, tokenizer)  # where mlx-lm makes these, an exception would be of all requests
            module._make_logits_processors(args)
            out = super()._tokenize(tokenizer, request, args)
        except Exception as e:
            raise RequestError(str(e) if isinstance(e, ValueError) else describe_error(e)) from e
        n = len(out[0])
        if n == 0:
            raise RequestError("the prompt is empty")
        limit = self.model_provider.limit()
        if limit and n >= limit:
            whose = "the context of the model" if self.cli_args.max_context is None else "the value of --max-context"
            if limit == self.model_provider.fit():
                whose = "what the memory budget holds"
            raise RequestError(f"the prompt has {n} tokens, but must have fewer than {limit}, {whose}")
        if limit:
            args.max_tokens = min(args.max_tokens, limit - n)
        return out

    def kv_cache(self) -> dict[str, Any]:
        """What GET /kv-cache answers, and what the program prints when it ends."""
        return {
            "kv": self.cli_args.kv or DEFAULT_SCHEME,
            "backend": get_backend().describe(),
            "sequences": len(self.prompt_cache),
            "nbytes": self.prompt_cache.nbytes,
            "active_memory": mx.get_active_memory(),
            **self.context(),
            "memory": None if (budget := self._budget()) is None else budget.report() | {"text": budget.describe()},
            "store": self.prompts.report(),
        }

    def _budget(self) -> MemoryBudget | None:
        """The memory budget of the loaded model's caches."""
        return self.cli_args.budgets.get((self.model_provider.model_key or [None])[0], (None, None))[0]

    def context(self) -> dict[str, Any]:
        """What is said of the loaded model's context (serve_context.py)."""
        return context(self.model_provider, self.prompt_cache, self.cli_args.rooms)

    def stop_and_join(self) -> None:
        held = self.kv_cache()  # before the thread drops its caches
        super().stop_and_join()
        self.prompts.close()
        print_message(f"prompt caches held: {held['sequences']} sequences, {held['nbytes'] / 1e6:.3f} MB")
        if held["memory"] is not None:
            print_message(f"prompt caches: {held['memory']['text']}")


class APIHandler(module.APIHandler):
    """mlx-lm's class, with GET /kv-cache, and with a status and a message for a request that fails: 400 if it cannot be
    answered, 500 if that failed."""

    response_generator: ResponseGenerator

    def _set_completion_headers(self, status_code: int = 200) -> None:
        """mlx-lm's handler answers 404 whether the model cannot be found, the request is wrong or something fails."""
        error = sys.exc_info()[1]
        if status_code == 404 and error is not None and not isinstance(error, CliError):
            status_code = 400 if isinstance(error, RequestError) else 500
        super()._set_completion_headers(status_code)

    def handle_completion(self, request: Any, stop_words: Any) -> None:
        """Answer a completion request. mlx-lm closes the connection without a word if an answer fails once it has
        begun."""
        try:
            super().handle_completion(request, stop_words)
        except OSError:  # the client's connection
            raise
        except Exception as e:
            if not isinstance(e, GenerationError):
                logging.exception("a request failed")
                e = GenerationError(e)
            if self.stream:
                event = {"error": {"message": str(e), "type": "server_error"}}
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            else:
                self._headers_buffer: list[bytes] = []  # status 200, not sent yet
                self._set_completion_headers(500)
                self.end_headers()
                self.wfile.write(json.dumps({"error": str(e)}).encode())
            self.wfile.flush()

    def handle_models_request(self) -> None:
        """Answer GET /v1/models, with the context of the model that is loaded."""
        sent, self.wfile = self.wfile, io.BytesIO()
        try:
            super().handle_models_request()
            head, between, body = self.wfile.getvalue().partition(b"\r\n\r\n")
        finally:
            self.wfile = sent
        listed, generator = json.loads(body), self.response_generator
        for entry in listed["data"]:
            if entry["id"] == (generator.model_provider.model_key or [None])[0]:
                entry.update(generator.context())
        self.wfile.write(head + between + json.dumps(listed).encode())

    def do_GET(self) -> None:
        """Answer a GET request."""
        if self.path != "/kv-cache":
            super().do_GET()
            return
        self._set_completion_headers(200)
        self.end_headers()
        self.wfile.write(json.dumps(self.response_generator.kv_cache()).encode())


class HTTPServer(ThreadingHTTPServer):
    """Logs one line when a client closes its connection early."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if isinstance(sys.exc_info()[1], ConnectionError):
            logging.info("%s:%s closed the connection", *client_address[:2])
        else:
            super().handle_error(request, client_address)


def _scan_cache_dir(original: Callable[..., Any], *args: Any) -> Any:
    """An empty listing if there is no Hugging Face cache yet, so that GET /v1/models works."""
    try:
        return original(*args)
    except CacheNotFound:
        return types.SimpleNamespace(repos=())


def _run_http_server(original: Callable[..., Any], host: str, port: int, response_generator: ResponseGenerator) -> None:
    provider = response_generator.model_provider
    try:
        provider.tried.wait()
        if provider.failure is not None:
            raise provider.failure
        response_generator.prompts.open(provider.cli_args)
        original(host, port, response_generator, HTTPServer, APIHandler)
    except BaseException:  # else the other thread runs forever
        module.ResponseGenerator.stop_and_join(response_generator)
        raise


def check_port(host: str, port: int) -> None:
    """Raise CliError unless a server can listen there."""
    try:
        if not 0 <= port < 2**16:
            raise OSError(0, "ports range from 0 to 65535")  # getaddrinfo takes them modulo 65536
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, _, _, address = found[0]
        with socket.socket(family, kind) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(address)
            s.listen()
    except OSError as e:
        flag = "--host" if isinstance(e, socket.gaierror) else "--port"
        raise CliError(f"{flag}: cannot listen on {host}:{port}: {e.strerror}") from e


def batch_generator(prompts: ServedPrompts) -> Callable[..., Any]:
    """What the generation loop makes its batches with. prompts: where they are stored.

    Raises BackendError if the installed mlx-lm's loop is not the one that isolation.py is written for: then a request
    that fails would end the server.
    """
    if mx.distributed.init().size() > 1:  # a row must fail on all machines, or on none
        return module.BatchGenerator
    used = inspect.unwrap(module.ResponseGenerator._generate).__code__.co_names
    wanted = "BatchGenerator", "insert_segments", "next", "extract_cache", "remove", "close", "progress", "_should_stop"
    missing = [f"the loop does not use {name}" for name in wanted if name not in used]
    fields = [f.name for f in dataclasses.fields(PromptProcessingBatch.Response)]
    if fields != ["uid", "progress", "end_of_segment", "end_of_prompt"]:
        missing.append(f"a prompt's response has {', '.join(fields)}")
    taken = inspect.signature(module.BatchGenerator.insert_segments).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values()):
        missing += [f"no {n} in a batch" for n in ("segments", "caches", "all_tokens", "samplers") if n not in taken]
    missing += [
        f"no {n}" for n in ("_next_request", "_tokenize", "_generate") if not hasattr(module.ResponseGenerator, n)
    ]
    missing += [f"no {n}" for n in ("_make_sampler", "_make_logits_processors") if not hasattr(module, n)]
    if missing:
        raise BackendError(
            f"mlx_lm.server of mlx-lm {mlx_lm.__version__} answers its requests in a way that mlx_turbo does not know "
            f"({'; '.join(missing)}): one that fails would end the server. Install another version of mlx-lm, or use "
            "mlx_lm.server itself"
        )
    return functools.partial(StoringBatchGenerator, prompts, module.BatchGenerator)


# ---- the command -------------------------------------------------------------------------------------------
def _size(text: str) -> int:
    """Parse a size as mlx-lm does, with an error that says what is allowed."""
    try:
        return module._parse_size(text)
    except (ArithmeticError, KeyError, ValueError) as e:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected a number of bytes, or a number with M, MB, G or GB"
        ) from e


def _interrupt(signum: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def main(argv: Sequence[str]) -> int:
    """Run mlx_lm.server's main(); returns the exit code. Our program is installed when mlx-lm's parser is complete and
    its arguments are parsed."""
    parser = Parser(allow_abbrev=False)
    group = add_program_arguments(parser, "serve", module)
    group.add_argument(
        "--max-context",
        type=int,
        metavar="N",
        help="refuse prompts of N or more tokens, and stop answers there (default: the model's context; 0: no limit)",
    )
    add_store_arguments(group, _size)
    prompts = ServedPrompts()

    def parse_args() -> argparse.Namespace:
        describe_model_argument(parser)
        next(a for a in parser._actions if a.dest == "prompt_cache_bytes").type = _size
        args = argparse.ArgumentParser.parse_args(parser, argv)
        program = ServerProgram(module, args)
        refuse_kv_bits(program)
        for name in ("max_context", "prompt_cache_size"):
            if (value := getattr(args, name)) is not None and value < 0:
                raise CliError(f"--{name.replace('_', '-')}: got {value}, expected a whole number of at least 0")
        check_store_arguments(args)
        args.prompts, args.rooms = prompts, {}
        args.budgets = {}  # by the name of a model: the budget of its caches, and how many tokens it holds
        args.loaded = []  # (name, caches) of what is being loaded: a model, then its draft model
        check_port(args.host, args.port)
        if args.model is None:
            use_demo_model(args)
            args.chat_template = args.chat_template or DEMO_TEMPLATE
        elif Path(args.model).exists():
            args.model = str(Path(args.model).resolve())  # as GET /v1/models names it, so that it is loaded once
        backend = stack.enter_context(use_backend(args.backend))
        stack.enter_context(program.installed())
        if program.config is not None:
            print_message(f"Backend: {backend.describe()}")
        return args

    setattr(parser, "parse_args", parse_args)
    with (
        contextlib.ExitStack() as stack,
        patched_attributes(
            module,
            argparse=types.SimpleNamespace(ArgumentParser=lambda **_: parser),
            ModelProvider=ModelProvider,
            LRUPromptCache=LRUPromptCache,
            ResponseGenerator=ResponseGenerator,
            BatchGenerator=batch_generator(prompts),
            stream_generate=functools.partial(prompts.stream_generate, module.stream_generate),
            scan_cache_dir=functools.partial(_scan_cache_dir, module.scan_cache_dir),
            _run_http_server=functools.partial(_run_http_server, module._run_http_server),
        ),
    ):
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            module.main()
        finally:
            signal.signal(signal.SIGTERM, before)
    return 0
