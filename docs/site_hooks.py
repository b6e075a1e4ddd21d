"""Pages of the site that are files of the repository's root: mkdocs.yml names this file as a hook."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OF_ROOT = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
"""Page -> file. The pages say in one line where the file is, for who reads them in the repository."""


def on_page_markdown(markdown: str, page, **_) -> str:
    """Returns the text of a page: of the file that it stands for, with links as from the folder docs."""
    name = OF_ROOT.get(page.file.src_uri)
    return markdown if name is None else (ROOT / name).read_text().replace("](docs/", "](")
