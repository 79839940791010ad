"""What the pages show runs: the blocks of a page one after the other, as a reader would, with the embedded model in the
place of one of the Hub. (docs/server.md: test_serve.py, with a server.)"""

import re
import runpy
import shlex

import mlx.core as mx
import mlx_lm
import pytest
from PIL import Image
from support import pages
from support import vlm as models

import mlx_turbo
from mlx_turbo.backends import select
from mlx_turbo.backends.mlx_ops import CpuBackend
from mlx_turbo.backends.sides import BackendError
from mlx_turbo.cli.common import DEMO_MODEL, DEMO_TEMPLATE, load_model
from mlx_turbo.cli.main import main
from mlx_turbo.integration import attention

PAGES = ["README.md", *(f"docs/{file.name}" for file in sorted(pages.ROOT.glob("docs/*.md")))]
PROGRAMS = [page for page in PAGES if pages.blocks(page, "python") and page != "docs/server.md"]


@pytest.fixture
def at_home(monkeypatch, tmp_path):
    """A folder with a document; mlx_lm.load knows one model, the embedded one."""
    load = mlx_lm.load

    def load_demo(name, *args, **kwargs):
        assert name == pages.HUB_ID
        model, tokenizer = load_model(load, DEMO_MODEL, "--model", {"chat_template": DEMO_TEMPLATE})
        model.set_dtype(mx.float32 if select.default_name() == "cpu" else mx.float16)
        return model, tokenizer

    monkeypatch.setattr(mlx_lm, "load", load_demo)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16)).save("photo.jpg")
    (tmp_path / "document.txt").write_text((DEMO_MODEL / "stories.txt").read_text()[:3000])


@pytest.fixture
def sees(vlm, monkeypatch):
    """mlx_vlm.load knows one model: a random one, with the embedded one's words."""
    load = vlm.load

    def load_random(name):
        assert name == pages.VISION_HUB_ID
        _, processor = load(str(DEMO_MODEL))
        n = len(processor)
        return models.build("qwen3_vl", vocabulary=n, image_token=n - 1), models.Processor(processor, n - 1)

    monkeypatch.setattr(vlm, "load", load_random)
    yield
    attention.uninstall()


SAYS = {  # what a program must have said besides running to its end
    "README.md": ["4 of 4 layers compressed", "'scheme': 'turbo4'"],
    "docs/app.md": ["'layers': '4 of 4 layers compressed", "there was a little girl named Lily."],
    "docs/compiling.md": [],
    "docs/long-document.md": [
        r"\d+ tokens in [0-9.]+ MB, uncompressed [0-9.]+ MB. 4 of 4 layers compressed; auto: keys at",
        "none +0 ",
        "turbo4 +4 ",
        r"the story about\? (.{20,}?)\nWhat happened in the end\? .{20,}\1\n$",
    ],  # as saved
    "docs/memory.md": ["4 of 4 layers compressed; budget of 6GB, .* bytes used, floor turbo3, priced by KL divergence"],
    "docs/script.md": [
        "4 of 4 layers compressed; auto",
        r"\d+ of them packed",
        "windows of 1,024 tokens",
        "The next day",
    ],
    "docs/store.md": [
        r"^0 of (\d+) tokens were stored; Stored\(n_tokens=\d+, n_blocks=(\d+), n_new=\2,",
        r"\n([1-9]\d*) of \d+ tokens were stored; .*\n[1-9]\d* of \d+ tokens after a restart, [1-9]\d* bytes on disk",
    ],
    "docs/vision.md": ["4 of 4 layers compressed; auto"],
}


def run_page(page):
    """The names that a page's program defines."""
    names = {}
    for language, code in pages.blocks(page, "python", "bash"):
        if language == "python":
            exec(compile(code, page, "exec"), names)
            continue
        for line in code.splitlines():
            command = shlex.split(line.replace(pages.HUB_ID, str(DEMO_MODEL)), comments=True)
            assert command[0] == "mlx-turbo" and main(command[1:]) == 0, line
    return names


@pytest.mark.parametrize("page", PROGRAMS)
def test_the_program_on_a_page_runs(at_home, capsys, request, page):
    if page == "docs/vision.md":
        request.getfixturevalue("sees")
    run_page(page)
    said = capsys.readouterr().out
    for pattern in SAYS[page]:
        assert re.search(pattern, said, re.DOTALL), (pattern, said)


class DoesNotBuild(CpuBackend):
    def quantize(self, *args, **kwargs):
        raise BackendError("the Metal kernel does not build or run")


def test_an_application_can_go_on_without_compression_and_says_so(at_home, capsys):
    app = run_page("docs/app.md")
    prompt = (DEMO_MODEL / "stories.txt").read_text()[:1500]  # long enough to be packed
    with select.use_backend(DoesNotBuild()):
        text = app["generate"](app["model"], app["tokenizer"], prompt)
    assert len(text) > 50 and "make_cache" not in vars(app["model"])
    assert "KV cache compression is off: the Metal kernel does not build or run" in capsys.readouterr().out


def test_every_page_is_reached_from_the_readme():
    assert {f"docs/{name}" for name in re.findall(r"docs/([\w-]+\.md)", pages.text("README.md"))} == set(PAGES[1:])


def test_tests_that_pages_name_exist():
    tests = "".join(file.read_text() for file in (pages.ROOT / "tests").rglob("test_*.py"))
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", pages.text(page))}
    assert len(named) >= 20 and named <= set(re.findall(r"^def (test_\w+)", tests, re.MULTILINE))


def test_the_api_page_has_every_public_name_as_its_docstring_says():
    script = runpy.run_path(str(pages.ROOT / "scripts/api_page.py"))
    page = pages.text("docs/api.md")
    assert re.findall(r"^## (\w+)$", page, re.MULTILINE) == sorted(mlx_turbo.__all__)
    assert page == script["page"](), "python scripts/api_page.py --write"
