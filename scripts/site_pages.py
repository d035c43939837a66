"""Hooks of mkdocs: the pages that lie beside the code they specify are pages of the site too."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOM = Path(__file__).parents[1] / "cache"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page in ROOM.glob("*.md"):
        files.append(File.generated(config, page.name, abs_src_path=str(page)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Their place in the repository, to which pages link, is beside the others in the site; and a
    block of commands is one, whatever the tests are told of it behind its language."""
    markdown = markdown.replace(f"](../{ROOM.name}/", "](")
    return re.sub(r"^```console \w+$", "```console", markdown, flags=re.MULTILINE)
