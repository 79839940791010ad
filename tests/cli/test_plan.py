"""`mlx-turbo plan`: the caches it counts on are those the models have, and its figures those of real caches."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading

import mlx.core as mx
import mlx_lm
import mlx_lm.models.cache as lm_cache
import pytest
from mlx.utils import tree_flatten
from support import families
from support.families import compressed

from mlx_turbo import TurboConfig, TurboKVCache, use_backend
from mlx_turbo.cli import plan
from mlx_turbo.cli.common import DEMO_MODEL, CliError
from mlx_turbo.cli.main import main
from mlx_turbo.integration.prompt_cache import flatten_caches

CONFIG = json.loads((DEMO_MODEL / "config.json").read_text())
LLAMA_70B = dict(
    model_type="llama",
    hidden_size=8192,
    num_hidden_layers=80,
    intermediate_size=28672,
    num_attention_heads=64,
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    vocab_size=128256,
    rope_theta=500000.0,
    tie_word_embeddings=False,
    max_position_embeddings=131072,
    torch_dtype="bfloat16",
)
BUILT = [n for n in families.all_names() if n not in families.NOT_BUILT]


@pytest.fixture
def run(capsys):
    """run(*argv) -> (exit code, stdout, stderr) of `mlx-turbo plan`, in this process."""

    def run(*argv):
        capsys.readouterr()
        return main(["plan", *map(str, argv)]), *capsys.readouterr()

    return run


@pytest.fixture
def folder(tmp_path):
    """make(config) -> a folder with that config.json."""

    def make(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return make


def filled(model, cache, n):
    """The members of a prompt cache after n tokens, the last two one by one."""
    for length in (n - 2, 1, 1):
        mx.eval(model(mx.zeros((1, length), mx.int32), cache=cache), [c.state for c in cache])
    return flatten_caches(cache)


# ---- shapes without memory -----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [n if n in families.NAMED else pytest.param(n, marks=pytest.mark.slow) for n in BUILT])
def test_the_caches_are_those_the_model_makes(name):
    """Their kinds, shapes and bytes with 300 tokens, beyond windows and one step of growth; and ours."""
    n, model = 300, families.build(name)
    skeleton = plan.build(families.config(name) | {"torch_dtype": "float32"})
    layers = plan.layers_of(skeleton)
    caches = filled(model, lm_cache.make_prompt_cache(model), n)
    assert [layer.kind for layer in layers] == [type(c).__name__ for c in caches]
    for layer, cache in zip(layers, caches):
        assert layer.nbytes(n) == sum(x.nbytes for x in arrays(cache)), (layer, cache.state)
        if layer.shape:
            assert layer.shape == (cache.keys.shape[1], cache.keys.shape[3], cache.values.shape[3])
    config = TurboConfig("turbo4", sink=2, recent=4, block=4, centre=False)  # of equal tokens, all would have means
    with use_backend("cpu"):
        caches = filled(model, compressed(model, config), n)
    configs = plan.configs_of(skeleton, config)
    assert configs == [c.config if isinstance(c, TurboKVCache) else None for c in caches]
    want = sum(c.nbytes if isinstance(c, TurboKVCache) else sum(x.nbytes for x in arrays(c)) for c in caches)
    assert plan.cache_bytes(layers, configs, n) <= want <= 1.05 * plan.cache_bytes(layers, configs, n)


def arrays(cache):
    """The buffers of one of mlx-lm's caches."""
    if getattr(cache, "keys", None) is not None:
        return [cache.keys, cache.values]
    held = cache.state if isinstance(cache.state, (list, tuple)) else [cache.state]
    return [x for _, x in tree_flatten(list(held)) if isinstance(x, mx.array)]


def test_nothing_of_the_model_is_evaluated():
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    layers = plan.layers_of(plan.build(LLAMA_70B))
    assert len(layers) == 80 and layers[79].shape == (8, 128, 128) and layers[79].dtype == "bfloat16"
    assert mx.get_peak_memory() - before < 10e6  # of 141 GB
    assert plan.parameter_bytes(plan.build(LLAMA_70B), LLAMA_70B) == 2 * 70_553_706_496


def test_the_configuration_is_not_changed():
    config = families.config("gemma3n")
    before = json.dumps(config)
    plan.build(config)
    assert json.dumps(config) == before


def test_computed_weights_are_those_of_the_model():
    model, _ = mlx_lm.load(str(DEMO_MODEL))
    loaded = sum(x.nbytes for _, x in tree_flatten(model.parameters()))
    assert plan.parameter_bytes(plan.build(CONFIG), CONFIG) == loaded
    mixed = CONFIG | {"quantization": {"group_size": 64, "bits": 8, "model.embed_tokens": False}}
    vocabulary, hidden = CONFIG["vocab_size"], CONFIG["hidden_size"]
    assert plan.parameter_bytes(plan.build(mixed), mixed) - loaded == vocabulary * hidden * (2 - 1 - 4 / 64)


# ---- bytes and tokens ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("scheme", ["turbo0", "turbo0v4", "turbo8v4", "turbo4", "turbo3", "turbo2", "turbo6v5"])
@pytest.mark.parametrize("dims, dtype", [((128, 128), "float16"), ((512, 64), "bfloat16"), ((80, 32), "float32")])
def test_bytes_are_those_of_a_real_cache(scheme, dims, dtype):
    config = TurboConfig(scheme, sink=4, recent=8, block=8)
    layer = plan.Layer("KVCache", (3, *dims), dtype, 0.0)
    cache, total = TurboKVCache(config), 0
    with use_backend("cpu"):
        for n in (268, 1, 7, 500, 8, 3000):
            cache.update_and_fetch(*(mx.random.normal((1, 3, n, d)).astype(getattr(mx, dtype)) for d in dims))
            total += n
            # in decode up to `block` tokens wait to be packed, which can save a step
            late = plan.cache_bytes([layer], [config], total - config.block)
            assert late <= cache.nbytes <= plan.cache_bytes([layer], [config], total)


def test_the_tokens_that_fit_do_and_one_more_does_not():
    layers = plan.layers_of(plan.build(families.config("gpt_oss")))
    sizes = []
    for scheme in ("turbo0", "turbo8v4", "turbo4", "turbo2"):
        configs = plan.configs_of(plan.build(families.config("gpt_oss")), TurboConfig(scheme))
        for batch in (1, 3):
            n = plan.tokens_that_fit(layers, configs, 10**9, batch)
            assert batch * plan.cache_bytes(layers, configs, n) <= 10**9
            assert batch * plan.cache_bytes(layers, configs, n + 1) > 10**9
            sizes.append(n)
    assert sizes[::2] == sorted(sizes[::2]) and sizes[1] < sizes[0] / 2.9
    assert plan.tokens_that_fit(layers, configs, 0) == 0


@pytest.mark.parametrize(
    "text, nbytes",
    [
        ("24GB", 24 * 10**9),
        ("24 gb", 24 * 10**9),
        ("24", 24 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("512MB", 512 * 10**6),
        ("0.5TB", 5 * 10**11),
    ],
)
def test_sizes(text, nbytes):
    assert plan.memory_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "24 pounds", "1e400GB", "nanGB"])
def test_no_sizes(text):
    with pytest.raises(CliError, match="--memory: got"):
        plan.memory_size(text)


# ---- the command ---------------------------------------------------------------------------------------------
def test_how_many_tokens_fit(run):
    code, out, _ = run("--memory", "1GB", "--json")
    p = json.loads(out)
    rows = {r["kv"]: r for r in p["results"]}
    assert code == 0 and list(rows) == list(plan.SCHEMES)
    assert p["kinds"] == {"KVCache: 2 kv heads, keys 128, values 128, bfloat16": 4}
    assert p["weights_bytes"] == sum(f.stat().st_size for f in DEMO_MODEL.glob("*.safetensors"))
    assert rows["none"]["bytes_per_token"] == 4 * 2 * 2 * 128 * 2  # layers, sides, heads, dims, bytes
    assert rows["turbo4"]["bytes_per_token"] == 4 * 2 * 2 * 128 * 4.125 / 8
    assert rows["none"]["tokens"] == (10**9 - p["weights_bytes"]) // (256 * 4096) * 256
    assert 3.87 < rows["turbo4"]["tokens"] / rows["none"]["tokens"] < 3.89
    code, out, _ = run("--memory", "1GB")
    assert code == 0 and f"{rows['turbo4']['tokens']:,}" in out and "made for 4,096 tokens" in out


def test_how_much_so_many_tokens_take(run):
    argv = ["--tokens", 4096, "--batch", 2, "--memory", "30MB", "--kv", "none", "turbo4"]
    _, out, _ = run(*argv, "--json")
    p = json.loads(out)
    none, turbo4 = p["results"]
    assert none["cache_bytes"] == 2 * 4096 * 4096 and turbo4["compressed"] == 4
    assert (none["fits"], turbo4["fits"]) == (False, True)
    assert none["total_bytes"] == none["cache_bytes"] + p["weights_bytes"]
    code, out, _ = run(*argv)
    assert code == 0 and "33.55 MB" in out and out.count("yes") == 1 and "4,096 tokens of each sequence" in out


def test_the_window_is_counted(run):
    _, short, _ = run("--tokens", 4096, "--kv", "turbo4", "--json")
    _, long, _ = run("--tokens", 4096, "--kv", "turbo4", "--kv-recent", 1024, "--json")
    less, more = (json.loads(out)["results"][0]["cache_bytes"] for out in (short, long))
    assert more - less == 4 * 2 * 2 * 960 * 128 * 2 - 4 * 2 * 2 * 1024 * 66  # so many more exact, fewer packed


@pytest.mark.parametrize("bits", [2.5, 4.125, 4.5, 6])
def test_a_budget_takes_its_average(run, bits):
    code, out, _ = run("--kv", f"auto:{bits}", "--json")
    (row,) = json.loads(out)["results"]
    numbers = 4 * 2 * 2 * 128  # layers, sides, heads, dims
    assert code == 0 and row["compressed"] == 4
    assert 0 <= bits - 8 * row["bytes_per_token"] / numbers <= 1 / 8  # a step is one bit in one of 8 parts
    assert "as if all layers needed the same" in run("--kv", f"auto:{bits}")[1]


def test_a_budget_below_what_two_bits_take_is_refused(run):
    code, _, err = run("--kv", "auto:2.1")
    assert code == 2 and "error: --kv: auto:2.1: got 2.1, and 2 bits for all keys and values take 2.125" in err


@pytest.mark.parametrize("name", ["gemma3_text", "deepseek_v3", "falcon_h1", "qwen3_next"])
def test_a_budget_of_windows_latents_and_states(name):
    model = plan.build(families.config(name))
    config = TurboConfig("auto:4.9", sink=2, recent=4, block=2)
    layers, uniform = plan.layers_of(model), TurboConfig("turbo5", sink=2, recent=4, block=2)
    budget, more = (plan.cache_bytes(layers, plan.configs_of(model, c), 10_000) for c in (config, uniform))
    less = plan.cache_bytes(layers, plan.configs_of(model, TurboConfig("turbo3", sink=2, recent=4, block=2)), 10_000)
    assert less < budget < more


def test_auto_is_counted_with_the_bits_it_starts_from(run):
    code, out, _ = run("--kv", "auto", "turbo4", "--json")
    auto, turbo4 = json.loads(out)["results"]
    assert code == 0 and auto["tokens"] == turbo4["tokens"] and auto["bytes_per_token"] == turbo4["bytes_per_token"]
    assert "decides on the first prompt chunk" in run("--kv", "auto")[1]


def test_a_model_without_growing_caches(run, folder):
    code, out, _ = run("--model", folder(families.config("mamba")), "--memory", "1GB", "--kv", "none", "turbo4")
    assert code == 0 and out.count("any number") == 2 and "computed from the configuration" in out


def test_without_memory_it_is_this_machine_s(run, monkeypatch):
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 12 * 10**9}, raising=False)
    assert "12.00 GB (the working set that Metal recommends on this Mac)" in run()[1]
    monkeypatch.setattr(mx, "device_info", lambda: {}, raising=False)
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert f"{pages / 1e9:.2f} GB (all memory of this machine, which has no GPU)" in run()[1]


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--tokens", "0"], "--tokens: got 0"),
        (["--batch", "0"], "--batch: got 0"),
        (["--memory", "x"], "--memory: got 'x'"),
        (["--kv", "turbo7"], "--kv: got 'turbo7'"),
        (["--memory", "1MB"], "--memory: the weights alone are 4.54 MB"),
        (["--model", "no such folder"], "'no such folder' is neither an existing folder"),
        (["--kv-recent", "-1"], "--kv-recent: got -1"),
    ],
)
def test_wrong_input_is_one_line(run, argv, says):
    code, out, err = run(*argv)
    assert (code, out, err.count("\n")) == (2, "", 1) and says in err


@pytest.mark.parametrize(
    "change, says",
    [
        ({"model_type": "gpt99"}, "mlx-lm cannot build a 'gpt99' model"),
        ({"model_type": None}, "mlx-lm cannot build a None model"),
        ({"num_hidden_layers": "four"}, "cannot build a 'qwen3' model"),
    ],
)
def test_configurations_that_do_not_work(run, folder, change, says):
    code, out, err = run("--model", folder(CONFIG | change))
    assert (code, out, err.count("\n")) == (2, "", 1) and says in err


def test_a_head_dim_that_cannot_be_packed_is_planned_as_exact(run, folder):
    code, out, err = run("--model", folder(CONFIG | {"head_dim": 30}), "--kv", "none", "turbo4")
    none, turbo4 = (line.split() for line in out.splitlines() if line.startswith(("none", "turbo4")))
    assert (code, err) == (0, "") and turbo4[1:3] == none[1:3] == ["0", "960"]


@pytest.mark.parametrize(
    "text, says",
    [
        ("{", "JSONDecodeError"),
        ("[]", "has no 'model_type'"),
        ("{}", "has no 'model_type'"),
        (None, "FileNotFoundError"),
    ],
)
def test_files_that_are_no_configuration(run, tmp_path, text, says):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    code, _, err = run("--model", tmp_path)
    assert (code, err.count("\n")) == (2, 1) and says in err


# ---- the Hub -------------------------------------------------------------------------------------------------
COMMIT = "0123456789abcdef0123456789abcdef01234567"
INDEX = {"metadata": {"total_size": 4 * 10**9}, "weight_map": {}}


class Hub(http.server.BaseHTTPRequestHandler):
    """Two models: tiny/indexed, and tiny/single, whose one file of weights has no index."""

    files = {
        "tiny/indexed": {"config.json": CONFIG, "model.safetensors.index.json": INDEX},
        "tiny/single": {"config.json": CONFIG},
    }
    asked = []

    def do_GET(self):
        name = "/".join(self.path.removeprefix("/api/models").split("?")[0].split("/")[1:3])
        file = self.path.partition("/resolve/main/")[2]
        if self.path.startswith("/api/models/"):
            weights = {"rfilename": "model.safetensors", "size": 3 * 10**9}
            found = {"id": name, "siblings": [weights, {"rfilename": "other.bin", "size": 5}]}
        else:
            self.asked += [(name, file)] * bool(file)  # not what huggingface_hub asks for itself
            found = self.files.get(name, {}).get(file)
        body = json.dumps(found).encode()
        self.send_response(200 if found else 404)
        missing = "EntryNotFound" if name in self.files else "RepoNotFound"
        for key, value in {
            "Content-Length": len(body),
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{hash(body):x}"',
            **({} if found else {"X-Error-Code": missing}),
        }.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """ask(name, port=...) -> the finished `mlx-turbo plan --json` of a Hub that has our two models."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = tmp_path_factory.mktemp("hub")

    def ask(name, **env):
        env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and not k.startswith("HF_")} | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            **env,
        }
        return subprocess.run(
            [sys.executable, "-m", "mlx_turbo", "plan", "--model", name, "--memory", "8GB", "--json"],
            env=env,
            capture_output=True,
            text=True,
            timeout=120,
        )

    yield ask
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "name, weights, source", [("tiny/indexed", 4 * 10**9, "index"), ("tiny/single", 3 * 10**9, "Hub")]
)
def test_of_a_model_on_the_hub_only_configuration_and_index_are_read(hub, name, weights, source):
    Hub.asked.clear()
    done = hub(name)
    p = json.loads(done.stdout)
    assert (p["weights_bytes"], p["weights_source"]) == (weights, source) and p["caches"] == 4
    assert set(Hub.asked) == {(name, "config.json"), (name, "model.safetensors.index.json")}
    offline = hub(name, HF_HUB_OFFLINE="1")  # what is in the Hugging Face cache needs no network
    p = json.loads(offline.stdout)
    assert (p["caches"], p["weights_source"]) == (4, "index" if source == "index" else "computed")


@pytest.mark.slow  # huggingface_hub tries again for half a minute
def test_a_hub_that_is_gone(hub):
    assert hub("tiny/single").returncode == 0
    done = hub("tiny/single", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 0 and json.loads(done.stdout)["weights_source"] == "computed", done.stderr


def test_models_the_hub_does_not_have(hub):
    done = hub("tiny/absent")
    assert (
        done.returncode == 2
        and "'tiny/absent' is neither a local folder nor a model on the Hugging Face Hub" in done.stderr
    )
    done = hub("tiny/unknown", HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and "the Hub cannot be reached" in done.stderr and done.stderr.count("\n") == 1


def test_a_budget_of_memory_is_planned_from_exact_to_its_floor(run):
    code, out, err = run("--kv-memory", "20MB", "--kv-floor", "turbo4", "--json")
    assert code == 0, err
    found = json.loads(out)
    budget = found["budgets"]["memory:20MB"]
    assert found["results"] == [] and budget["limit"] == 20_000_000 and budget["floor"] == "turbo4"
    assert [stage["bits"] for stage in budget["stages"]] == [0, 8, 6, 4]
    tokens = [stage["tokens"] for stage in budget["stages"]]
    exact = 20_000_000 / (4 * 2 * 2 * 128 * 2)  # 4 layers, 2 kv heads, keys and values of 128 numbers of 2 bytes
    assert tokens == sorted(tokens) and 0.85 * exact < tokens[0] < exact and 3 * exact < tokens[-1] < 4 * exact
    code, out, _ = run("--kv-memory", "20MB", "--kv", "turbo4")
    assert code == 0 and f"exact                up to {tokens[0]:,} tokens" in out and "turbo3 is the floor" in out
    assert re.search(r"^turbo4 +4 ", out, re.MULTILINE)
