"""The code that README.md and docs/ show."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
VISION_HUB_ID = "mlx-community/Qwen3-VL-4B-Instruct-4bit"
HUB_ID = "mlx-community/Qwen3-8B-4bit"  # what the pages name where any model may stand


def text(page):
    return (ROOT / page).read_text()


def blocks(page, *languages):
    """[(language, code)] of a page's fenced blocks in these languages, in order."""
    return re.findall(rf"^```({'|'.join(languages)})\n(.*?)^```$", text(page), re.DOTALL | re.MULTILINE)
